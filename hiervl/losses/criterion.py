"""The training loss of one kind of images, labeled or pseudo-labeled (docs/how-it-works.md, "Criterion").

Instance queries are matched to segments; semantic queries belong to their class (semantic_set.py). Every prediction of
the decoder is supervised. Validity is a weight per pixel: a position of the mask features whose bilinear support holds
no valid pixel gets exactly zero gradient. All classes here are selected classes (`Targets.restrict_to`).
"""

from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from ..utils.transfer import to_device
from .mask_losses import uncertain_point_losses
from .matcher import HungarianMatcher
from .points import SharedPoints, sample_maps
from .semantic_set import assign_class_regions, match_within_class, rank_within_class, semantic_losses
from .targets import Targets


@dataclass
class Normalizers:
    """Denominators of the losses; sum them over micro-batches and ranks before use."""

    masks: torch.Tensor
    queries: torch.Tensor
    images: torch.Tensor
    regions: torch.Tensor

    def stack(self) -> torch.Tensor:
        return torch.stack(astuple(self))

    @classmethod
    def unstack(cls, values: torch.Tensor) -> "Normalizers":
        return cls(*values.unbind(0))

    @classmethod
    def zero(cls, device) -> "Normalizers":
        return cls.unstack(torch.zeros(4, device=device))


