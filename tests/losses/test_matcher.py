"""Costs equal the losses they stand for, assignments are the best ones, and what is not finite is never matched."""

import itertools

import torch

from hiervl.losses.mask_losses import dice_loss, sigmoid_ce_loss
from hiervl.losses.matcher import HungarianMatcher, dice_cost, sigmoid_ce_cost

K, N, P = 4, 6, 100


def problem(segments=3):
    """Class logits (1, 1, N, K+1), mask logits (1, 1, N, P), segments (1, P), validity (1, P), labels."""
    return (
        torch.randn(1, 1, N, K + 1),
        torch.randn(1, 1, N, P),
        torch.randint(segments, (1, P)),
        torch.rand(1, P),
        [torch.randint(K, (segments,))],
    )


def test_costs_are_the_losses_of_every_pair():
    _, masks, segments, weight, labels = problem()
    logits, truth = masks[0, 0], (segments == torch.arange(3)[:, None]).float()
    pairs = list(itertools.product(range(N), range(3)))
    first, second = (torch.stack([x[i] for i in part]) for x, part in zip((logits, truth), zip(*pairs)))
    rows = weight.expand(len(pairs), -1)
    costs = sigmoid_ce_cost(logits, truth, weight[0])
    torch.testing.assert_close(costs.flatten(), sigmoid_ce_loss(first, second, rows))
    torch.testing.assert_close(dice_cost(logits, truth, weight[0]).flatten(), dice_loss(first, second, rows))


def test_the_assignment_is_the_cheapest():
    matcher, (classes, masks, segments, weight, labels) = HungarianMatcher(2.0, 5.0, 5.0), problem()
    cost = matcher._cost(classes[:, 0], masks[:, 0], segments[0], weight[0], labels[0])[0]
    best = min(itertools.permutations(range(N), 3), key=lambda queries: sum(cost[q, s] for s, q in enumerate(queries)))
    layer, image, query, segment, counts = matcher(classes, masks, segments, weight, labels)
    assert torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).equal(image)
    assert {int(s): int(q) for q, s in zip(query, segment)} == dict(enumerate(best))
    assert layer.tolist() == image.tolist() == [0, 0, 0]


def test_more_segments_than_queries():
    matched = HungarianMatcher(2.0, 5.0, 5.0)(*problem(segments=9))
    assert sorted(matched[2].tolist()) == list(range(N)) and len(set(matched[3].tolist())) == N


def test_non_finite_costs_are_never_matched():
    classes, masks, segments, weight, labels = problem(segments=4)
    masks[0, 0, 2] = float("nan")
    classes[0, 0, 4, labels[0][1]] = float("inf")
    matched = HungarianMatcher(2.0, 5.0, 5.0)(classes, masks, segments, weight, labels)
    assert set(matched[2].tolist()) <= {0, 1, 3, 5} and len(matched[2]) == 4


def test_a_segment_whose_every_pair_is_forbidden_stays_unmatched():
    classes, masks, segments, weight, labels = problem(segments=3)
    allowed = torch.ones(N, 3, dtype=torch.bool)
    allowed[:, 1] = False
    matched = HungarianMatcher(2.0, 5.0, 5.0)(classes, masks, segments, weight, labels, [allowed])
    assert sorted(matched[3].tolist()) == [0, 2]
