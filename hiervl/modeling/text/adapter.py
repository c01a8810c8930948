"""Residual adapter for the text embeddings (docs/how-it-works.md)."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class ResidualAdapter(nn.Module):
    """T' = norm(T + gamma * A(T)), where A is a two-layer MLP whose output has about the same norm as T.

    gamma is a learnable scalar that starts at 0. T' therefore starts as T, and the first step changes gamma only; A
    receives gradients once gamma is no longer 0.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.hidden = nn.Linear(dim, dim // 2)
        self.out = nn.Linear(dim // 2, dim)
        self.gamma = nn.Parameter(torch.zeros(()))
        for layer in (self.hidden, self.out):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, text):
        """(M, Dt) of unit length -> (M, Dt) of unit length."""
        # The entries of a unit vector are about 1 / sqrt(Dt). The MLP needs inputs of about 1, or its output would be
        # close to zero.
        scale = math.sqrt(text.shape[1])
        residual = self.out(F.gelu(self.hidden(text * scale))) / scale
        return F.normalize(text + self.gamma * residual, dim=1)
