"""Connected components and boundaries of label maps, by brute force."""

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch

from hiervl.utils.label_maps import connected_components, near_boundary, region_areas

from tools.gpu_check.waits import Waits


@pytest.mark.parametrize("width", [1, 2, 4])
def test_near_boundary_by_brute_force(width):
    labels, valid = torch.randint(0, 3, (2, 9, 12)), torch.rand(2, 9, 12) < 0.8
    labels[:, 3:] = 1  # an even area too
    near = near_boundary(labels, valid, width)
    for b, y, x in np.ndindex(*labels.shape):
        window = (b, slice(max(y - width, 0), y + width + 1), slice(max(x - width, 0), x + width + 1))
        expected = valid[b, y, x] and len(labels[window][valid[window]].unique()) > 1
        assert near[b, y, x] == expected, (b, y, x)


def make_maps(batch=3, height=21, width=18, labels=4, cell=1):
    """Random maps in which about every fifth pixel or cell has no label."""
    cells = torch.randint(0, labels, (batch, -(-height // cell), -(-width // cell)))
    cells[torch.rand(cells.shape) < 0.2] = -1
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :height, :width]


def label_by_scipy(labels):
    """Regions of one (H, W) map, numbered from 1 through all labels."""
    regions = np.zeros(labels.shape, dtype=int)
    for label in np.unique(labels[labels >= 0]):
        found, _ = scipy.ndimage.label(labels == label, np.ones((3, 3)))
        regions[found > 0] = found[found > 0] + regions.max()
    return regions


def assert_same_regions(numbers, regions):
    pairs = np.unique(np.stack((numbers.ravel(), regions.ravel())), axis=1)
    assert len(pairs.T) == len(np.unique(numbers)) == len(np.unique(regions))
    assert ((numbers < 0) == (regions == 0)).all()


@pytest.mark.parametrize("size", [(21, 18), (32, 32), (1, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize(("labels", "cell"), [(1, 1), (2, 1), (40, 1), (4, 3)])
def test_components_by_scipy(size, labels, cell):
    maps = make_maps(4, *size, labels, cell)
    numbers, areas = connected_components(maps), region_areas(connected_components(maps))
    assert numbers.max() < size[0] * size[1]
    for image_labels, image_numbers, image_areas in zip(maps.numpy(), numbers.numpy(), areas):
        regions = label_by_scipy(image_labels)
        assert_same_regions(image_numbers, regions)
        assert image_areas.tolist() == np.where(regions > 0, np.bincount(regions.ravel())[regions], 0).tolist()


@pytest.mark.parametrize("size", [(20, 17), (17, 20)])
def test_components_of_a_label_are_numbered_in_the_order_of_opencv(size):
    maps = make_maps(8, *size, labels=6)
    for labels, numbers in zip(maps.numpy(), connected_components(maps).numpy()):
        for label in range(6):
            mask = labels == label
            _, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
            assert (np.unique(numbers[mask], return_inverse=True)[1] + 1 == regions[mask]).all()


def make_spiral(size):
    """A path from the corner to the center, one pixel wide as the gaps are."""
    labels, position, step = torch.full((size, size), -1), np.zeros(2, dtype=int), np.array((0, 1))
    labels[0, 0] = 0
    for length in (size - 1, *np.arange(size - 1, 0, -2).repeat(2)):
        for _ in range(length):
            position += step
            labels[tuple(position)] = 0
        step = np.array((step[1], -step[0]))
    return labels


def make_comb(size):
    labels = torch.full((size, size), -1)
    labels[:, ::2] = labels[-1] = 0
    return labels


def make_serpentine(size):
    labels = torch.full((size, size), -1)
    labels[:, ::2] = labels[0, 1::4] = labels[-1, 3::4] = 0
    return labels


def make_checkerboard(size):
    return torch.arange(size * size).view(size, size) % 2 ^ torch.arange(size)[:, None] % 2


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("make", [make_spiral, make_comb, make_serpentine, make_checkerboard])
def test_long_paths_are_joined_in_few_rounds(make, turns, monkeypatch):
    checks = []
    monkeypatch.setattr(torch, "equal", lambda a, b, equal=torch.equal: checks.append(equal(a, b)) or checks[-1])
    labels = make(128).rot90(turns)
    numbers = connected_components(labels[None])[0]
    assert_same_regions(numbers.numpy(), label_by_scipy(labels.numpy()))
    assert len(checks) <= 2  # log2(128 * 128) / 2 = 7 rounds


def test_the_host_waits_once_besides_the_checks():
    maps = make_maps(cell=3)
    with Waits() as waits:
        region_areas(connected_components(maps))
    assert waits.seen == ["nonzero", "equal"]
