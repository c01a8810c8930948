"""The attention layer of the pixel decoder, with the parameter names of Mask2Former."""

import functools
import math

import torch
from torch import Tensor, nn

from .function import ms_deform_attn


def _normalizer(
    spatial_shapes: tuple[tuple[int, int], ...], points: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(L*P*2,): width and height of the level for each sampling point, to normalize offsets in pixels."""
    # Created outside inference mode, because training cannot use a cached inference tensor.
    with torch.inference_mode(False):
        return torch.tensor([size for h, w in spatial_shapes for size in (w, h) * points], device=device, dtype=dtype)


# Copying a list to a GPU blocks the host, so it is done only once for each set of shapes.
_cached_normalizer = functools.lru_cache(maxsize=64)(_normalizer)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension. On a CPU, transposing this short dimension makes it ten times faster."""
    if logits.device.type != "cpu":
        return logits.softmax(-1)
    rows = logits.flatten(0, -2)  # (..., N) -> (M, N)
    return rows.t().softmax(0).t().reshape(logits.shape)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, eq. 3) around :func:`ms_deform_attn`.

    For each head and level, a query samples ``n_points`` locations. The offset of each location from
    the reference point and its attention weight are linear functions of the query. Names, shapes and
    initial values of the parameters are those of Mask2Former, so its checkpoints can be loaded.

    Args:
        d_model: number of channels C of queries and values; a multiple of ``n_heads``.
        n_levels: number of feature levels L.
        n_heads: number of heads H.
        n_points: number of sampling points P per head and level.

    Raises:
        ValueError: ``d_model`` is not a multiple of ``n_heads``.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point j of head i starts in direction 2*pi*i/H at distance j+1 pixels; all attention weights are equal."""
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2.0 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (H, 2)
        direction = direction / direction.abs().max(-1, keepdim=True).values
        distance = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None, :] * distance[None, None, :, None]  # (H, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        spatial_shapes: list[tuple[int, int]],
        level_start: list[int],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query to the feature pyramid.

        Args:
            query: (B, Q, C).
            reference_points: (B, Q, L, 2) as (x, y) in [0, 1].
            input_flatten: (B, S, C), the levels concatenated along S.
            spatial_shapes: (height, width) of each level, as Python integers to avoid a device synchronization.
            level_start: row of ``input_flatten`` at which each level begins.
            padding_mask: (B, S), True for padding, whose value is set to zero; or None.

        Returns:
            (B, Q, C).

        Raises:
            ValueError: the number of levels is not ``n_levels``, or shapes do not match.
        """
        batch, queries, _ = query.shape
        heads, levels, points = self.n_heads, self.n_levels, self.n_points
        if len(spatial_shapes) != levels:
            raise ValueError(f"this layer has n_levels={levels}, got {len(spatial_shapes)} spatial shapes")
        value = self.value_proj(input_flatten)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        value = value.view(batch, -1, heads, self.d_model // heads)  # (B, S, C) -> (B, S, H, D)
        weights = self.attention_weights(query).view(batch, queries, heads, levels * points)
        weights = _softmax(weights).view(batch, queries, heads, levels, points)
        shapes = tuple((int(h), int(w)) for h, w in spatial_shapes)
        # Locations stay in float32 under autocast: bfloat16 has 8 bits of precision, too few to separate neighboring
        # pixels.
        exact = torch.promote_types(reference_points.dtype, torch.float32)
        make_normalizer = _normalizer if torch.compiler.is_compiling() else _cached_normalizer
        # Levels, points and (x, y) form one dimension, because short dimensions are slow on a CPU.
        offsets = self.sampling_offsets(query).view(batch, queries, heads, levels * points * 2)
        # (B, Q, L, 2) -> (B, Q, L*P, 2) -> (B, Q, 1, L*P*2)
        centers = reference_points.to(exact).repeat_interleave(points, dim=2).flatten(2)[:, :, None]
        locations = centers + offsets / make_normalizer(shapes, points, query.device, exact)
        locations = locations.view(batch, queries, heads, levels, points, 2)
        output = ms_deform_attn(value, list(shapes), list(level_start), locations, weights)
        return self.output_proj(output)
