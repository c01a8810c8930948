"""Classifiers for the instance queries: cosine similarity to text embeddings, or Mask2Former's linear layer."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError


class LinearClassifier(nn.Linear):
    """Mask2Former's classification head: one weight row per class and one for "no object"."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__(dim, num_classes + 1)

    def forward(self, queries, text=None):
        """queries (B, N, C) -> logits (B, N, K+1). `text` is ignored."""
        return super().forward(queries)


class TextClassifier(nn.Module):
    """Cosine similarity of the projected query and each class's text embedding, divided by a learnable temperature.

    "No object" is a learnable vector in the text space. No weight depends on the number of classes K, so the
    classifier works with any list of names. As in CLIP (arXiv 2103.00020, section 2.5), the inverse temperature starts
    at 1/0.07 and is clamped to 100.
    """

    MAX_SCALE = 100.0

    def __init__(self, dim: int, text_dim: int):
        super().__init__()
        self.project = nn.Linear(dim, text_dim)
        self.no_object = nn.Parameter(torch.randn(text_dim) / math.sqrt(text_dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, queries, text):
        """queries (B, N, C) and unit-length text, (K, Dt) or (B, K, Dt) per image -> logits (B, N, K+1)."""
        no_object = F.normalize(self.no_object, dim=0).expand(*text.shape[:-2], 1, -1)
        classes = torch.cat((text, no_object), dim=-2)  # (..., K+1, Dt)
        scale = self.log_scale.exp().clamp(max=self.MAX_SCALE)
        projected = self.project(queries)
        # In float32: at a scale of 100, bfloat16 would round a logit to the next half.
        with torch.autocast(queries.device.type, enabled=False):
            return scale * F.normalize(projected.float(), dim=-1) @ classes.float().transpose(-1, -2)


def build_classifier(kind: str, dim: int, num_classes: int, text_dim: int) -> nn.Module:
    """Build the classifier that MODEL.DECODER.CLASSIFIER names.

    Args:
        kind: "text" or "linear".
        dim: width of the queries.
        num_classes: K, used by the linear classifier only.
        text_dim: width of the text embeddings, used by the text classifier only.
    Raises:
        UserError: an unknown kind.
    """
    if kind == "linear":
        return LinearClassifier(dim, num_classes)
    if kind == "text":
        return TextClassifier(dim, text_dim)
    raise UserError(f"MODEL.DECODER.CLASSIFIER: {kind!r} is not one of text, linear.")
