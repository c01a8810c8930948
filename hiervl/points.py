"""Points at which the losses look at the masks.

Mask2Former draws points anywhere on the canvas, so that ignored and padded pixels become negatives. Here every
point is the centre of a valid label pixel, and a label is read there without interpolation.
"""
import torch
import torch.nn.functional as F


def draw_valid_points(weight: torch.Tensor, num_points: int) -> torch.Tensor:
    """Draw pixel indices uniformly, with replacement, from the pixels of positive weight.

    Args:
        weight: (B, H, W). Returns: (B, num_points) int64, indices into H*W. An image without a valid pixel gets
        arbitrary ones; their weight is 0 wherever it is used.
    """
    seen = (weight > 0).flatten(1).cumsum(dim=1)  # (B, H*W), number of valid pixels up to here
    total = seen[:, -1:]
    nth = (torch.rand(len(weight), num_points, device=weight.device) * total).long().minimum(total - 1) + 1
    return torch.searchsorted(seen, nth.clamp(min=1)).clamp(max=seen.shape[1] - 1)


def pixel_centers(index: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixel indices (..., P) -> centres (..., P, 2) as (x, y) in [-1, 1], grid_sample's coordinates."""
    x = (index % width + 0.5) / width
    y = (torch.div(index, width, rounding_mode="floor") + 0.5) / height
    return torch.stack((x, y), dim=-1) * 2 - 1


def sample_maps(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear values of maps (B, C, h, w) at points (B, P, 2) -> (B, C, P).

    Borders are clamped, as F.interpolate does at inference, so that training and inference see the same value.
    """
    return F.grid_sample(maps, points[:, :, None], mode="bilinear", padding_mode="border",
                         align_corners=False).squeeze(3)
