"""Regions and boundaries of label maps."""

import torch
import torch.nn.functional as F

ROUNDS_PER_CHECK = 4  # to ask whether all regions are whole, the host has to wait for the device


def connected_components(labels: torch.Tensor) -> torch.Tensor:
    """Number the 8-connected regions of one label, on the labels' device.

    A region has the number of its first pixel. Pixels are counted as OpenCV reads a mask to find its components: two
    rows at once, column by column.

    Args:
        labels: (B, H, W) integers; pixels with a negative label belong to no region.
    Returns:
        (B, H, W) int64, numbers from 0..H*W-1, unique within the image but not consecutive; -1 for no region.
    """
    batch, height, width = labels.shape
    starts = torch.ones_like(labels, dtype=torch.bool)  # of runs: pixels of one label, side by side
    starts[..., 1:] = labels[..., 1:] != labels[..., :-1]
    row = torch.arange(height, device=labels.device)[:, None]
    column = torch.where(starts, torch.arange(width, device=labels.device), 0).cummax(2).values  # where the run starts
    number = (row - row % 2) * width + (height - row + row % 2).clamp(max=2) * column + row % 2
    image = torch.arange(batch, device=labels.device)[:, None, None] * (height * width)
    run = number + image
    first = _join(*_touching_runs(labels, starts, run), run.numel())
    return torch.where(labels >= 0, first.index_select(0, run.flatten()).view_as(run) - image, -1)


def _touching_runs(labels, starts, run):
    """Runs of one label in adjacent rows that touch, each pair once.

    Args:
        labels, starts, run: (B, H, W), the label, whether a run starts here, the number of the pixel's run.
    Returns:
        two tensors (E,), runs and runs below them.
    """
    above, below = labels[:, :-1], labels[:, 1:]
    # Runs overlap from the column on in which the later one starts. Of runs that touch at a corner without overlapping,
    # one ends and the other starts there.
    corner = (starts[:, :-1] & starts[:, 1:])[..., 1:]
    down, right, left = touch = torch.zeros(3, *labels.shape, dtype=torch.bool, device=labels.device)
    down[:, :-1] = (above == below) & (starts[:, :-1] | starts[:, 1:])
    right[:, :-1, :-1] = (above[..., :-1] == below[..., 1:]) & corner
    left[:, :-1, 1:] = (above[..., 1:] == below[..., :-1]) & corner
    direction, pixel = touch.flatten(1).nonzero(as_tuple=True)
    beneath = pixel + labels.shape[2] + (direction == 1).long() - (direction == 2).long()
    return run.flatten().index_select(0, pixel), run.flatten().index_select(0, beneath)


def _join(a, b, size):
    """The lowest node that each node is connected to, after Shiloach and Vishkin (1982).

    Natural regions take about 4 rounds, spirals and other long paths of n nodes about log2(n) / 2.

    Args:
        a, b: (E,) int64, the ends of the edges, out of 0..size-1.
    Returns:
        (size,) int64.
    """
    parent = torch.arange(size, device=a.device)  # roots are their own; other parents are below their children
    ends = torch.cat((a, b))
    while True:
        for _ in range(ROUNDS_PER_CHECK):
            parents = parent.index_select(0, ends)
            lowest = torch.minimum(*parents.chunk(2)).repeat(2)
            parent.scatter_reduce_(0, parents, lowest, "amin")  # roots of joined trees hook onto the lower one
            for _ in range(2):  # jump to the grandparent: paths to the root halve
                parent.scatter_(0, ends, parent.index_select(0, parent.index_select(0, ends)))
        if torch.equal(*parent.index_select(0, ends).chunk(2)):
            return parent


def region_areas(numbers: torch.Tensor) -> torch.Tensor:
    """Area of each pixel's region, in pixels, 0 where there is none.

    Args:
        numbers: (B, H, W) int64, the number of the region within its image, below H*W; -1 for none.
    Returns:
        (B, H, W) int64.
    """
    index = numbers.flatten(1) + 1
    areas = torch.zeros(len(index), index.shape[1] + 1, dtype=torch.long, device=index.device)
    areas.scatter_add_(1, index, torch.ones_like(index))
    areas[:, 0] = 0
    return areas.gather(1, index).view_as(numbers)


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
