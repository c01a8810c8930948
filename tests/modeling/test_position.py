"""Sine position embedding: its values, and its cache."""

import math

import torch

from hiervl.modeling.position import sine_position


def test_values():
    position = sine_position(3, 5, 8)
    assert position.shape == (8, 3, 5)
    y, x = 2 / 3 * 2 * math.pi, 4 / 5 * 2 * math.pi  # row 1, column 3; coordinates start at 1
    expected = [f(v / 10000 ** (i / 4)) for v in (y, x) for i in (0, 2) for f in (math.sin, math.cos)]
    torch.testing.assert_close(position[:, 1, 3], torch.tensor(expected), atol=1e-5, rtol=0)


def test_an_embedding_cached_in_inference_mode_can_be_used_in_training():
    with torch.inference_mode():
        sine_position(7, 3, 4)
    weight = torch.ones(4, 7, 3, requires_grad=True)
    (weight * sine_position(7, 3, 4)).sum().backward()
    torch.testing.assert_close(weight.grad, sine_position(7, 3, 4))
