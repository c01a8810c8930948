"""HSQG, the hierarchical semantic query generator (docs/how-it-works.md).

Estimates which of the V named classes are relevant to an image, selects the most relevant ones, and turns their text
embeddings into queries at three scales. Input: res5 (B, C, h, w) and text embeddings (V, Dt). Output: SelectedClasses.
"""

import math
from dataclasses import dataclass, replace

import torch
from detectron2.config import configurable
from torch import nn

from ..errors import UserError
from .layers import MLP, Temperature, downsample_mask, l2_normalize

NUM_SCALES = 3  # coarse, middle, fine, for the levels F1, F2, F3 of the memory


@dataclass
class SelectedClasses:
    """The K' classes selected for each image. Their order may differ from image to image.

    Attributes:
        index: (B, K') int64, position of each class in the list of names.
        relevance: (B, K') float in [0, 1]; 0 for a suppressed class.
        text: (B, K', Dt), text embeddings of the classes.
        queries: (B, E, K', d), one query per scale and class.
        logits: (B, V), relevance logits of all V names, selected or not.
        names: (V, Dt), text embeddings of all V names.
        pixels: (B, Dt, h, w), unit-length embeddings of the res5 pixels in the text space.
        variants: (B, E, K', R, d), one query for each of a class's R texts; None if every class has a single text.
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
        """The selected classes of a slice of the batch."""
        per_image = {
            name: getattr(self, name)
            for name in ("index", "relevance", "text", "queries", "logits", "pixels", "variants")
        }
        return replace(self, **{name: value[images] for name, value in per_image.items() if value is not None})

    @property
    def log_relevance(self) -> torch.Tensor:
        """(B, K'), the bias for attention to each class: finite, yet a suppressed class gets almost no weight."""
        return self.relevance.clamp(min=1e-4).log()


class QueryGenerator(nn.Module):
    """Selects classes by relevance and generates their queries; see the module docstring.

    The relevance of a name with text embedding t is s = sigmoid(a * logsumexp_x(cos(P res5(x), t) / tau) + b). The
    logsumexp over positions lets a small object, such as a pole in a corner, count as much as a large one. The same
    function applies to every name, seen in training or not, and no weight depends on the number of classes.

    Args:
        feature_dim: channels of res5.
        text_dim: width of the text embeddings.
        hidden_dim: width of the queries.
        top_k: number of classes to select; all of them if the list of names is shorter.
        min_relevance: at inference, a class seen in training is suppressed below this relevance.
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
            raise UserError(f"MODEL.HSQG.TOP_K is {options.TOP_K}; set it to 1 or more.")
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
            res5: (B, C, h, w).
            text: (V, Dt) of unit length.
            variants: (V, R, Dt), all texts of each name; None if every name has a single text.
            valid_mask: (B, H, W) bool at any resolution, False on padding; None if there is no padding.
            required: (B, V) bool, classes that must be selected because the target contains them (training).
            trained: (V,) bool, names seen in training (inference). A trained class below min_relevance is suppressed;
                for a new name, relevance only decides its rank. None: no class is suppressed.
        """
        pixels = l2_normalize(self.project(res5).float())
        logits = self.relevance(pixels, text, valid_mask)
        index = self.select(logits, required)
        relevance = logits.gather(1, index).sigmoid()
        if trained is not None:
            index, relevance = self._suppress(index, relevance, trained[index])
        queries = self._queries(text)[:, index].transpose(0, 1)  # (E, V, d) -> (B, E, K', d)
        if variants is not None:
            variants = self._queries(variants)[:, index].transpose(0, 1)  # (B, E, K', R, d)
        return SelectedClasses(index, relevance, text[index], queries, logits, text, pixels, variants)

    def project_names(self, text) -> torch.Tensor:
        """(V, Dt) -> (E, V, d): the names projected for each of the E scales, without level embeddings."""
        return torch.stack([project(text) for project in self.projections])

    def _queries(self, text):
        """Text embeddings (V, ..., Dt) -> queries (E, V, ..., d)."""
        level = self.level_embed.weight.view(NUM_SCALES, *[1] * (text.dim() - 1), -1)
        return self.project_names(text) + level

    def relevance(self, pixels, text, valid_mask=None) -> torch.Tensor:
        """Pixel embeddings (B, Dt, h, w) and names (V, Dt) -> relevance logits (B, V)."""
        with torch.autocast(pixels.device.type, enabled=False):
            similarity = text @ pixels.flatten(2) / self.temperature()  # (V, Dt) @ (B, Dt, h*w) -> (B, V, h*w)
        if valid_mask is not None:
            padding = ~downsample_mask(valid_mask, pixels.shape[-2:]).flatten(1)  # (B, h*w)
            similarity = similarity.masked_fill(padding[:, None], -torch.inf)
        return self.log_slope.exp() * similarity.logsumexp(2) + self.bias

    @torch.no_grad()
    def select(self, logits, required=None) -> torch.Tensor:
        """Relevance logits (B, V) -> indices (B, K'): the required classes first, then the most relevant others.

        No image may require more than top_k classes; TargetBuilder makes sure of it.
        """
        top_k = min(self.top_k, logits.shape[1])
        if required is not None:
            logits = logits.masked_fill(required, torch.inf)
        if top_k == logits.shape[1]:
            return torch.arange(top_k, device=logits.device).expand(len(logits), -1)
        return logits.topk(top_k, dim=1).indices

    def _suppress(self, index, relevance, trained):
        """Suppress trained classes of low relevance: index, relevance and trained (B, K) -> index, relevance (B, K').

        K' is the largest number of classes that remain in any image. An image with fewer remaining classes fills up
        its row with suppressed ones, whose relevance becomes 0. The most relevant class of an image always remains. A
        name never seen in training may score low even where it fits, so its relevance is set to 1
        (docs/DECISIONS.md).
        """
        best = relevance == relevance.amax(1, keepdim=True)
        remaining = (relevance >= self.min_relevance) | ~trained | best
        relevance = torch.where(trained, relevance, 1.0)
        width = int(remaining.sum(1).max())
        order = remaining.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        return index.gather(1, order), (relevance * remaining).gather(1, order)
