"""The training loss of one set of images, labelled or pseudo-labelled (DESIGN section 2, "Criterion").

Instance queries are matched to segments; every prediction of the decoder is supervised. Validity is a weight per
pixel: a mask logit whose bilinear support holds no valid pixel gets exactly zero gradient.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from .inference import ClassScores
from .matcher import HungarianMatcher
from .points import draw_valid_points, pixel_centers, sample_maps
from .targets import Targets


@dataclass
class Normalizers:
    """Denominators of the losses; sum them over micro-batches and ranks before use."""

    masks: torch.Tensor
    queries: torch.Tensor
    images: torch.Tensor

    def stack(self) -> torch.Tensor:
        return torch.stack((self.masks, self.queries, self.images))

    @classmethod
    def unstack(cls, values: torch.Tensor) -> "Normalizers":
        return cls(*values.unbind(0))


def sigmoid_ce_loss(logits, masks, weight):
    """Per mask: weighted mean binary cross-entropy over points; all (T, P) -> (T,)."""
    loss = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return (loss * weight).sum(1) / weight.sum(1).clamp(min=1e-6)


def dice_loss(logits, masks, weight):
    """Per mask: 1 - dice over points, add-one smoothed; all (T, P) -> (T,)."""
    probability = logits.sigmoid() * weight
    return 1 - (2 * (probability * masks).sum(1) + 1) / (probability.sum(1) + (masks * weight).sum(1) + 1)


class Criterion(nn.Module):
    """See the module's docstring.

    Args:
        matcher: assigns queries to segments.
        class_weight, mask_weight, dice_weight, pixel_weight: weights of the four losses.
        no_object_weight: weight of an unmatched query in the class loss.
        num_points: points per image and mask; oversample_ratio and importance_ratio choose among them those where
            the mask is least certain (PointRend, arXiv 1912.08193).
        deep_supervision: supervise every prediction, not the last only.
    """

    @configurable
    def __init__(self, *, matcher, class_weight, mask_weight, dice_weight, pixel_weight, no_object_weight,
                 num_points, oversample_ratio, importance_ratio, deep_supervision):
        super().__init__()
        self.matcher = matcher
        self.weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight, "pixel": pixel_weight}
        self.no_object_weight = no_object_weight
        self.num_points = num_points
        self.oversample_ratio, self.importance_ratio = oversample_ratio, importance_ratio
        self.deep_supervision = deep_supervision

    @classmethod
    def from_config(cls, cfg):
        c = cfg.MODEL.CRITERION
        return {"matcher": HungarianMatcher(c.CLASS_WEIGHT, c.MASK_WEIGHT, c.DICE_WEIGHT),
                "class_weight": c.CLASS_WEIGHT, "mask_weight": c.MASK_WEIGHT, "dice_weight": c.DICE_WEIGHT,
                "pixel_weight": c.PIXEL_WEIGHT, "no_object_weight": c.NO_OBJECT_WEIGHT,
                "num_points": c.NUM_POINTS, "oversample_ratio": c.OVERSAMPLE_RATIO,
                "importance_ratio": c.IMPORTANCE_RATIO, "deep_supervision": c.DEEP_SUPERVISION}

    def normalizers(self, targets: Targets, num_queries: int) -> Normalizers:
        """Denominators of these targets: segments, weighted queries, images."""
        matched = targets.weight.new_tensor([min(count, num_queries) for count in targets.counts])
        unmatched = self.no_object_weight * targets.no_object_weight * (num_queries - matched)
        return Normalizers(matched.sum(), (matched + unmatched).sum(), matched.new_tensor(len(matched)))

    def forward(self, predictions, targets: Targets, scores: ClassScores, normalizers: Normalizers = None):
        """
        Args:
            predictions: the decoder's list of {"class_logits" (B, N, K+1), "mask_logits" (B, N, h, w)}.
            targets: of the same B images. scores: turns queries into class scores (for the pixel loss).
            normalizers: None for those of this batch alone.
        Returns:
            {"loss_class", "loss_mask", "loss_dice", "loss_pixel"}: weighted scalars, summed over predictions.
        """
        predictions = predictions if self.deep_supervision else predictions[-1:]
        class_logits = torch.stack([p["class_logits"] for p in predictions]).float()  # (L, B, N, K+1)
        mask_logits = torch.stack([p["mask_logits"] for p in predictions], dim=1).float()  # (B, L, N, h, w)
        if normalizers is None:
            normalizers = self.normalizers(targets, class_logits.shape[2])
        index, at_points = self._shared_points(mask_logits, targets)  # (B, P), (L, B, N, P)
        weight = targets.weight.flatten(1).gather(1, index)
        segments = targets.segments.flatten(1).gather(1, index)
        matched = self.matcher(class_logits, at_points, segments, weight, targets.labels)
        losses = {"class": self._class_loss(class_logits, targets, matched, normalizers),
                  **self._mask_losses(mask_logits, targets, matched, normalizers),
                  "pixel": self._pixel_loss(class_logits, at_points, targets, index, weight, scores, normalizers)}
        return {f"loss_{name}": self.weights[name] * value for name, value in losses.items()}

    def _shared_points(self, mask_logits, targets):
        """Uniform valid points, shared by all queries and predictions of an image (matching and pixel loss)."""
        index = draw_valid_points(targets.weight, self.num_points)
        points = pixel_centers(index, *targets.weight.shape[1:])
        values = sample_maps(mask_logits.flatten(1, 2), points)  # (B, L*N, P)
        return index, values.unflatten(1, mask_logits.shape[1:3]).transpose(0, 1)

    def _class_loss(self, class_logits, targets, matched, normalizers):
        """Cross-entropy over classes and "no object".

        An unmatched query of a pseudo-labelled image says nothing about classes that may hide in rejected pixels:
        they leave its softmax, so that their logits get no gradient.
        """
        layer, image, query, segment = matched
        num_classes = class_logits.shape[-1] - 1
        target = torch.full(class_logits.shape[:3], num_classes, device=class_logits.device)
        classes = torch.nn.utils.rnn.pad_sequence(targets.labels, batch_first=True)  # (B, max M)
        target[layer, image, query] = classes[image, segment]
        unmatched = target == num_classes  # (L, B, N)
        unknown = F.pad(targets.unknown, (0, 1))[None, :, None] & unmatched[..., None]
        loss = F.cross_entropy(class_logits.masked_fill(unknown, -torch.inf).movedim(-1, 1), target,
                               reduction="none")
        no_object = self.no_object_weight * targets.no_object_weight[None, :, None]
        weight = torch.where(unmatched, no_object, 1.0) * targets.image_weight[None, :, None]
        return (loss * weight).sum() / normalizers.queries.clamp(min=1e-6)

    def _mask_losses(self, mask_logits, targets, matched, normalizers):
        layer, image, query, segment = matched
        masks = mask_logits[image, layer, query][:, None]  # (T, 1, h, w)
        index = self._uncertain_points(masks, targets.weight, image)  # (T, P)
        logits = sample_maps(masks, pixel_centers(index, *targets.weight.shape[1:]))[:, 0]
        truth = (targets.segments.flatten(1)[image[:, None], index] == segment[:, None]).to(logits)
        weight = targets.weight.flatten(1)[image[:, None], index]
        image_weight = targets.image_weight[image]
        denominator = normalizers.masks.clamp(min=1)
        return {"mask": (sigmoid_ce_loss(logits, truth, weight) * image_weight).sum() / denominator,
                "dice": (dice_loss(logits, truth, weight) * image_weight).sum() / denominator}

    @torch.no_grad()
    def _uncertain_points(self, masks, weight, image):
        """Per mask, the least certain of the image's candidates and some random ones: (T, P) pixel indices."""
        chosen = int(self.importance_ratio * self.num_points)
        candidates = draw_valid_points(weight, int(self.oversample_ratio * self.num_points))[image]  # (T, 3P)
        certainty = sample_maps(masks, pixel_centers(candidates, *weight.shape[1:]))[:, 0].abs()
        best = certainty.topk(chosen, dim=1, largest=False, sorted=False).indices
        random = draw_valid_points(weight, self.num_points - chosen)[image]
        return torch.cat((candidates.gather(1, best), random), dim=1)

    def _pixel_loss(self, class_logits, at_points, targets, index, weight, scores, normalizers):
        """-log p of the true class at the shared points: what makes p a probability."""
        evidence = scores(class_logits, at_points)  # (L, B, K, P)
        label = targets.sem_seg.flatten(1).gather(1, index)  # (B, P)
        own = evidence.gather(2, label[None, :, None].expand(len(evidence), -1, 1, -1))[:, :, 0]
        loss = torch.log(scores.epsilon + evidence.sum(2)) - torch.log(own.clamp(min=1e-8))  # (L, B, P)
        per_image = (loss * weight).sum(-1) / weight.sum(-1).clamp(min=1e-6)
        return (per_image * targets.image_weight).sum() / normalizers.images
