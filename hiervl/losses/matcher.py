"""Hungarian matching of queries to segments (DETR; costs as in Mask2Former), for all decoder layers and
images at once: one cost tensor per image, one transfer to the host."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from ..utils.transfer import to_device

_NEVER = 1e6  # cost of a pair whose true cost is not finite


class Matches(NamedTuple):
    """Matched pairs of B images, image after image.

    Attributes:
        prediction, image, query, segment: int64 tensors (T,), one entry per pair.
        counts: number of pairs of each image, known to the host without asking the device.
    """

    prediction: torch.Tensor
    image: torch.Tensor
    query: torch.Tensor
    segment: torch.Tensor
    counts: list


def sigmoid_ce_cost(logits: torch.Tensor, masks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean binary cross-entropy of every pair: (..., N, P), (M, P), (P,) -> (..., N, M).

    The cross-entropy of logit x and label y is softplus(x) - x * y: only the second part depends on the pair.
    """
    weight = weight / weight.sum().clamp(min=1e-6)
    return (F.softplus(logits) @ weight)[..., None] - logits @ (masks * weight).t()


def dice_cost(logits: torch.Tensor, masks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """1 - dice of every pair, add-one smoothed: (..., N, P), (M, P), (P,) -> (..., N, M)."""
    masks = masks * weight
    # One product for masks and weight, so that the probabilities are read once.
    sums = logits.sigmoid() @ torch.cat((masks, weight[None])).t()  # (..., N, M+1)
    overlap, total = 2 * sums[..., :-1], sums[..., -1:] + masks.sum(-1)
    return 1 - (overlap + 1) / (total + 1)


class HungarianMatcher:
    """
    Args:
        class_weight, mask_weight, dice_weight: weights of the three costs.
    """

    def __init__(self, class_weight: float, mask_weight: float, dice_weight: float):
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight

    @torch.no_grad()
    def __call__(self, class_logits, mask_logits, segments, weight, labels, allowed=None):
        """
        Args:
            class_logits: (L, B, N, K+1), of L predictions; None: classes cost nothing.
            mask_logits: (L, B, N, P), at P points of each image.
            segments: (B, P) int64, the segment at each point. weight: (B, P) validity.
            labels: B tensors (M_b,), the segments' classes.
            allowed: B tensors (N, M_b) bool, the pairs that may be; None: all.
        Returns:
            Matches. A pair whose cost is not finite is never matched.
        """
        costs, shapes = [], []
        for b, classes in enumerate(labels):
            cost = self._cost(
                None if class_logits is None else class_logits[:, b], mask_logits[:, b], segments[b], weight[b], classes
            )
            if allowed is not None:
                cost = cost.masked_fill(~allowed[b], torch.inf)
            costs.append(cost.flatten())
            shapes.append(cost.shape)
        host = torch.cat(costs).cpu().split([c.numel() for c in costs])
        pairs = [
            [(layer, b, q, s) for layer, matrix in enumerate(cost.numpy().reshape(shape)) for q, s in _assign(matrix)]
            for b, (cost, shape) in enumerate(zip(host, shapes))
        ]
        table = torch.tensor(sum(pairs, []), dtype=torch.long).view(-1, 4)
        return Matches(*to_device(table, mask_logits.device).unbind(1), counts=[len(of_image) for of_image in pairs])

    def _cost(self, class_logits, mask_logits, segments, weight, classes):
        """One image: (L, N, K+1) or None, (L, N, P), (P,), (P,), (M,) -> (L, N, M)."""
        masks = (segments[None] == torch.arange(len(classes), device=segments.device)[:, None]).to(mask_logits)
        cost = self.mask_weight * sigmoid_ce_cost(mask_logits, masks, weight) + self.dice_weight * dice_cost(
            mask_logits, masks, weight
        )
        return cost if class_logits is None else cost - self.class_weight * class_logits.softmax(-1)[..., classes]


def _assign(cost):
    """Array (N, M) -> list of (query, segment) of least total cost, without the pairs of non-finite cost."""
    finite = np.isfinite(cost)
    queries, segments = linear_sum_assignment(np.where(finite, cost, _NEVER))
    return [(q, s) for q, s in zip(queries.tolist(), segments.tolist()) if finite[q, s]]