class Criterion(nn.Module):
    """See the module's docstring.

    Args:
        matcher: assigns queries to segments.
        class_weight, mask_weight, dice_weight, pixel_weight, presence_weight: weights of the losses.
        no_object_weight: weight of an unmatched query in the class loss.
        num_points: points per image and mask, chosen from oversample_ratio times as many candidates; a share
            importance_ratio of them are those where the mask is least certain (PointRend, arXiv 1912.08193). All masks
            of an image share the candidates, so that its mask features are read once.
        deep_supervision: supervise every prediction, not the last only.
        match_semantic: the E queries of a class share its segments; otherwise each means the class's whole region.
        num_scales: E.
    """

    @configurable
    def __init__(
        self,
        *,
        matcher,
        class_weight,
        mask_weight,
        dice_weight,
        pixel_weight,
        presence_weight,
        no_object_weight,
        num_points,
        oversample_ratio,
        importance_ratio,
        deep_supervision,
        match_semantic=False,
        num_scales=3,
    ):
        super().__init__()
        self.matcher = matcher
        self.match_semantic, self.num_scales = match_semantic, num_scales
        self.weights = {
            "class": class_weight,
            "mask": mask_weight,
            "dice": dice_weight,
            "pixel": pixel_weight,
            "presence": presence_weight,
            "region": mask_weight,
            "region_dice": dice_weight,
        }
        self.no_object_weight = no_object_weight
        self.num_points = num_points
        self.oversample_ratio, self.importance_ratio = oversample_ratio, importance_ratio
        self.deep_supervision = deep_supervision

    @classmethod
    def from_config(cls, cfg, num_scales):
        c = cfg.MODEL.CRITERION
        return {
            "matcher": HungarianMatcher(c.CLASS_WEIGHT, c.MASK_WEIGHT, c.DICE_WEIGHT),
            "class_weight": c.CLASS_WEIGHT,
            "mask_weight": c.MASK_WEIGHT,
            "dice_weight": c.DICE_WEIGHT,
            "pixel_weight": c.PIXEL_WEIGHT,
            "presence_weight": c.PRESENCE_WEIGHT,
            "no_object_weight": c.NO_OBJECT_WEIGHT,
            "num_points": c.NUM_POINTS,
            "oversample_ratio": c.OVERSAMPLE_RATIO,
            "importance_ratio": c.IMPORTANCE_RATIO,
            "deep_supervision": c.DEEP_SUPERVISION,
            "match_semantic": c.SEMANTIC_MATCHING == "hungarian",
            "num_scales": num_scales,
        }

    def normalizers(self, targets: Targets, num_queries: int) -> Normalizers:
        """Denominators of these targets: segments, weighted queries, images, class regions."""
        matched = to_device(torch.tensor([float(min(n, num_queries)) for n in targets.counts]), targets.weight.device)
        unmatched = self.no_object_weight * targets.no_object_weight * (num_queries - matched)
        regions = targets.present.sum().to(matched)
        if self.match_semantic:  # a class has as many regions as its queries can share
            num_shared = sum((rank_within_class(labels) < self.num_scales).sum() for labels in targets.labels)
            regions = num_shared.to(matched) / self.num_scales
        num_images = torch.full_like(regions, len(matched))
        return Normalizers(matched.sum(), (matched + unmatched).sum(), num_images, regions)

    @property
    def num_candidates(self) -> int:
        """Points to be drawn per image."""
        return max(int(self.oversample_ratio * self.num_points), self.num_points)

    def forward(
        self,
        predictions,
        mask_features,
        targets: Targets,
        points: SharedPoints,
        score_head: nn.Module,
        normalizers: Normalizers,
        relevance=None,
    ):
        """
        Args:
            predictions: the decoder's list of QueryPredictions. mask_features: M (B, Cm, h, w).
            targets, points: of the same B images; `num_candidates` points each.
            score_head: turns queries into class scores (for the pixel loss). relevance: (B, K') or None.
            normalizers: `normalizers()` of these targets, or of all that are added up.
        Returns:
            {"loss_class", "loss_mask", "loss_dice", "loss_pixel"}, and with semantic queries {"loss_presence",
            "loss_region", "loss_region_dice"}: weighted scalars, summed over predictions.
        """
        predictions = predictions if self.deep_supervision else predictions[-1:]
        class_logits = torch.stack([p.class_logits for p in predictions]).float()  # (L, B, N, K'+1)
        embed = torch.stack([p.mask_embed for p in predictions]).float()  # (L, B, N, Cm)
        features = sample_maps(mask_features.float(), points.point_coords)  # (B, S, Cm)
        subset, subset_features = points.first(self.num_points), features[:, : self.num_points]
        mask_logits = torch.einsum("lbnc,bpc->lbnp", embed, subset_features)  # (L, B, N, P)
        matched = self.matcher(class_logits, mask_logits, subset.segment, subset.weight, targets.labels)
        losses = {"class": self._class_loss(class_logits, targets, matched, normalizers)}
        losses["mask"], losses["dice"] = self._mask_losses(embed, features, targets, points, matched, normalizers)
        semantic = ()
        if predictions[0].semantic_mask_embed is not None:
            presence_logits = torch.stack([p.presence_logits for p in predictions]).float()  # (L, B, E, K')
            semantic_embed = torch.stack([p.semantic_mask_embed for p in predictions]).float()  # (L, B, E, K', Cm)
            region_logits = torch.einsum("lbekc,bpc->lbekp", semantic_embed, subset_features)  # (L, B, E, K', P)
            semantic = presence_logits, region_logits
            assignment = self._assign(region_logits, targets, subset)
            losses |= semantic_losses(*semantic, assignment, targets, subset, normalizers, self.importance_ratio)
        class_scores = score_head(class_logits, mask_logits, *semantic, relevance=relevance)  # (L, B, K', P)
        losses["pixel"] = self._pixel_loss(class_scores, targets, subset, score_head, normalizers)
        return {f"loss_{name}": self.weights[name] * value for name, value in losses.items()}

    def _assign(self, region_logits, targets, points):
        if self.match_semantic:
            return match_within_class(region_logits, targets, points, self.matcher)
        return assign_class_regions(region_logits, targets, points)

    def _class_loss(self, class_logits, targets, matched, normalizers):
        """Cross-entropy over classes and "no object".

        Classes that may hide in the rejected pixels of a pseudo-labeled image are left out of the softmax of its
        unmatched queries, so that their logits get no gradient.
        """
        layer, image, query, segment = matched[:4]
        num_classes = class_logits.shape[-1] - 1
        target = torch.full(class_logits.shape[:3], num_classes, device=class_logits.device)
        classes = torch.nn.utils.rnn.pad_sequence(targets.labels, batch_first=True)  # (B, max M)
        target[layer, image, query] = classes[image, segment]
        unmatched = target == num_classes  # (L, B, N)
        unknown = F.pad(targets.unknown, (0, 1))[None, :, None] & unmatched[..., None]
        loss = F.cross_entropy(class_logits.masked_fill(unknown, -torch.inf).movedim(-1, 1), target, reduction="none")
        no_object = self.no_object_weight * targets.no_object_weight[None, :, None]
        weight = torch.where(unmatched, no_object, 1.0) * targets.image_weight[None, :, None]
        return (loss * weight).sum() / normalizers.queries.clamp(min=1e-6)

    def _mask_losses(self, embed, features, targets, points, matched, normalizers):
        """Cross-entropy and dice of the matched masks; embed (L, B, N, Cm), features (B, S, Cm)."""
        total = torch.zeros(2, device=embed.device)
        per_image = zip(*(index.split(matched.counts) for index in matched[:4]))
        for b, (layer, image, query, segment) in enumerate(per_image):
            logits = embed[layer, b, query] @ features[b].t()  # (T_b, S)
            losses = uncertain_point_losses(
                logits, self.num_points, self.importance_ratio, points.segment, points.weight, image, segment
            )
            total = total + targets.image_weight[b] * torch.stack([loss.sum() for loss in losses])
        return total / normalizers.masks.clamp(min=1)

    def _pixel_loss(self, class_scores, targets, points, score_head, normalizers):
        """-log p of the true class at the shared points, which makes p a probability. class_scores (L, B, K', P)."""
        label = points.label[None, :, None].expand(len(class_scores), -1, 1, -1)  # (L, B, 1, P)
        true_score = class_scores.gather(2, label)[:, :, 0]  # (L, B, P)
        loss = torch.log(score_head.epsilon + class_scores.sum(2)) - torch.log(true_score.clamp(min=1e-8))
        return (points.mean(loss) * targets.image_weight).sum() / normalizers.images.clamp(min=1)
