"""Layers shared by several modules."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class MLP(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        dims = (in_dim, hidden_dim, hidden_dim, out_dim)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:]))

    def forward(self, x):
        """(..., in_dim) -> (..., out_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Attention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with one attention mask shared by all heads, instead of a copy per head."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads, batch_first=True)

    def forward(self, query, key, value, mask=None):
        """
        Args:
            query: (B, Q, C).
            key, value: (B, S, C).
            mask: (B, Q, S), or (B, 1, S) to use the same mask for every query. Boolean: True where a query may attend.
                Float: added to the attention logits. None: every query attends everywhere.
        Returns:
            (B, Q, C).
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        # (B, X, C) -> (B, heads, X, C/heads)
        q, k, v = (
            F.linear(x, w, b).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases)
        )
        if mask is not None:
            mask = mask[:, None] if mask.dtype == torch.bool else mask[:, None].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def run_layer(layer: nn.Module, *args, recompute: bool):
    """`layer(*args)`; with `recompute`, its activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


class Temperature(nn.Module):
    """A learnable positive scalar, stored as its logarithm and clamped to [low, high]."""

    def __init__(self, start: float, low: float, high: float):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(start)))
        self.low, self.high = low, high

    def forward(self):
        return self.log.exp().clamp(self.low, self.high)


def downsample_mask(valid_mask: torch.Tensor, size) -> torch.Tensor:
    """(B, H, W) bool -> (B, h, w) bool: a cell is valid if at least one of its pixels is."""
    return F.adaptive_max_pool2d(valid_mask.float(), size) > 0


def l2_normalize(maps: torch.Tensor) -> torch.Tensor:
    """Scale the channel vector at every position of (B, C, h, w) to unit length; zero vectors stay zero.

    Used instead of F.normalize, which is nine times slower over the channels of a feature map on a CPU.
    """
    return maps * maps.square().sum(1, keepdim=True).clamp(min=1e-12).rsqrt()
