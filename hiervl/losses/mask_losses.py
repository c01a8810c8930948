"""Losses of masks and of class presence, each computed for many masks or classes at once."""

import torch
import torch.nn.functional as F


def sigmoid_ce_loss(logits, masks, weight):
    """Weighted mean binary cross-entropy over the points of each mask: all (T, P) -> (T,)."""
    loss = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return (loss * weight).sum(1) / weight.sum(1).clamp(min=1e-6)


def dice_loss(logits, masks, weight):
    """1 - dice over the points of each mask, with add-one smoothing: all (T, P) -> (T,)."""
    probability = logits.sigmoid() * weight
    return 1 - (2 * (probability * masks).sum(1) + 1) / (probability.sum(1) + (masks * weight).sum(1) + 1)


def balanced_presence_loss(logits, present, absent):
    """Binary cross-entropy of class presence, half of it from the present classes and half from the absent ones.

    That is half the mean of -log p over the present classes plus half the mean of -log(1 - p) over the absent ones. A
    class in neither set does not count.

    Args:
        logits: (..., B, V). present, absent: bool, (B, V) or broadcastable to the logits.
    Returns:
        (..., B).
    """
    positive = (F.softplus(-logits) * present).sum(-1) / present.sum(-1).clamp(min=1)
    negative = (F.softplus(logits) * absent).sum(-1) / absent.sum(-1).clamp(min=1)
    return (positive + negative) / 2


def uncertain_point_losses(logits, num_points, importance_ratio, segment_map, weight, image, segment):
    """Cross-entropy and dice loss of each mask at the points where it is least certain, and at random points.

    This is PointRend's sampling (arXiv 1912.08193) from candidates that all masks of an image share.

    Args:
        logits: (T, S), mask logits of T masks at the S candidate points of their images.
        num_points: number of points to use per mask. importance_ratio: share of them that are the least certain ones.
        segment_map: (B, S), segment ids at the candidates of each image.
        weight: (B, S), 0 where a candidate is not valid.
        image, segment: (T,), the image that each mask belongs to, and the id of the segment that it should be.
    Returns:
        two tensors (T,).
    """
    num_uncertain = int(importance_ratio * num_points)
    uncertain = logits.detach().abs().topk(num_uncertain, dim=1, largest=False, sorted=False).indices
    random = torch.randint(logits.shape[1], (len(logits), num_points - num_uncertain), device=logits.device)
    index = torch.cat((uncertain, random), dim=1)  # (T, num_points)
    logits, weight = logits.gather(1, index), weight[image[:, None], index]
    masks = (segment_map[image[:, None], index] == segment[:, None]).to(logits)
    return sigmoid_ce_loss(logits, masks, weight), dice_loss(logits, masks, weight)
