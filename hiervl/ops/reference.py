"""Multi-scale deformable attention in plain PyTorch: the reference, and the fallback without a compiled kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    level_start: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples, computed level by level with ``grid_sample``.

    Location (0, 0) is the top left corner of the top left pixel, and (1, 1) the bottom right
    corner of the bottom right pixel; the value outside is zero.

    Args:
        value: (B, S, H, D), the levels concatenated along S.
        spatial_shapes: (height, width) of each level.
        level_start: row of ``value`` at which each level begins.
        sampling_locations: (B, Q, H, L, P, 2) as (x, y) in [0, 1].
        attention_weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H*D), of the same type as ``value``; computed in at least float32.
    """
    batch, _, heads, width = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    exact = torch.promote_types(value.dtype, torch.float32)
    # (B, Q, H, L, P, 2) -> (L, B*H, Q, P, 2), [0, 1] -> [-1, 1]
    grids = (2 * sampling_locations.to(exact) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    # (B, Q, H, L, P) -> (L, B*H, 1, Q, P)
    weights = attention_weights.to(exact).permute(3, 0, 2, 1, 4).flatten(1, 2).unsqueeze(2)
    output = value.new_zeros((batch * heads, width, queries), dtype=exact)
    if output.numel() == 0 or points == 0 or not any(h * w for h, w in spatial_shapes):
        # grid_sample rejects empty tensors. Adding zero keeps the output connected to the inputs for autograd.
        zero = value[:0].sum() + sampling_locations[:0].sum() + attention_weights[:0].sum()
        return (value.new_zeros((batch, queries, heads * width), dtype=exact) + zero).to(value.dtype)
    for (height, length), start, grid, weight in zip(spatial_shapes, level_start, grids, weights, strict=True):
        if height * length == 0:
            continue
        # (B, h*w, H, D) -> (B, H, D, h*w) -> (B*H, D, h, w)
        level = value[:, start : start + height * length].to(exact).permute(0, 2, 3, 1)
        level = level.reshape(batch * heads, width, height, length)
        # (B*H, D, Q, P)
        sampled = F.grid_sample(level, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        output = output + (sampled * weight).sum(-1)  # (B*H, D, Q)
    # (B*H, D, Q) -> (B, Q, H*D)
    return output.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype).contiguous()
