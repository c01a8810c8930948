"""HSQG, the hierarchical semantic query generator (docs/how-it-works.md, "kept classes").

Finds out which of the named classes an image can show, and turns the names of those into queries at three scales.
Inputs: res5 (B, C, h, w) and class embeddings (V, Dt). Output: SelectedClasses.
"""

import math
from dataclasses import dataclass, replace

import torch
from detectron2.config import configurable
from torch import nn

from ..errors import UserError
from .layers import MLP, Temperature, downsample_mask, l2_normalize

NUM_SCALES = 3  # coarse, middle, fine: the levels F1, F2, F3 of the memory


@dataclass
class SelectedClasses:
    """The classes that go on, K' per image, in an order of its own for each image.

    Attributes:
        index: (B, K') int64, position in the list of names.
        relevance: (B, K') float in [0, 1]; 0 for a class that is cut.
        text: (B, K', Dt), the classes' embeddings. queries: (B, E, K', d).
        variants: (B, E, K', R, d), queries of each text of a class; None if every class has one text.
        logits: (B, V), the relevance logits of all V names, kept or not. names: (V, Dt), their embeddings.
        pixels: (B, Dt, h, w), unit-length pixel embeddings of res5 in the space of the names.
    """

    index: torch.Tensor
    relevance: torch.Tensor
    text: torch.Tensor
    queries: torch.Tensor
    logits: torch.Tensor
    names: torch.Tensor
    pixels: torch.Tensor
    variants: torch.Tensor | None = None

    def __getitem__(self, images: slice) -> "SelectedClasses":
        """Those of some of the images."""
        own = ("index", "relevance", "text", "queries", "logits", "pixels", "variants")
        return replace(self, **{name: getattr(self, name)[images] for name in own if getattr(self, name) is not None})

    @property
    def log_relevance(self) -> torch.Tensor:
        """(B, K'), finite: a class that is cut is as good as unseen in an attention."""
        return self.relevance.clamp(min=1e-4).log()


class QueryGenerator(nn.Module):
    """See the module's docstring.

    The relevance of a name is one function of its embedding and of spatial class_scores,
    s = sigmoid(a * logsumexp_x(cos(P res5(x), t) / tau) + b): a pole in a corner counts, and an unseen name is
    treated like a trained one. No weight has a dimension K.

    Args:
        feature_dim, text_dim, hidden_dim: widths of res5, of the embeddings, of the queries.
        top_k: number of classes that go on (all, if there are fewer).
        min_relevance: at inference a class that was trained in training is cut below it.
    """

    @configurable
    def __init__(self, *, feature_dim: int, text_dim: int, hidden_dim: int, top_k: int, min_relevance: float):
        super().__init__()
        self.top_k, self.min_relevance = top_k, min_relevance
        self.project = nn.Conv2d(feature_dim, text_dim, 1)
        self.temperature = Temperature(0.05, 0.02, 0.2)
        self.log_slope = nn.Parameter(torch.tensor(math.log(0.5)))
        self.bias = nn.Parameter(torch.tensor(-2.0))
        self.projections = nn.ModuleList(
            nn.Sequential(MLP(text_dim, hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim)) for _ in range(NUM_SCALES)
        )
        self.level_embed = nn.Embedding(NUM_SCALES, hidden_dim)

    @classmethod
    def from_config(cls, cfg, feature_dim, text_dim):
        options = cfg.MODEL.HSQG
        if options.TOP_K < 1:
            raise UserError(f"MODEL.HSQG.TOP_K is {options.TOP_K}; at least one class must go on.")
        return {
            "feature_dim": feature_dim,
            "text_dim": text_dim,
            "hidden_dim": cfg.MODEL.DECODER.HIDDEN_DIM,
            "top_k": options.TOP_K,
            "min_relevance": options.MIN_RELEVANCE,
        }

    def forward(self, res5, text, variants=None, *, valid_mask=None, required=None, trained=None) -> SelectedClasses:
        """
        Args:
            res5: (B, C, h, w). text: (V, Dt) of unit length. variants: (V, R, Dt), all texts of each name, or None.
            valid_mask: (B, H, W) bool at any size, False on padding; None: there is none.
            required: (B, V) bool, classes of the target (training).
            trained: (V,) bool, names that training has shown (inference): one below min_relevance is suppressed,
                whereas a new name is only ranked by its relevance. None: nothing is suppressed.
        Raises:
            UserError: an image shows more classes than are kept.
        """
        pixels = l2_normalize(self.project(res5).float())
        logits = self.relevance(pixels, text, valid_mask)
        index = self.select(logits, required)
        relevance = logits.gather(1, index).sigmoid()
        if trained is not None:
            index, relevance = self._cut(index, relevance, trained[index])
        queries = self._queries(text)[:, index].transpose(0, 1)  # (E, V, d) -> (B, E, K', d)
        if variants is not None:
            variants = self._queries(variants)[:, index].transpose(0, 1)  # (B, E, K', R, d)
        return SelectedClasses(index, relevance, text[index], queries, logits, text, pixels, variants)

    def project_names(self, text) -> torch.Tensor:
        """(V, Dt) -> (E, V, d): the names at E scales, without the levels' embeddings."""
        return torch.stack([project(text) for project in self.projections])

    def _queries(self, text):
        """(V, ..., Dt) -> (E, V, ..., d)."""
        level = self.level_embed.weight.view(NUM_SCALES, *[1] * (text.dim() - 1), -1)
        return self.project_names(text) + level

    def relevance(self, pixels, text, valid_mask=None) -> torch.Tensor:
        """Pixel embeddings (B, Dt, h, w) and names (V, Dt) -> relevance logits (B, V)."""
        with torch.autocast(pixels.device.type, enabled=False):
            class_scores = text @ pixels.flatten(2) / self.temperature()  # (B, V, h*w)
        if valid_mask is not None:
            outside = ~downsample_mask(valid_mask, pixels.shape[-2:]).flatten(1)  # (B, h*w)
            class_scores = class_scores.masked_fill(outside[:, None], -torch.inf)
        return self.log_slope.exp() * class_scores.logsumexp(2) + self.bias

    @torch.no_grad()
    def select(self, logits, required=None) -> torch.Tensor:
        """Logits (B, V) -> (B, K') indices: classes of the target first, then the most relevant."""
        top_k = min(self.top_k, logits.shape[1])
        if required is not None:
            most = int(required.sum(1).max())
            if most > top_k:
                raise UserError(
                    f"MODEL.HSQG.TOP_K is {top_k}, but a training image shows {most} classes; keep at least "
                    "as many as an image can show."
                )
            logits = logits.masked_fill(required, torch.inf)
        if top_k == logits.shape[1]:
            return torch.arange(top_k, device=logits.device).expand(len(logits), -1)
        return logits.topk(top_k, dim=1).indices

    def _cut(self, index, relevance, trained):
        """Drop what is cut in every image of the batch; elsewhere its relevance becomes 0. The best one stays. Words
        that training never showed may have little relevance where they fit: theirs is 1 (docs/DECISIONS.md)."""
        best = relevance == relevance.amax(1, keepdim=True)
        stays = (relevance >= self.min_relevance) | ~trained | best
        relevance = torch.where(trained, relevance, 1.0)
        width = int(stays.sum(1).max())
        order = stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        return index.gather(1, order), (relevance * stays).gather(1, order)
