"""Filters weigh pseudo-labels by how much each can be trusted.

A filter is a function (pseudo, weight, state, **options) -> factor in [0, 1] per pixel; the chain multiplies the
factors, so that a filter can only lower weights. `state` is a dict that the filter may keep between iterations
(saved in the checkpoint; per-class entries are keyed by class name). To add one: write the function, decorate it,
add its options under SEMI.FILTER.<NAME>, and name it in SEMI.FILTERS. If it reads a language module's output, add it
to FILTER_NEEDS in config/validate.py.
"""

from dataclasses import dataclass

import detectron2.utils.comm as comm
import torch
import torch.distributed

from ..errors import UserError
from ..modeling.inference import upsample_to_image
from ..utils.label_maps import connected_components, near_boundary, region_areas


@dataclass
class PseudoLabels:
    """The EMA teacher's labels of B images, and what filters may judge them by.

    Attributes:
        probabilities: (B, K, H, W). labels: (B, H, W) int64, their argmax. confidence: (B, H, W), their max.
        valid: (B, H, W) bool, False on padding. class_names: K names.
        considered: (B, K) bool, classes that HSQG selected in the teacher; None: all.
        relevance: (B, K) in [0, 1] and pixel_text: (B, K, h, w), the pixel-text similarity at a quarter of the size (-1
            for a class that was not selected); None for a teacher without language modules.
    """

    probabilities: torch.Tensor
    labels: torch.Tensor
    confidence: torch.Tensor
    valid: torch.Tensor
    class_names: list
    considered: torch.Tensor | None = None
    relevance: torch.Tensor | None = None
    pixel_text: torch.Tensor | None = None

    @classmethod
    def from_probabilities(cls, probabilities, valid, class_names, **more):
        confidence, labels = probabilities.max(dim=1)
        return cls(probabilities, labels, confidence, valid, class_names, **more)


FILTERS = {}


def register(function):
    FILTERS[function.__name__] = function
    return function


@register
def confidence(pseudo, weight, state, *, threshold):
    """Keep pixels whose confidence reaches a fixed threshold (FixMatch, arXiv 2001.07685)."""
    return (pseudo.confidence >= threshold).to(weight)


@register
def adaptive(pseudo, weight, state, *, quantile, floor, ceiling, momentum):
    """Keep pixels that are sure for their class: one threshold per class, a running quantile of the confidence of
    the pixels given to it, between `floor` and `ceiling`. A class not seen yet has the floor."""
    totals = pseudo.probabilities.new_zeros(2, len(pseudo.class_names))  # sum of quantiles, number of ranks that saw it
    for k in pseudo.labels[weight > 0].unique().tolist():
        values = pseudo.confidence[(pseudo.labels == k) & (weight > 0)]
        # torch.quantile refuses more than 2^24 values; a stride keeps the order statistics.
        totals[:, k] = torch.stack((values[:: len(values) // 2**20 + 1].quantile(quantile), values.new_ones(())))
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(totals)
    for k in totals[1].nonzero()[:, 0].tolist():
        name, value = pseudo.class_names[k], (totals[0, k] / totals[1, k]).item()
        state[name] = momentum * state[name] + (1 - momentum) * value if name in state else value
    thresholds = pseudo.probabilities.new_tensor(
        [min(max(state.get(n, floor), floor), ceiling) for n in pseudo.class_names]
    )
    return (pseudo.confidence >= thresholds[pseudo.labels]).to(weight)


@register
def text_agreement(pseudo, weight, state, *, margin):
    """Keep pixels whose label the pixel-text similarity rank first, or within `margin` (of a cosine) of the first."""
    similarity = upsample_to_image(pseudo.pixel_text, weight.shape[1:])  # (B, K, H, W)
    own = similarity.gather(1, pseudo.labels[:, None])[:, 0]
    return (own >= similarity.amax(1) - margin).to(weight)


@register
def relevance(pseudo, weight, state, *, threshold):
    """Drop labels of classes that the image hardly shows: those of a relevance below the threshold."""
    relevant = pseudo.relevance >= threshold  # (B, K)
    return relevant.to(weight).gather(1, pseudo.labels.flatten(1)).view_as(weight)


@register
def region(pseudo, weight, state, *, min_area):
    """Drop connected regions of one label, among the pixels kept so far, smaller than `min_area` pixels."""
    regions = connected_components(torch.where(weight > 0, pseudo.labels, -1))
    return (region_areas(regions) >= max(min_area, 1)).to(weight)


@register
def boundary(pseudo, weight, state, *, margin):
    """Drop pixels that lie within `margin` pixels of another label."""
    everywhere = torch.ones_like(pseudo.labels, dtype=torch.bool)
    return (~near_boundary(pseudo.labels, everywhere, margin)).to(weight)


@register
def image_average(pseudo, weight, state, *, threshold):
    """Weigh every pixel of an image by the share of its pixels that reach the threshold (the published protocol on
    Cityscapes)."""
    sure = ((pseudo.confidence >= threshold) & pseudo.valid).flatten(1).sum(1)
    share = sure / pseudo.valid.flatten(1).sum(1).clamp(min=1)
    return share[:, None, None].expand_as(weight).to(weight)


class FilterChain:
    """Applies filters in order.

    Args:
        steps: list of (name, options) with names from FILTERS.
    Raises:
        UserError: an unknown name.
    """

    def __init__(self, steps):
        unknown = [name for name, _ in steps if name not in FILTERS]
        if unknown:
            raise UserError(f"SEMI.FILTERS: no filter called {unknown[0]!r}; known are {', '.join(sorted(FILTERS))}.")
        self.steps = list(steps)
        self.state = {name: {} for name, _ in steps}

    @classmethod
    def from_config(cls, cfg):
        options = cfg.SEMI.FILTER
        return cls(
            [(name, {k.lower(): v for k, v in options.get(name.upper(), {}).items()}) for name in cfg.SEMI.FILTERS]
        )

    @torch.no_grad()
    def __call__(self, pseudo: PseudoLabels):
        """Returns (weight (B, H, W), {filter name: share of the valid pixels' weight kept up to and with it})."""
        weight = pseudo.valid.to(pseudo.probabilities.dtype)
        total = weight.sum().clamp(min=1)
        kept = {}
        for name, options in self.steps:
            weight = weight * FILTERS[name](pseudo, weight, self.state[name], **options)
            kept[name] = weight.sum() / total
        return weight, kept

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = {name: dict(state.get(name, {})) for name, _ in self.steps}
