"""Regularizers: small functions of one signature, each with its weight in MODEL.REGULARIZERS.

A regularizer is a function (network, context) -> scalar, registered for the kinds of images it is for. To add one:
write the function, register it, add its weight under MODEL.REGULARIZERS.<NAME>. A weight of 0 switches it off: the
function is then not called.
"""

import copy
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable

from .criterion import balanced_presence_loss
from ..errors import UserError
from .points import SharedPoints, sample_maps
from .targets import Targets


@dataclass
class LossContext:
    """What a regularizer sees of one kind of images, B of them.

    Attributes:
        kind: LABELED or PSEUDO. output: the network's NetworkOutput. targets: in terms of all V names.
        selected_targets: in terms of the selected ones. points: shared points, labels in terms of the selected classes.
        images: (B, 3, H, W), normalized and padded.
        teacher: of pseudo-labeled images, what the teacher said of the weak context: {"pixel_text" (B, K, h, w), -1 for
            classes that it did not keep, "relevance" (B, K), "valid" (B, H, W), "mixed" (B,) bool, images with CutMix}.
    """

    kind: str
    output: object
    targets: Targets
    selected_targets: Targets
    points: SharedPoints
    images: torch.Tensor
    teacher: dict | None


LABELED, PSEUDO = "labeled", "pseudo"
logger = logging.getLogger(__name__)
REGULARIZERS = {}


def register(*kinds):
    """Decorator: the function is a regularizer of these kinds of images."""

    def add(function):
        REGULARIZERS[function.__name__] = (function, kinds)
        return function

    return add


class Regularizers:
    """The regularizers that are switched on.

    Args:
        weights: {name: weight}. boundary_weight: extra weight of pixels within boundary_width pixels of a boundary in
        the vision-language loss of labeled images. backbone: of the network, as it is before training.
    """

    @configurable
    def __init__(self, backbone, *, weights: dict, boundary_weight: float, boundary_width: int):
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.boundary_weight, self.boundary_width = boundary_weight, boundary_width
        self.progress = 0.0
        self.initial = None  # the backbone as it was before training
        if self.weights.keys() & {"vision", "guidance"}:
            self.keep_initial(backbone)

    @classmethod
    def from_config(cls, cfg, backbone, text):
        weights = {name: cfg.MODEL.REGULARIZERS[name.upper()] for name in REGULARIZERS}
        if weights["guidance"] and not hasattr(backbone, "dense_text_features"):
            raise UserError("MODEL.REGULARIZERS.GUIDANCE needs a CLIP tower as MODEL.BACKBONE.NAME; set it to 0.")
        can_learn = text is not None and (cfg.MODEL.TEXT.ADAPTER or cfg.MODEL.TEXT.CONTEXT_TOKENS)
        lacking = {} if can_learn else {"language": "MODEL.TEXT.ADAPTER"}
        if not cfg.MODEL.CMSAM.ENABLED:
            lacking |= dict.fromkeys(("vision_language", "consistency", "guidance"), "MODEL.CMSAM.ENABLED")
        if not cfg.MODEL.HSQG.ENABLED:
            lacking |= dict.fromkeys(("relevance", "diversity", "contrastive"), "MODEL.HSQG.ENABLED")
        for name, key in lacking.items():
            if weights[name]:
                logger.info("Regularizer %s is off, as is %s", name, key)
        return {
            "backbone": backbone,
            "weights": weights | dict.fromkeys(lacking, 0.0),
            "boundary_weight": cfg.MODEL.CMSAM.BOUNDARY_WEIGHT,
            "boundary_width": cfg.MODEL.CMSAM.BOUNDARY_WIDTH,
        }

    def keep_initial(self, backbone):
        """Freeze a copy of this backbone as the initial one; to be called again when its weights were loaded."""
        if self.initial is None:
            self.initial = copy.deepcopy(backbone).eval().requires_grad_(False)
        self.initial.load_state_dict(backbone.state_dict())

    def __call__(self, network, context) -> dict:
        """{"loss_<name>": weight * value} of the regularizers for the context's kind of images."""
        return {
            f"loss_{name}": weight * REGULARIZERS[name][0](network, context)
            for name, weight in self.weights.items()
            if context.kind in REGULARIZERS[name][1]
        }


@register(LABELED)
def language(network, context):
    """The adapted names stay recognizable by their frozen anchors: cross-entropy of T'·T0ᵀ/τ with the identity."""
    return language_loss(network.text(), network.text.anchors(), temperature=0.1)


@register(LABELED, PSEUDO)
def vision_language(network, context):
    """Cross-entropy of the pixel-text similarity at the shared points; near the boundaries of labeled images more."""
    scores = sample_maps(context.output.aligned.similarity, context.points.point_coords).transpose(1, 2)  # (B, K', P)
    loss = F.cross_entropy(scores / network.alignment.score_temperature(), context.points.label, reduction="none")
    if context.kind == LABELED:
        settings = network.regularizers
        near = (
            label_boundaries(context.selected_targets, settings.boundary_width)
            .flatten(1)
            .gather(1, context.points.index)
        )
        loss = loss * (1 + settings.boundary_weight * near)
    return _image_weighted_mean(context.points.mean(loss), context)


@register(LABELED, PSEUDO)
def relevance(network, context):
    """Relevance learns from presence, and from absence where it is known; distractors are absent everywhere."""
    loss = balanced_presence_loss(context.output.selected.logits, context.targets.present, context.targets.absent)
    return _image_weighted_mean(loss, context)


