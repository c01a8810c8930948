"""The training loss of one set of images, labeled or pseudo-labeled (docs/how-it-works.md, "Criterion").

Instance queries are matched to segments. Semantic queries are tied to their class: all E of them mean its whole
region, or they share its segments by matching. Every prediction of the decoder is supervised. Validity is a weight per
pixel: a place of the mask features whose bilinear support holds no valid pixel gets exactly zero gradient. All classes
here are selected classes (`Targets.among`).
"""

from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from ..errors import UserError
from .matcher import HungarianMatcher
from .points import SharedPoints, sample_maps
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


def sigmoid_ce_loss(logits, masks, weight):
    """Per mask: weighted mean binary cross-entropy over points; all (T, P) -> (T,)."""
    loss = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return (loss * weight).sum(1) / weight.sum(1).clamp(min=1e-6)


def dice_loss(logits, masks, weight):
    """Per mask: 1 - dice over points, add-one smoothed; all (T, P) -> (T,)."""
    probability = logits.sigmoid() * weight
    return 1 - (2 * (probability * masks).sum(1) + 1) / (probability.sum(1) + (masks * weight).sum(1) + 1)


def balanced_presence_loss(logits, present, absent):
    """Per image: half the mean over the present classes of -log p, half the mean over the absent ones of -log(1-p);
    a class in neither does not count. logits (..., B, V), present and absent (B, V) or like it -> (..., B)."""
    positive = (F.softplus(-logits) * present).sum(-1) / present.sum(-1).clamp(min=1)
    negative = (F.softplus(logits) * absent).sum(-1) / absent.sum(-1).clamp(min=1)
    return (positive + negative) / 2


def _rank_in_class(labels):
    """(M,) classes -> (M,): the how-manieth of its class each one is, from 0."""
    return ((labels[:, None] == labels).tril().sum(1) - 1) if len(labels) else labels


