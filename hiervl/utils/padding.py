"""Padding of images and label maps to the sizes that a network takes."""

import torch
import torch.nn.functional as F


def pad_to_multiple(maps: torch.Tensor, divisor: int, value: float = 0.0) -> torch.Tensor:
    """Pad (..., H, W) with `value` at the right and bottom to multiples of `divisor`."""
    height, width = maps.shape[-2:]
    if height % divisor == 0 and width % divisor == 0:
        return maps
    return F.pad(maps, (0, -width % divisor, 0, -height % divisor), value=value)


def run_backbone(backbone, images: torch.Tensor, size) -> dict:
    """Features of padded images (B, 3, H, W).

    Args:
        size: (height, width) of the images before padding. A backbone with the attribute `skips_padding` takes it as a
            second argument and spends no time on what lies beyond; the shapes of its features are the same.
    """
    return backbone(images, size) if getattr(backbone, "skips_padding", False) else backbone(images)
