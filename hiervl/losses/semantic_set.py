"""Losses of the semantic queries: E of them for every selected class (docs/how-it-works.md, "Criterion").

What each query means is decided by an assignment. `assign_class_regions`: every query of a class means the class's
whole region. `match_within_class`: the E queries of a class share its segments by Hungarian matching.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .mask_losses import balanced_presence_loss, uncertain_point_losses
from .points import SharedPoints
from .targets import Targets


@dataclass
class Assignment:
    """What the semantic queries of L decoder layers stand for in B images.

    Attributes:
        positive, negative: (L, B, E, K') bool, queries with a region and queries that must be empty; a query in
            neither gets no target.
        index: (layer, image, scale, class), four int64 tensors (T,): the positive queries.
        segment: (T,) int64, the id of each one's region in `segment_map`.
        segment_map: (B, P) int64, region ids at the points. weight: (B, P), validity of the points.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    index: tuple
    segment: torch.Tensor
    segment_map: torch.Tensor
    weight: torch.Tensor


def assign_class_regions(mask_logits, targets: Targets, points: SharedPoints) -> Assignment:
    """All E queries of a class mean its whole region. mask_logits: (L, B, E, K', P)."""
    positive = targets.present[None, :, None].expand(mask_logits.shape[:4])
    index = _true_positions(positive, targets.num_present)
    return Assignment(positive, targets.absent[None, :, None], index, index[3], points.label, points.weight)


def _true_positions(mask, counts) -> tuple:
    """`mask.nonzero(as_tuple=True)` of mask (L, B, E, K'), whose rows over K' hold counts[b] true values in image b.

    The host knows how many positions there are, so it does not have to wait for the device to count them.
    """
    num_layers, _, num_scales, _ = mask.shape
    first = torch.argsort(mask.to(torch.uint8), dim=3, descending=True, stable=True)  # true positions, ascending
    selected = [first[:, b, :, :count] for b, count in enumerate(counts)]  # (L, E, count) per image
    parts = torch.cat([part.flatten(1) for part in selected], dim=1)  # (L, T / L), rows image by image
    scale = torch.arange(num_scales, device=mask.device)
    scales = torch.cat([scale.repeat_interleave(count) for count in counts])
    images = torch.arange(len(counts), device=mask.device)
    image = torch.cat([images[b : b + 1].expand(num_scales * count) for b, count in enumerate(counts)])
    layer = torch.arange(num_layers, device=mask.device).repeat_interleave(parts.shape[1])
    return layer, image.repeat(num_layers), scales.repeat(num_layers), parts.flatten()


def match_within_class(mask_logits, targets: Targets, points: SharedPoints, matcher) -> Assignment:
    """The E queries of a class are matched with its E largest segments. Points of surplus segments are ignored.

    mask_logits: (L, B, E, K', P).
    """
    num_scales, num_classes = mask_logits.shape[2:4]
    query_class = torch.arange(num_classes, device=mask_logits.device).repeat(num_scales)  # (E*K',)
    allowed, weight = [], points.weight.clone()
    for b, labels in enumerate(targets.labels):
        surplus = rank_within_class(labels) >= num_scales  # (M,); segments are sorted by size
        allowed.append((query_class[:, None] == labels) & ~surplus)
        # Index -1, of a point without a segment, reads the False at the end.
        weight[b] *= ~F.pad(surplus, (0, 1))[points.segment[b]]
    layer, image, query, segment, _ = matcher(
        None, mask_logits.flatten(2, 3), points.segment, weight, targets.labels, allowed
    )
    index = layer, image, query // num_classes, query % num_classes
    positive = torch.zeros(mask_logits.shape[:4], dtype=torch.bool, device=mask_logits.device)
    positive[index] = True
    negative = ~positive & ~(targets.unknown | targets.unassigned)[None, :, None]
    return Assignment(positive, negative, index, segment, points.segment, weight)


def rank_within_class(labels: torch.Tensor) -> torch.Tensor:
    """Rank of each segment among those of its class, from 0: classes (M,) -> (M,)."""
    return ((labels[:, None] == labels).tril().sum(1) - 1) if len(labels) else labels


def semantic_losses(presence_logits, mask_logits, assignment: Assignment, targets, points, normalizers, ratio) -> dict:
    """Presence of each query's region, the masks of the positive queries, and empty masks of the negative ones.

    Args:
        presence_logits: (L, B, E, K'). mask_logits: (L, B, E, K', P), at the points.
        ratio: share of a mask's points that are the least certain ones.
    Returns:
        {"presence", "region", "region_dice"}: means over queries and images, summed over layers.
    """
    num_scales = mask_logits.shape[2]
    num_points = max(mask_logits.shape[-1] // num_scales, 1)  # the E masks of a class share as many as one mask has
    positive, negative, image = assignment.positive, assignment.negative, assignment.index[1]
    per_image = balanced_presence_loss(  # (L, E, B)
        presence_logits.transpose(1, 2), positive.transpose(1, 2), negative.transpose(1, 2)
    )
    mask, dice = uncertain_point_losses(
        mask_logits[assignment.index],
        num_points,
        ratio,
        assignment.segment_map,
        assignment.weight,
        image,
        assignment.segment,
    )
    share = targets.image_weight[image] / (num_scales * normalizers.regions.clamp(min=1))  # (T,)
    # (L, B, E, K', P) -> (L, E, K', B, P) -> mean over points (L, E, K', B) -> (L, B, E, K')
    empty = points.mean(F.softplus(mask_logits).permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2)
    empty = (empty * negative).sum(3) / negative.sum(3).clamp(min=1)  # (L, B, E)
    per_scale = targets.image_weight / (num_scales * normalizers.images.clamp(min=1))  # (B,)
    region = (mask * share).sum() + (empty * per_scale[:, None]).sum()
    return {"presence": (per_image * per_scale).sum(), "region": region, "region_dice": (dice * share).sum()}
