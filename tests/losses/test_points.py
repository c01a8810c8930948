"""Points lie on valid pixels, and reading there is grid_sample's."""

import torch

from hiervl.losses.points import draw_valid_points, sample_maps


def test_sample_maps_is_grid_sample_with_clamped_borders():
    maps, points = torch.randn(2, 5, 7, 9, requires_grad=True), torch.rand(2, 40, 2) * 2.2 - 1.1
    expected = (
        torch.nn.functional.grid_sample(maps, points[:, :, None], padding_mode="border", align_corners=False)
        .squeeze(3)
        .transpose(1, 2)
    )
    own = sample_maps(maps, points)
    torch.testing.assert_close(own, expected)
    weight = torch.randn_like(own)
    torch.testing.assert_close(*(torch.autograd.grad((x * weight).sum(), maps)[0] for x in (own, expected)))


def test_points_are_drawn_uniformly_from_valid_pixels():
    weight = torch.zeros(2, 4, 5)
    weight[0, 1, 1:4] = 0.5
    weight[1, 3, 4] = 1
    index = draw_valid_points(weight, 3000)
    counts = torch.bincount(index[0], minlength=20)
    assert set(counts.nonzero()[:, 0].tolist()) == {6, 7, 8}
    assert counts[[6, 7, 8]].min() > 850
    assert (index[1] == 19).all()
