"""Residual adapter of the text space (docs/how-it-works.md)."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class ResidualAdapter(nn.Module):
    """T' = norm(T + gamma A(T)), A a two-layer MLP whose output is about as long as T.

    gamma starts at 0: at first T' is T, only gamma has a gradient, and A learns as soon as gamma has left 0.
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
        """(M, Dt) of unit length -> the same."""
        # The entries of a unit vector are about 1 / sqrt(Dt): scaled to 1, or the MLP would give next to nothing.
        scale = math.sqrt(text.shape[1])
        change = self.out(F.gelu(self.hidden(text * scale))) / scale
        return F.normalize(text + self.gamma * change, dim=1)
