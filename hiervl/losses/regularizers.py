"""Regularizers: small functions of one signature, each with its weight in MODEL.REGULARIZERS.

A regularizer is a function (context, settings) -> scalar, registered for the kinds of images it is for. To add one:
write the function, register it, add its weight under MODEL.REGULARIZERS.<NAME>. A weight of 0 switches it off: the
function is then not called.
"""

import copy
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable

from .mask_losses import balanced_presence_loss
from ..errors import UserError
from ..utils.label_maps import near_boundary
from ..utils.padding import run_backbone
from .points import SharedPoints, sample_maps
from .targets import Targets


@dataclass
class TeacherView:
    """What the EMA teacher saw in the weak view of one pseudo-labeled image.

    Attributes:
        pixel_text: (T, h, w), the pixel-text similarity of the classes that the teacher selected; -1: unknown.
        index: (T,) int64, which classes these are. After CutMix a class may come twice, once for either image.
        valid: (H, W) bool, False on padding. relevance: (K,). mixed: whether another image was pasted in.
    """

    pixel_text: torch.Tensor
    index: torch.Tensor
    valid: torch.Tensor
    relevance: torch.Tensor
    mixed: bool

    def similarity_of(self, classes, num_names: int) -> torch.Tensor:
        """Similarity of these classes (K',), out of num_names names: (K', h, w), -1 where it is not known."""
        position = torch.full((num_names,), len(classes), device=classes.device)  # the last one is for all others
        position[classes] = torch.arange(len(classes), device=classes.device)
        maps = self.pixel_text.new_full((len(classes) + 1, *self.pixel_text.shape[1:]), -1.0)
        target = position[self.index][:, None, None].expand_as(self.pixel_text)
        return maps.scatter_reduce(0, target, self.pixel_text, "amax")[:-1]


@dataclass
class LossContext:
    """What a regularizer sees of B images of one kind.

    Attributes:
        kind: LABELED or PSEUDO. images: (B, 3, H, W), normalized and padded; image_size: (height, width) before.
        targets: in terms of all V names. selected_targets: in terms of the selected classes.
        points: shared points, with labels in terms of the selected classes.
        features: the backbone's. selected: SelectedClasses, aligned: AlignmentOutput; None without these modules.
        text: T' (K, Dt) of the classes; anchors: T0 (K, Dt), before adaptation; None without a text classifier.
        name_queries: (E, K, d), the classes' names at each scale, without the level embeddings (labeled images).
        similarity_temperature: scalar, of the pixel-text similarity.
        teacher: of pseudo-labeled images, B TeacherViews; None without language modules.
    """

    kind: str
    images: torch.Tensor
    image_size: tuple
    targets: Targets
    selected_targets: Targets
    points: SharedPoints
    features: dict
    selected: object = None
    aligned: object = None
    text: torch.Tensor | None = None
    anchors: torch.Tensor | None = None
    name_queries: torch.Tensor | None = None
    similarity_temperature: torch.Tensor | None = None
    teacher: list | None = None

    @property
    def num_classes(self) -> int:
        """K; the other names are distractors."""
        return len(self.text)


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

    def __call__(self, context: LossContext) -> dict:
        """{"loss_<name>": weight * value} of the regularizers for the context's kind of images."""
        return {
            f"loss_{name}": weight * REGULARIZERS[name][0](context, self)
            for name, weight in self.weights.items()
            if context.kind in REGULARIZERS[name][1]
        }


@register(LABELED)
def language(context, settings):
    """Keep each adapted name closest to its own frozen anchor: cross-entropy of T'·T0ᵀ/τ with the identity."""
    return language_loss(context.text, context.anchors, temperature=0.1)


@register(LABELED, PSEUDO)
def vision_language(context, settings):
    """Cross-entropy of the pixel-text similarity at the shared points, with more weight near labeled boundaries."""
    scores = sample_maps(context.aligned.similarity, context.points.point_coords).transpose(1, 2)  # (B, K', P)
    loss = F.cross_entropy(scores / context.similarity_temperature, context.points.label, reduction="none")
    if context.kind == LABELED:
        labels = context.selected_targets
        near = near_boundary(labels.sem_seg, labels.weight > 0, settings.boundary_width)  # (B, H, W)
        near = near.flatten(1).gather(1, context.points.index)  # (B, P)
        loss = loss * (1 + settings.boundary_weight * near)
    return _image_weighted_mean(context.points.mean(loss), context)


