"""Regions and boundaries of label maps."""

from collections.abc import Iterator

import cv2
import numpy as np
import torch
import torch.nn.functional as F


def connected_components(labels: np.ndarray, min_area: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (label, mask (H, W) bool) of every 8-connected region of one label with at least `min_area` pixels.

    Args:
        labels: (H, W) integers; negative ones belong to no region.
    """
    for label in np.unique(labels[labels >= 0]):
        _, regions, stats, _ = cv2.connectedComponentsWithStats((labels == label).astype(np.uint8), connectivity=8)
        for region in range(1, len(stats)):  # region 0 is everything else
            if stats[region, cv2.CC_STAT_AREA] >= min_area:
                yield int(label), regions == region


def near_boundary(labels: torch.Tensor, valid_mask: torch.Tensor, width: int) -> torch.Tensor:
    """Valid pixels that have a valid pixel of another label within `width` pixels, in a square window.

    Args:
        labels: (B, H, W) integers. valid_mask: (B, H, W) bool; other pixels make no boundary.
    Returns:
        (B, H, W) bool.
    """
    labels, valid_mask = labels[:, None].float(), valid_mask[:, None]
    highest = _window_max(labels.masked_fill(~valid_mask, -torch.inf), width)
    lowest = -_window_max((-labels).masked_fill(~valid_mask, -torch.inf), width)
    return ((highest != lowest) & valid_mask)[:, 0]


def _window_max(maps, width):
    """Maximum of (B, 1, H, W) over a square window, one direction after the other."""
    rows = F.max_pool2d(maps, (2 * width + 1, 1), stride=1, padding=(width, 0))
    return F.max_pool2d(rows, (1, 2 * width + 1), stride=1, padding=(0, width))
