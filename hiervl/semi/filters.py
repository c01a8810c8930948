"""Filters weigh pseudo-labels by how much each can be trusted.

A filter is a function (pseudo, weight, state, **options) -> factor in [0, 1] per pixel; the chain multiplies the
factors, so that a filter can only lower weights. `state` is a ClassState. To add one: write the function, decorate it,
add its options under SEMI.FILTER.<NAME>, and name it in SEMI.FILTERS. If it reads a language module's output, add it
to FILTER_NEEDS in config/validate.py.
"""

import math
from dataclasses import dataclass, fields

import detectron2.utils.comm as comm
import torch
import torch.distributed

from ..errors import UserError
from ..modeling.inference import upsample_to_image
from ..utils.transfer import to_device
from ..utils.label_maps import connected_components, near_boundary, region_areas


@dataclass
class PseudoLabels:
    """The EMA teacher's labels of B images, and what filters may judge them by.

    Maps of single classes exist only for the K' classes that HSQG selected in each image, so that their memory does
    not grow with K.

    Attributes:
        labels: (B, H, W) int64. confidence: (B, H, W), the probability of the label. valid: (B, H, W) bool, False on
            padding. class_names: K names.
        index: (B, K') int64, the selected classes. highest: (B, K'), the highest probability of each in the image.
        relevance: (B, K) in [0, 1] and pixel_text: (B, K', h, w), the pixel-text similarity at a quarter of the size;
            None for a teacher without language modules.
    """

    labels: torch.Tensor
    confidence: torch.Tensor
    valid: torch.Tensor
    class_names: list
    index: torch.Tensor
    highest: torch.Tensor
    relevance: torch.Tensor | None = None
    pixel_text: torch.Tensor | None = None

    @classmethod
    def from_probabilities(cls, probabilities, valid, class_names, index=None, **more):
        """
        Args:
            probabilities: (B, K', H, W) of the selected classes. index: (B, K'), which these are; None: all, in order.
        """
        batch, num_selected = probabilities.shape[:2]
        if index is None:
            index = torch.arange(num_selected, device=probabilities.device).expand(batch, -1)
        confidence, position = probabilities.max(dim=1)
        labels = index.gather(1, position.flatten(1)).view_as(position)
        highest = probabilities.masked_fill(~valid[:, None], 0).flatten(2).amax(2)
        return cls(labels, confidence, valid, class_names, index, highest, **more)

    @classmethod
    def concatenate(cls, parts: list) -> "PseudoLabels":
        """The pseudo-labels of all images of several batches."""
        values = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        names = values.pop("class_names")[0]
        together = {name: None if value[0] is None else torch.cat(value) for name, value in values.items()}
        return cls(class_names=names, **together)

    def position(self, b: int) -> torch.Tensor:
        """(H, W) int64, the position of each label of image b among the selected classes."""
        position = torch.zeros(len(self.class_names), dtype=torch.long, device=self.index.device)
        position[self.index[b]] = torch.arange(self.index.shape[1], device=self.index.device)
        return position[self.labels[b]]


class ClassState:
    """A number per class that a filter keeps between iterations: on the device, and in checkpoints by class name."""

    def __init__(self):
        self._saved, self._names, self._values = {}, (), None

    def read(self, class_names, device) -> torch.Tensor:
        """(K,) float64, NaN for a class that has none yet."""
        if self._values is None:
            values = [self._saved.get(name, math.nan) for name in class_names]
            self._names, self._values = tuple(class_names), to_device(torch.tensor(values, dtype=torch.float64), device)
        return self._values

    def write(self, values: torch.Tensor) -> torch.Tensor:
        """Keep these values (K,), and return them."""
        self._values = values
        return values

    def state_dict(self) -> dict:
        if self._values is None:
            return dict(self._saved)
        return {name: value for name, value in zip(self._names, self._values.tolist()) if not math.isnan(value)}

    def load_state_dict(self, state):
        self._saved, self._values = dict(state), None


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
    names = pseudo.class_names
    values, counts = class_quantiles(pseudo.confidence, pseudo.labels, weight > 0, len(names), quantile)
    totals = torch.stack((values, (counts > 0).to(values)))  # (2, K): sum of quantiles, number of ranks that saw it
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(totals)
    old, new = state.read(names, pseudo.confidence.device), (totals[0] / totals[1]).double()
    averaged = torch.where(old.isnan(), new, momentum * old + (1 - momentum) * new)
    thresholds = state.write(torch.where(totals[1] > 0, averaged, old))
    thresholds = thresholds.nan_to_num(floor).clamp(floor, ceiling).to(values)
    return (pseudo.confidence >= thresholds[pseudo.labels]).to(weight)


def class_quantiles(values, labels, mask, num_classes: int, quantile: float):
    """The same quantile of the values of each class, interpolated linearly as torch.quantile does, without asking the
    device which classes there are.

    Args:
        values: float, in [0, 1]. labels: int64 in 0..num_classes-1. mask: bool, the values that count. All three of one
            shape.
    Returns:
        quantiles (num_classes,), 0 for a class without a value; numbers of values (num_classes,) int64.
    """
    values, labels = values.flatten(), torch.where(mask, labels, num_classes).flatten()
    # One sort by class, then value: halved, a value never reaches the next class. float64 keeps both exactly.
    order = (labels + values.double() / 2).argsort()
    values = values[order]
    counts = torch.zeros(num_classes + 1, dtype=torch.long, device=values.device)
    counts = counts.scatter_add_(0, labels, torch.ones_like(labels))[:num_classes]
    first = counts.cumsum(0) - counts
    rank = quantile * (counts - 1).clamp(min=0).to(values)
    low, high = rank.floor().long(), rank.ceil().long()
    below, above = (values[(first + i).clamp(max=len(values) - 1)] for i in (low, high))
    return torch.where(counts > 0, below.lerp(above, rank - low), 0), counts


@register
def text_agreement(pseudo, weight, state, *, margin):
    """Keep pixels whose label the pixel-text similarity ranks first, or within `margin` (of a cosine) of the first."""
    agrees = []
    for b, maps in enumerate(pseudo.pixel_text):  # one image at a time, since the maps are as large as the image
        similarity = upsample_to_image(maps[None], weight.shape[1:])[0]  # (K', H, W)
        own = similarity.gather(0, pseudo.position(b)[None])[0]
        agrees.append(own >= similarity.amax(0) - margin)
    return torch.stack(agrees).to(weight)


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
        self.state = {name: ClassState() for name, _ in steps}

    @classmethod
    def from_config(cls, cfg):
        options = cfg.SEMI.FILTER
        return cls(
            [(name, {k.lower(): v for k, v in options.get(name.upper(), {}).items()}) for name in cfg.SEMI.FILTERS]
        )

    @torch.no_grad()
    def __call__(self, pseudo: PseudoLabels):
        """Returns (weight (B, H, W), {filter name: share of the valid pixels' weight kept up to and with it})."""
        weight = pseudo.valid.to(pseudo.confidence.dtype)
        total = weight.sum().clamp(min=1)
        kept = {}
        for name, options in self.steps:
            weight = weight * FILTERS[name](pseudo, weight, self.state[name], **options)
            kept[name] = weight.sum() / total
        return weight, kept

    def state_dict(self):
        return {name: state.state_dict() for name, state in self.state.items()}

    def load_state_dict(self, saved):
        for name, state in self.state.items():
            state.load_state_dict(saved.get(name, {}))
