"""Losses of masks: where they look, and that classes decide between equal masks."""

import torch
import torch.nn.functional as F

from hiervl.losses.mask_losses import uncertain_point_losses
from hiervl.losses.matcher import HungarianMatcher


def test_the_least_certain_points_are_chosen():
    logits = torch.tensor([[9.0, -8.0, 0.5, 7.0]])
    segment_map, weight = torch.tensor([[0, 1, 0, 1]]), torch.ones(1, 4)
    image = segment = torch.zeros(1, dtype=torch.long)
    ce, _ = uncertain_point_losses(logits, 1, 1.0, segment_map, weight, image, segment)
    torch.testing.assert_close(ce, F.softplus(-logits[0, 2:3]))


def test_of_equal_masks_the_likelier_class_wins():
    class_logits = torch.zeros(1, 1, 2, 3)
    class_logits[0, 0, 0, 1] = class_logits[0, 0, 1, 0] = 4.0  # query 0 is class 1, query 1 is class 0
    masks = torch.zeros(1, 1, 2, 6)
    segments, weight = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.ones(1, 6)
    matched = HungarianMatcher(2.0, 5.0, 5.0)(class_logits, masks, segments, weight, [torch.tensor([0, 1])])
    assert sorted(zip(matched[2].tolist(), matched[3].tolist())) == [(0, 1), (1, 0)]
