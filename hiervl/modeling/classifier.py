"""Classifiers of the instance queries: by the names' text embeddings, or Mask2Former's own linear layer."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError


class LinearClassifier(nn.Linear):
    """Mask2Former's head: one weight row per class and one for "no object"."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__(dim, num_classes + 1)

    def forward(self, queries, text=None):
        """(B, N, C) -> (B, N, K+1)."""
        return super().forward(queries)


class TextClassifier(nn.Module):
    """Cosine between the projected query and each class's text, over a learnable temperature.

    "No object" is one learnable vector of the text space. No weight has a dimension K: any list of names can be
    scored. The inverse temperature starts at 1/0.07 and is at most 100, as in CLIP (arXiv 2103.00020, 2.5).
    """

    MAX_SCALE = 100.0

    def __init__(self, dim: int, text_dim: int):
        super().__init__()
        self.project = nn.Linear(dim, text_dim)
        self.no_object = nn.Parameter(torch.randn(text_dim) / math.sqrt(text_dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, queries, text):
        """queries (B, N, C), text (K, Dt) or each image's own (B, K, Dt), of unit length -> (B, N, K+1)."""
        no_object = F.normalize(self.no_object, dim=0).expand(*text.shape[:-2], 1, -1)
        classes = torch.cat((text, no_object), dim=-2)  # (..., K+1, Dt)
        scale = self.log_scale.exp().clamp(max=self.MAX_SCALE)
        return scale * F.normalize(self.project(queries), dim=-1) @ classes.transpose(-1, -2)


def build_classifier(kind: str, dim: int, num_classes: int, text_dim: int) -> nn.Module:
    """kind: "text" or "linear" (MODEL.DECODER.CLASSIFIER)."""
    if kind == "linear":
        return LinearClassifier(dim, num_classes)
    if kind == "text":
        return TextClassifier(dim, text_dim)
    raise UserError(f"MODEL.DECODER.CLASSIFIER: {kind!r} is not one of text, linear.")
