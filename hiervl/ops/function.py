"""Entry point of the operator: checks the arguments and selects the implementation."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .extension import has_kernel
from .reference import ms_deform_attn_reference

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_reference_only = False


@contextlib.contextmanager
def reference_path() -> Iterator[None]:
    """Context manager that forces the PyTorch path even if a kernel is built, for comparisons."""
    global _reference_only
    previous, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = previous


def _check(value: Tensor, shapes: Sequence, starts: Sequence, locations: Tensor, weights: Tensor) -> None:
    """Raise TypeError or ValueError with a one-line message that names the argument."""
    for name, tensor in (("value", value), ("sampling_locations", locations), ("attention_weights", weights)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")
    if value.dim() != 4:
        raise ValueError(f"value must be (B, S, H, D), got {tuple(value.shape)}")
    if locations.dim() != 6 or locations.shape[5] != 2:
        raise ValueError(f"sampling_locations must be (B, Q, H, L, P, 2), got {tuple(locations.shape)}")
    if len(shapes) != len(starts):
        raise ValueError(f"{len(shapes)} spatial shapes, but {len(starts)} level starts")
    batch, rows, heads, _ = value.shape
    if (locations.shape[0], locations.shape[2], locations.shape[3]) != (batch, heads, len(shapes)):
        raise ValueError(
            f"sampling_locations {tuple(locations.shape)} does not fit B={batch}, H={heads}, L={len(shapes)}"
        )
    if weights.shape != locations.shape[:5]:
        raise ValueError(f"attention_weights must be {tuple(locations.shape[:5])}, got {tuple(weights.shape)}")
    for level, ((height, width), start) in enumerate(zip(shapes, starts, strict=True)):
        if min(height, width, start) < 0 or start + height * width > rows:
            raise ValueError(f"level {level} ({height}x{width} from row {start}) does not fit into {rows} rows")


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    level_start: Sequence[int] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention: a weighted sum of bilinear samples from a feature pyramid.

    Location (0, 0) is the top left corner of the top left pixel of a level, and (1, 1) the bottom
    right corner of the bottom right pixel; the value outside is zero. Sums are accumulated in at
    least float32. Locations and weights may have a different float type than ``value`` (under
    autocast they stay float32); their gradients have the same type as they do.

    Args:
        value: (B, S, H, D), float32, float64, float16 or bfloat16; the levels are concatenated along S.
        spatial_shapes: (height, width) of each of the L levels. A tensor (L, 2) is accepted, but
            reading it from a GPU synchronizes with the device.
        level_start: row of ``value`` at which each level begins.
        sampling_locations: (B, Q, H, L, P, 2) as (x, y) in [0, 1].
        attention_weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H*D), of the same type as ``value``.

    Raises:
        TypeError: an argument does not have one of the four float types.
        ValueError: shapes or devices do not match.
    """
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = [tuple(shape) for shape in spatial_shapes.tolist()]
    if isinstance(level_start, Tensor):
        level_start = level_start.tolist()
    _check(value, spatial_shapes, level_start, sampling_locations, attention_weights)
    if _reference_only or not has_kernel(value.device.type):
        return ms_deform_attn_reference(value, spatial_shapes, level_start, sampling_locations, attention_weights)
    sizes = [size for shape in spatial_shapes for size in shape]
    return torch.ops.hiervl.ms_deform_attn(value, sizes, level_start, sampling_locations, attention_weights)