@register(LABELED)
def diversity(network, context):
    """The three projections of a name shall differ: mean positive cosine between scales, levels left out."""
    queries = F.normalize(network.query_generator.project_names(network.text()), dim=2)  # (E, K, d)
    cosine = torch.einsum("ekd,fkd->efk", queries, queries)
    different = ~torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    return cosine[different].clamp(min=0).mean()


@register(LABELED)
def contrastive(network, context):
    """InfoNCE between pixel embeddings pooled over each class's region and T over all names. A region's share of each
    cell of res5 is estimated at the shared points."""
    selected, points, present = context.output.selected, context.points, context.selected_targets.present
    height, width = selected.pixels.shape[-2:]
    column, row = (
        ((points.point_coords + 1) / 2 * points.point_coords.new_tensor([width, height])).long().unbind(2)
    )  # (B, P)
    cells = points.label * height * width + row * width + column
    share = points.weight.new_zeros(len(present), present.shape[1] * height * width)
    share = share.scatter_add(1, cells, points.weight).view(*present.shape, -1)  # (B, K', h*w)
    pooled = F.normalize(share @ selected.pixels.flatten(2).transpose(1, 2), dim=2)  # (B, K', Dt)
    loss = F.cross_entropy(
        (pooled @ selected.names.t() / 0.1).transpose(1, 2), selected.index, reduction="none"
    )  # (B, K')
    weight = (share.sum(2) > 0) * context.targets.image_weight[:, None]
    return (loss * weight).sum() / weight.sum().clamp(min=1)


@register(LABELED)
def vision(network, context):
    """Distance of the trained backbone's global embedding from its frozen initial one: 1 - cosine."""
    with torch.no_grad():
        initial = network.regularizers.initial.to(network.device)(context.images)["res5"].mean((2, 3))
    own = context.output.features["res5"].mean((2, 3))
    return (1 - F.cosine_similarity(own.float(), initial.float(), dim=1)).mean()


@register(PSEUDO)
def consistency(network, context):
    """The strong context agrees with the teacher's weak one: alignment everywhere but on padding, and, where no other
    image was pasted in, relevance."""
    output, teacher = context.output, context.teacher
    num_classes = teacher["pixel_text"].shape[1]
    index = output.selected.index.clamp(max=num_classes - 1)[..., None, None]  # (B, K', 1, 1)
    expected = teacher["pixel_text"].gather(1, index.expand(-1, -1, *teacher["pixel_text"].shape[2:]))
    valid = F.adaptive_avg_pool2d(teacher["valid"].float(), expected.shape[2:])[:, None]  # (B, 1, h, w)
    # The teacher knows no distractors, and nothing of classes that it did not keep.
    valid = valid * (output.selected.index < num_classes)[..., None, None] * (expected > -1)
    squared_error = (output.aligned.similarity - expected) ** 2
    maps = (squared_error * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)
    presence = ((output.selected.logits[:, :num_classes].sigmoid() - teacher["relevance"]) ** 2).mean(1)
    return (maps + presence * ~teacher["mixed"]).mean()


@register(PSEUDO)
def guidance(network, context):
    """The frozen initial CLIP tower's dense text scores guide the pixel-text similarity of the kept classes (not of the
    distractors); annealed to 0 over the run."""
    index = context.output.selected.index
    distractor = (index >= network.num_classes)[..., None, None]  # (B, K', 1, 1)
    with torch.no_grad():
        initial = network.regularizers.initial.to(network.device)
        dense = F.normalize(initial.dense_text_features(context.images).float(), dim=1)  # (B, Dt, h, w)
        names = network.text.anchors()[index.clamp(max=network.num_classes - 1)]  # (B, K', Dt)
        expected = torch.einsum("bkd,bdhw->bkhw", names, dense) / 0.1
        expected = expected.masked_fill(distractor, -1e4).softmax(1)
    scores = F.interpolate(
        context.output.aligned.similarity, size=expected.shape[2:], mode="bilinear", align_corners=False
    )
    own = (scores / network.alignment.score_temperature()).masked_fill(distractor, -1e4)
    cross_entropy = -(expected * own.log_softmax(1)).sum(1).mean((1, 2))  # (B,)
    return (1 - network.regularizers.progress) * (cross_entropy * ~distractor.flatten(1).all(1)).mean()


def label_boundaries(targets: Targets, width: int) -> torch.Tensor:
    """(B, H, W) float: 1 within `width` pixels of another class; pixels that are not valid make no boundary."""
    label, valid = targets.sem_seg[:, None].float(), targets.weight[:, None] > 0
    highest = _window_max(label.masked_fill(~valid, -1), width)
    lowest = -_window_max((-label).masked_fill(~valid, -1e6), width)
    return ((highest != lowest) & valid)[:, 0].float()


def _window_max(x, width):
    """Maximum over a square window, one direction after the other."""
    rows = F.max_pool2d(x, (2 * width + 1, 1), stride=1, padding=(width, 0))
    return F.max_pool2d(rows, (1, 2 * width + 1), stride=1, padding=(0, width))


def _image_weighted_mean(per_image, context):
    """Mean over images, each by its kept share."""
    return (per_image * context.targets.image_weight).mean()


def language_loss(adapted: torch.Tensor, anchors: torch.Tensor, temperature: float) -> torch.Tensor:
    """Each adapted name must stay nearest to its own frozen one: CE(T' T0^T / temperature, identity).

    adapted T', anchors T0: (K, Dt) of unit length. 0 for one class.
    """
    logits = adapted @ anchors.t() / temperature  # (K, K)
    return F.cross_entropy(logits, torch.arange(len(adapted), device=adapted.device))
