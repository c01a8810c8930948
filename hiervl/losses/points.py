"""Points at which the losses compare masks.

Mask2Former draws points anywhere on the canvas, so that ignored and padded pixels become negatives. Here every
point is the center of a valid label pixel, and a label is read there without interpolation.
"""

from dataclasses import dataclass, fields

import torch

from ..ops import ms_deform_attn
from .targets import Targets


@dataclass
class SharedPoints:
    """Points of B images that all losses share: drawn uniformly from the valid pixels, so that any part of them is
    a uniform draw too.

    Attributes:
        index: (B, S) pixel indices. point_coords: (B, S, 2), their centers. weight: (B, S) validity.
        label, segment: (B, S), class and segment at each point.
    """

    index: torch.Tensor
    point_coords: torch.Tensor
    weight: torch.Tensor
    label: torch.Tensor
    segment: torch.Tensor

    @classmethod
    def draw(cls, targets: Targets, num_points: int) -> "SharedPoints":
        index = draw_valid_points(targets.weight, num_points)
        values = (maps.flatten(1).gather(1, index) for maps in (targets.weight, targets.sem_seg, targets.segments))
        return cls(index, pixel_centers(index, *targets.weight.shape[1:]), *values)

    def first(self, count: int) -> "SharedPoints":
        """The first `count` points of each image."""
        return SharedPoints(*(getattr(self, field.name)[:, :count] for field in fields(self)))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Weighted mean over the points: (..., B, S) -> (..., B); 0 for an image without a valid one."""
        return (values * self.weight).sum(-1) / self.weight.sum(-1).clamp(min=1e-6)


def draw_valid_points(weight: torch.Tensor, num_points: int) -> torch.Tensor:
    """Draw pixel indices uniformly, with replacement, from the pixels of positive weight.

    Args:
        weight: (B, H, W).
    Returns:
        (B, num_points) int64, indices into H*W; arbitrary ones, of weight 0, in an image without a valid pixel.
    """
    num_valid = (weight > 0).flatten(1).cumsum(dim=1)  # (B, H*W), valid pixels so far, in raster order
    total = num_valid[:, -1:]
    nth = (torch.rand(len(weight), num_points, device=weight.device) * total).long().minimum(total - 1) + 1
    return torch.searchsorted(num_valid, nth.clamp(min=1)).clamp(max=num_valid.shape[1] - 1)


def pixel_centers(index: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixel indices (..., P) -> centers (..., P, 2) as (x, y) in [-1, 1], grid_sample's coordinates."""
    x = (index % width + 0.5) / width
    y = (torch.div(index, width, rounding_mode="floor") + 0.5) / height
    return torch.stack((x, y), dim=-1) * 2 - 1


def sample_maps(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear values of maps (B, C, h, w) at points (B, P, 2) -> (B, P, C).

    Borders are clamped, as F.interpolate does at inference, so that training and inference see the same value. It is
    the deformable attention kernel with one place per query: on a CPU several times faster than grid_sample, since it
    moves whole rows of channels (docs/PERFORMANCE.md).
    """
    height, width = maps.shape[-2:]
    half = points.new_tensor([0.5 / width, 0.5 / height])
    location = ((points + 1) / 2).maximum(half).minimum(1 - half)[:, :, None, None, None]  # (B, P, 1, 1, 1, 2)
    value = maps.flatten(2).transpose(1, 2)[:, :, None]  # (B, h*w, 1, C)
    return ms_deform_attn(value, [(height, width)], [0], location, torch.ones_like(location[..., 0]))
