"""Padding to multiples, at the right and at the bottom."""

import torch

from hiervl.utils.padding import pad_to_multiple


def test_padding_is_at_the_right_and_bottom():
    maps = torch.rand(2, 5, 7)
    padded = pad_to_multiple(maps, 4, value=-1)
    assert padded.shape == (2, 8, 8)
    assert torch.equal(padded[:, :5, :7], maps)
    assert (padded[:, 5:] == -1).all() and (padded[:, :, 7:] == -1).all()


def test_a_size_that_fits_is_not_copied():
    maps = torch.rand(1, 3, 8, 4)
    assert pad_to_multiple(maps, 4) is maps
