"""Sine position embedding over an image grid (DETR), normalized and scaled to 2*pi as in Mask2Former."""

import functools
import math

import torch

_TEMPERATURE = 10000.0


def sine_position(height: int, width: int, dim: int, device=None) -> torch.Tensor:
    """Return (dim, height, width): the first half of the channels encodes y, the second half x.

    The result is cached for the next image of the same size, so callers must not modify it in place.
    """
    # torch.compile has to trace the computation itself; it cannot trace through the cache.
    if torch.compiler.is_compiling():
        return _sine_position(height, width, dim, device)
    return _cached_sine_position(height, width, dim, device)


def _sine_position(height, width, dim, device):
    half = dim // 2
    # A tensor created in inference mode cannot take part in autograd, so a cached one would break later training.
    with torch.inference_mode(False):
        scale = _TEMPERATURE ** (2 * torch.div(torch.arange(half, device=device), 2, rounding_mode="floor") / half)

        def encode(length):
            # (length,) -> (length, half); coordinates 1..length are scaled to (0, 2*pi].
            position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
            angle = (position / (length + 1e-6) * 2 * math.pi)[:, None] / scale  # (length, half)
            return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)

        y = encode(height)[:, None, :].expand(height, width, half)
        x = encode(width)[None, :, :].expand(height, width, half)
        return torch.cat((y, x), dim=2).permute(2, 0, 1)


_cached_sine_position = functools.lru_cache(maxsize=8)(_sine_position)  # enough for the levels of two image sizes
