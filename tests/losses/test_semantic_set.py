"""The losses of the semantic queries, by hand where every point of a mask has the same logit."""

import torch
import torch.nn.functional as F

from hiervl.losses.criterion import Normalizers
from hiervl.losses.points import SharedPoints
from hiervl.losses.semantic_set import assign_class_regions, rank_within_class, semantic_losses
from hiervl.losses.targets import build_targets

L, B, E, K, P = 2, 2, 3, 4, 30


def test_the_losses_equal_their_formulas():
    """Both images show class 0 everywhere; class 3 may hide in image 0."""
    unknown = torch.tensor([[False, False, False, True], [False] * 4])
    shares = torch.tensor([0.5, 1.0])
    targets = build_targets(
        torch.zeros(B, 8, 8, dtype=torch.long), torch.ones(B, 8, 8), K, image_weight=shares, unknown=unknown
    )
    points = SharedPoints.draw(targets, P)
    logits, presence = torch.randn(L, B, E, K), torch.randn(L, B, E, K)
    mask_logits = logits[..., None].expand(-1, -1, -1, -1, P)
    assignment = assign_class_regions(mask_logits, targets, points)
    normalizers = Normalizers(*torch.tensor([2.0, 12.0, 2.0, 2.0]))  # two images, two class regions
    losses = semantic_losses(presence, mask_logits, assignment, targets, points, normalizers, 0.5)

    expected = {"presence": 0, "region": 0, "region_dice": 0}
    for b in range(B):
        absent = [1, 2] if b == 0 else [1, 2, 3]
        own, others = logits[:, b, :, 0], logits[:, b][:, :, absent]
        share = shares[b] / (E * B)
        expected["region"] += share * (F.softplus(-own).sum() + F.softplus(others).mean(2).sum())
        probability, count = own.sigmoid(), P // E
        dice = 1 - (2 * count * probability + 1) / (count * probability + count + 1)
        expected["region_dice"] += share * dice.sum()
        is_present, is_absent = presence[:, b, :, 0], presence[:, b][:, :, absent]
        expected["presence"] += share * (F.softplus(-is_present).sum() + F.softplus(is_absent).mean(2).sum()) / 2
    torch.testing.assert_close(losses, expected)


def test_segments_are_ranked_within_their_class():
    assert rank_within_class(torch.tensor([2, 0, 2, 2, 0, 1])).tolist() == [0, 0, 1, 2, 1, 0]