@register(LABELED, PSEUDO)
def relevance(context, settings):
    """Train the relevance on classes known to be present or absent; distractors are always absent."""
    loss = balanced_presence_loss(context.selected.logits, context.targets.present, context.targets.absent)
    return _image_weighted_mean(loss, context)


@register(LABELED)
def diversity(context, settings):
    """Keep the E projections of a name apart: mean positive cosine between scales, without level embeddings."""
    queries = F.normalize(context.name_queries, dim=2)  # (E, K, d)
    cosine = torch.einsum("ekd,fkd->efk", queries, queries)
    num_scales = len(queries)
    # Without the diagonal: (E*E-1, K) -> (E-1, E+1, K), whose last column is the rest of it.
    different = cosine.flatten(0, 1)[1:].view(num_scales - 1, num_scales + 1, -1)[:, :-1]
    return different.flatten().clamp(min=0).mean()


@register(LABELED)
def contrastive(context, settings):
    """InfoNCE between pixel embeddings pooled over each class's region and T over all names. A region's share of each
    cell of res5 is estimated at the shared points."""
    selected, points, present = context.selected, context.points, context.selected_targets.present
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
    shown = share.sum(2) > 0  # (B, K')
    return _image_weighted_mean((loss * shown).sum(1) / shown.sum(1).clamp(min=1), context)


@register(LABELED)
def vision(context, settings):
    """Distance of the trained backbone's global embedding from its frozen initial one: 1 - cosine."""
    with torch.no_grad():
        initial = settings.initial.to(context.images.device)
        initial = run_backbone(initial, context.images, context.image_size)["res5"].mean((2, 3))
    own = context.features["res5"].mean((2, 3))
    return (1 - F.cosine_similarity(own.float(), initial.float(), dim=1)).mean()


@register(PSEUDO)
def consistency(context, settings):
    """The strong context agrees with the teacher's weak one: alignment everywhere but on padding, and, where no other
    image was pasted in, relevance."""
    selected, per_image = context.selected, []
    height, width = context.images.shape[2:]
    for b, view in enumerate(context.teacher):
        # The teacher knows no distractors, and nothing of classes that it did not select.
        expected = view.similarity_of(selected.index[b], len(selected.names))  # (K', h, w)
        valid = F.pad(view.valid, (0, width - view.valid.shape[1], 0, height - view.valid.shape[0]))
        valid = F.adaptive_avg_pool2d(valid[None].float(), expected.shape[1:]) * (expected > -1)  # (K', h, w)
        squared_error = (context.aligned.similarity[b] - expected) ** 2
        loss = (squared_error * valid).sum() / valid.sum().clamp(min=1)
        if not view.mixed:
            relevance = selected.logits[b, : context.num_classes].sigmoid()
            loss = loss + ((relevance - view.relevance) ** 2).mean()
        per_image.append(loss)
    return torch.stack(per_image).mean()


@register(PSEUDO)
def guidance(context, settings):
    """The frozen initial CLIP tower's dense text scores guide the pixel-text similarity of the kept classes (not of the
    distractors); annealed to 0 over the run."""
    index = context.selected.index
    distractor = (index >= context.num_classes)[..., None, None]  # (B, K', 1, 1)
    with torch.no_grad():
        initial = settings.initial.to(context.images.device)
        dense = F.normalize(initial.dense_text_features(context.images).float(), dim=1)  # (B, Dt, h, w)
        names = context.anchors[index.clamp(max=context.num_classes - 1)]  # (B, K', Dt)
        expected = torch.einsum("bkd,bdhw->bkhw", names, dense) / 0.1
        expected = expected.masked_fill(distractor, -1e4).softmax(1)
    scores = F.interpolate(context.aligned.similarity, size=expected.shape[2:], mode="bilinear", align_corners=False)
    own = (scores / context.similarity_temperature).masked_fill(distractor, -1e4)
    cross_entropy = -(expected * own.log_softmax(1)).sum(1).mean((1, 2))  # (B,)
    return (1 - settings.progress) * (cross_entropy * ~distractor.flatten(1).all(1)).mean()


def _image_weighted_mean(per_image, context):
    """Mean over images, each by its kept share."""
    return (per_image * context.targets.image_weight).mean()


def language_loss(adapted: torch.Tensor, anchors: torch.Tensor, temperature: float) -> torch.Tensor:
    """Each adapted name must stay nearest to its own frozen one: CE(T' T0^T / temperature, identity).

    adapted T', anchors T0: (K, Dt) of unit length. 0 for one class.
    """
    logits = adapted @ anchors.t() / temperature  # (K, K)
    return F.cross_entropy(logits, torch.arange(len(adapted), device=adapted.device))
