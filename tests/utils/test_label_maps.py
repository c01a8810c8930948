"""Connected components and boundaries of label maps, by brute force."""

import numpy as np
import pytest
import torch

from hiervl.utils.label_maps import connected_components, near_boundary


@pytest.mark.parametrize("width", [1, 2, 4])
def test_near_boundary_by_brute_force(width):
    labels, valid = torch.randint(0, 3, (2, 9, 12)), torch.rand(2, 9, 12) < 0.8
    labels[:, 3:] = 1  # an even area too
    near = near_boundary(labels, valid, width)
    for b, y, x in np.ndindex(*labels.shape):
        window = (b, slice(max(y - width, 0), y + width + 1), slice(max(x - width, 0), x + width + 1))
        expected = valid[b, y, x] and len(labels[window][valid[window]].unique()) > 1
        assert near[b, y, x] == expected, (b, y, x)


def test_components_touch_at_corners_and_have_an_area():
    labels = np.full((6, 8), -1)
    labels[0, 0] = labels[1, 1] = labels[2, 2] = 0  # one region, along a diagonal
    labels[0, 4:8] = labels[3:6, 4] = 2  # two regions of one label
    labels[5, 7] = 1  # too small
    found = list(connected_components(labels, min_area=3))
    assert [label for label, _ in found] == [0, 2, 2]
    assert sorted(int(mask.sum()) for _, mask in found) == [3, 3, 4]
    assert not np.logical_and.reduce([mask for _, mask in found]).any()
    assert all((labels[mask] == label).all() for label, mask in found)


def test_nothing_to_find():
    assert not list(connected_components(np.full((3, 3), -1), min_area=1))