class Criterion(nn.Module):
    """See the module's docstring.

    Args:
        matcher: assigns queries to segments.
        class_weight, mask_weight, dice_weight, pixel_weight, presence_weight: weights of the losses.
        no_object_weight: weight of an unmatched query in the class loss.
        num_points: points per image and mask; oversample_ratio and importance_ratio choose among them those where
            the mask is least certain (PointRend, arXiv 1912.08193). The E masks of a class share as many.
            All masks of an image choose among the same candidates, where its mask features are read once.
        deep_supervision: supervise every prediction, not the last only.
        match_semantic: the E queries of a class share its segments; without, each means the class's region.
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
        if not 0 <= c.IMPORTANCE_RATIO <= 1:
            raise UserError(
                f"MODEL.CRITERION.IMPORTANCE_RATIO is {c.IMPORTANCE_RATIO}; it is a share of the points, from 0 to 1."
            )
        if c.SEMANTIC_MATCHING not in ("fixed", "hungarian"):
            raise UserError(
                f"MODEL.CRITERION.SEMANTIC_MATCHING: {c.SEMANTIC_MATCHING!r} is not one of fixed, hungarian."
            )
        if c.SEMANTIC_MATCHING == "hungarian" and c.SEGMENTS == "class_regions":
            raise UserError(
                "MODEL.CRITERION.SEMANTIC_MATCHING hungarian shares a class's segments among its queries; "
                "set MODEL.CRITERION.SEGMENTS to components or instances."
            )
        if c.SEMANTIC_MATCHING == "hungarian" and not cfg.MODEL.DECODER.SEMANTIC:
            raise UserError(
                "MODEL.CRITERION.SEMANTIC_MATCHING is about semantic queries, but MODEL.DECODER.SEMANTIC "
                "is False; set it to fixed."
            )
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
        matched = targets.weight.new_tensor([min(count, num_queries) for count in targets.counts])
        unmatched = self.no_object_weight * targets.no_object_weight * (num_queries - matched)
        regions = targets.present.sum().to(matched)
        if self.match_semantic:
            regions = (
                matched.new_tensor(
                    sum(int((_rank_in_class(labels) < self.num_scales).sum()) for labels in targets.labels)
                )
                / self.num_scales
            )
        return Normalizers(matched.sum(), (matched + unmatched).sum(), matched.new_tensor(len(matched)), regions)

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
        masks = torch.einsum("lbnc,bpc->lbnp", embed, subset_features)  # (L, B, N, P)
        matched = self.matcher(class_logits, masks, subset.segment, subset.weight, targets.labels)
        losses = {"class": self._class_loss(class_logits, targets, matched, normalizers)}
        losses["mask"], losses["dice"] = self._mask_losses(embed, features, targets, points, matched, normalizers)
        semantic = ()
        if predictions[0].semantic_mask_embed is not None:
            presence = torch.stack([p.presence_logits for p in predictions]).float()  # (L, B, E, K')
            regions = torch.stack([p.semantic_mask_embed for p in predictions]).float()  # (L, B, E, K', Cm)
            semantic = presence, torch.einsum("lbekc,bpc->lbekp", regions, subset_features)
            losses |= self._semantic_losses(*semantic, targets, subset, normalizers)
        class_scores = score_head(class_logits, masks, *semantic, relevance=relevance)  # (L, B, K', P)
        losses["pixel"] = self._pixel_loss(class_scores, targets, subset, score_head, normalizers)
        return {f"loss_{name}": self.weights[name] * value for name, value in losses.items()}

    def _class_loss(self, class_logits, targets, matched, normalizers):
        """Cross-entropy over classes and "no object".

        An unmatched query of a pseudo-labeled image says negative about classes that may hide in rejected pixels:
        they leave its softmax, so that their logits get no gradient.
        """
        layer, image, query, segment = matched
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
        layer, image, query, segment = matched
        total = torch.zeros(2, device=embed.device)
        for b, weight in enumerate(targets.image_weight):
            own = image == b
            logits = embed[layer[own], b, query[own]] @ features[b].t()  # (T_b, S)
            losses = self._losses_at_uncertain_points(
                logits, self.num_points, points.segment, points.weight, image[own], segment[own]
            )
            total = total + weight * torch.stack([loss.sum() for loss in losses])
        return total / normalizers.masks.clamp(min=1)

    def _losses_at_uncertain_points(self, logits, num_points, reference, weight, image, wanted):
        """Per mask, cross-entropy and dice at some of its points: those where it is least certain and, for the rest,
        random ones.

        Args:
            logits: (T, S). image: (T,), whose they are. reference: (B, S) ids; the true mask i is where its image's
            reference equals wanted[i] (T,). weight: (B, S) validity.
        Returns:
            two tensors (T,).
        """
        chosen = int(self.importance_ratio * num_points)
        best = logits.detach().abs().topk(chosen, dim=1, largest=False, sorted=False).indices
        random = torch.randint(logits.shape[1], (len(logits), num_points - chosen), device=logits.device)
        index = torch.cat((best, random), dim=1)
        logits, weight = logits.gather(1, index), weight[image[:, None], index]
        truth = (reference[image[:, None], index] == wanted[:, None]).to(logits)
        return sigmoid_ce_loss(logits, truth, weight), dice_loss(logits, truth, weight)

    def _semantic_losses(self, presence, regions, targets, points, normalizers):
        """Presence of each query's region, the regions that there are, and empty masks for the others; means over the
        queries. presence (L, B, E, K'), regions (L, B, E, K', P), mask logits at the points."""
        num_scales, per_region = presence.shape[2], max(regions.shape[-1] // presence.shape[2], 1)
        if not self.match_semantic:
            positive, negative = targets.present[None, :, None].expand_as(presence), targets.absent[None, :, None]
            layer, image, scale, kind = positive.nonzero(as_tuple=True)  # (T,) each
            reference, weight, wanted = points.label, points.weight, kind
        else:
            weight, (layer, image, scale, kind, wanted) = self._match_within_class(regions, targets, points)
            positive = torch.zeros_like(presence, dtype=torch.bool)
            positive[layer, image, scale, kind] = True
            negative = ~positive & ~(targets.unknown | targets.unassigned)[None, :, None]
            reference = points.segment
        per_image = balanced_presence_loss(presence.transpose(1, 2), positive.transpose(1, 2), negative.transpose(1, 2))
        mask, dice = self._losses_at_uncertain_points(
            regions[layer, image, scale, kind], per_region, reference, weight, image, wanted
        )
        share = targets.image_weight[image] / (num_scales * normalizers.regions.clamp(min=1))
        empty = points.mean(F.softplus(regions).permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2)  # (L, B, E, K')
        empty = (empty * negative).sum(3) / negative.sum(3).clamp(min=1)  # (L, B, E)
        per_scale = targets.image_weight / (num_scales * normalizers.images.clamp(min=1))  # (B,)
        region = (mask * share).sum() + (empty * per_scale[:, None]).sum()
        return {"presence": (per_image * per_scale).sum(), "region": region, "region_dice": (dice * share).sum()}

    def _match_within_class(self, regions, targets, points):
        """Match each class's E queries with its E largest segments; of more segments negative is said.

        Returns:
            the points' weight (B, P) without those of surplus segments, and five int64 tensors (T,): layer, image,
            scale, class and segment of every pair. Queries beyond the segments have none.
        """
        num_scales, num_classes = regions.shape[2:4]
        own = torch.arange(num_classes, device=regions.device).repeat(num_scales)  # (E*K',), the class of each query
        allowed, weight = [], points.weight.clone()
        for b, labels in enumerate(targets.labels):
            surplus = _rank_in_class(labels) >= num_scales  # (M,); segments stand in order of size
            allowed.append((own[:, None] == labels) & ~surplus)
            # Index -1, of a point without a segment, reads the False at the end.
            weight[b] *= ~F.pad(surplus, (0, 1))[points.segment[b]]
        layer, image, query, segment = self.matcher(
            None, regions.flatten(2, 3), points.segment, weight, targets.labels, allowed
        )
        return weight, (layer, image, query // num_classes, query % num_classes, segment)

    def _pixel_loss(self, class_scores, targets, points, score_head, normalizers):
        """-log p of the true class at the shared points: what makes p a probability. class_scores (L, B, K', P)."""
        own = class_scores.gather(2, points.label[None, :, None].expand(len(class_scores), -1, 1, -1))[:, :, 0]
        loss = torch.log(score_head.epsilon + class_scores.sum(2)) - torch.log(own.clamp(min=1e-8))  # (L, B, P)
        return (points.mean(loss) * targets.image_weight).sum() / normalizers.images.clamp(min=1)
