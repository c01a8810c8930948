"""What the criterion compares with: label maps with a validity weight per pixel, cut into segments.

Labeled and pseudo-labeled images are the same kind of object; they differ in their weights only.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..utils.label_maps import connected_components, region_areas
from ..utils.padding import pad_to_multiple
from ..utils.transfer import stack_on_device, to_device

SEGMENTS = ("class_regions", "components", "instances")  # what the instance queries are matched to


@dataclass
class Targets:
    """Targets of B images of one size.

    Attributes:
        sem_seg: (B, H, W) int64, the class of each pixel; meaningless where `weight` is 0.
        weight: (B, H, W) float in [0, 1]; 0 = ignore label, padding or a rejected pseudo-label.
        segments: (B, H, W) int64, index of the pixel's segment within its image, -1 for none.
        labels: B tensors (M_b,) int64, the class of each segment.
        image_weight: (B,) float, 1 for labeled images, the kept share for pseudo-labeled ones, 0 for an image
            without a valid pixel.
        no_object_weight: (B,) float, how much an unmatched query counts.
        present: (B, K) bool, classes with a valid pixel.
        unknown: (B, K) bool, classes that may hide in pixels that are not valid.
        num_present: number of present classes of each image, known to the host without asking the device.
    """

    sem_seg: torch.Tensor
    weight: torch.Tensor
    segments: torch.Tensor
    labels: list
    image_weight: torch.Tensor
    no_object_weight: torch.Tensor
    present: torch.Tensor
    unknown: torch.Tensor
    num_present: list

    @property
    def absent(self) -> torch.Tensor:
        """(B, K) bool, classes known to be absent."""
        return ~self.present & ~self.unknown

    @property
    def unassigned(self) -> torch.Tensor:
        """(B, K) bool, classes with a valid pixel that belongs to no segment."""
        alone = ((self.segments < 0) & (self.weight > 0)).flatten(1)
        found = torch.zeros_like(self.present, dtype=torch.uint8)
        return found.scatter_reduce(1, self.sem_seg.flatten(1), alone.to(torch.uint8), "amax").bool()

    @property
    def counts(self) -> list:
        """Number of segments of each image."""
        return [len(labels) for labels in self.labels]

    def restrict_to(self, index: torch.Tensor, num_names: int) -> "Targets":
        """The same targets in terms of the selected classes.

        Args:
            index: (B, K'), each image's selected positions in a list of `num_names` names, of which the classes are the
                first; it holds every class of the image. Names beyond the classes are known to be absent.
        """
        more = num_names - self.present.shape[1]
        position = torch.full((len(index), num_names), -1, device=index.device)
        position.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
        sem_seg = position.gather(1, self.sem_seg.flatten(1)).view_as(self.sem_seg).clamp(min=0)
        return replace(
            self,
            sem_seg=sem_seg,
            labels=[row[labels] for row, labels in zip(position, self.labels)],
            present=F.pad(self.present, (0, more)).gather(1, index),
            unknown=F.pad(self.unknown, (0, more)).gather(1, index),
        )


def keep_most_frequent_classes(sem_seg, weight, num_classes, max_classes):
    """Drop the pixels of all but the most frequent classes of each image.

    Noisy pseudo-labels may show more classes than HSQG can select.

    Args:
        sem_seg: (B, H, W) int64. weight: (B, H, W) validity. max_classes: classes that an image may show.
    Returns:
        (B, H, W), `weight` with zeros at the dropped pixels.
    """
    if num_classes <= max_classes:
        return weight
    known = (sem_seg >= 0) & (sem_seg < num_classes)
    label = torch.where(known, sem_seg, 0).flatten(1)
    counts = weight.new_zeros(len(sem_seg), num_classes).scatter_add(1, label, (weight * known).flatten(1))
    frequent = torch.zeros_like(counts, dtype=torch.bool).scatter(1, counts.topk(max_classes, dim=1).indices, True)
    return weight * (frequent.gather(1, label).view_as(sem_seg) & known)


def build_targets(
    sem_seg,
    weight,
    num_classes,
    *,
    image_weight=None,
    unknown=None,
    segments="class_regions",
    min_area=64,
    max_segments=50,
    instances=None,
    things=(),
) -> Targets:
    """
    Args:
        sem_seg: (B, H, W) int64; ids outside 0..K-1 are not valid.
        weight: (B, H, W) float validity.
        image_weight: (B,) kept share, or None for labeled images.
        unknown: (B, K) bool, or None when every class without a pixel is known to be absent.
        segments: one of SEGMENTS. min_area: of components, in pixels. max_segments: of components or instances.
        instances: (B, H, W) int64, numbers of single objects, 0 for none; for segments "instances", with
        things: the ids of the classes whose objects are numbered.
    """
    batch = len(sem_seg)
    weight = weight * ((sem_seg >= 0) & (sem_seg < num_classes))
    sem_seg = sem_seg.clamp(0, num_classes - 1)
    valid = weight > 0
    present = torch.zeros(batch, num_classes, dtype=torch.long, device=sem_seg.device)
    present = present.scatter_reduce_(1, sem_seg.flatten(1), valid.flatten(1).long(), "amax").bool()
    on_host = present.cpu().numpy()
    if segments == "class_regions":
        segment_map, labels = _class_regions(sem_seg, valid, present, on_host)
    elif segments == "components":
        regions = connected_components(torch.where(valid, sem_seg, -1))
        order = sem_seg * regions[0].numel() + regions  # by class, then by number
        segment_map, labels = _keep_largest(regions, order, sem_seg, max_segments, min_area)
    else:
        objects = _instances(sem_seg, valid, instances, num_classes, things)
        segment_map, labels = _keep_largest(objects, objects, sem_seg, max_segments)
    has_pixel = valid.flatten(1).any(dim=1).to(weight.dtype)
    share = torch.ones_like(has_pixel) if image_weight is None else image_weight.to(weight.dtype)
    if unknown is None:
        unknown = torch.zeros(batch, num_classes, dtype=torch.bool, device=sem_seg.device)
    share = share * has_pixel
    return Targets(sem_seg, weight, segment_map, labels, share, share, present, unknown, on_host.sum(1).tolist())


def _class_regions(sem_seg, valid, present, on_host):
    """One segment per class that has a valid pixel. on_host: a copy of `present` (B, K)."""
    index = present.cumsum(1) - 1  # (B, K)
    segments = index.gather(1, sem_seg.flatten(1)).view_as(sem_seg)
    labels = to_device(torch.from_numpy(on_host.nonzero()[1]), sem_seg.device).split(on_host.sum(1).tolist())
    return torch.where(valid, segments, -1), list(labels)


def _keep_largest(numbers, order, sem_seg, max_segments, min_area=1):
    """Keep the largest segments of each image; the pixels of the others belong to no segment.

    Args:
        numbers: (B, H, W) int64, the number of the segment within its image, below H*W; -1 for none.
        order: (B, H, W) int64, one value per segment of an image; of two equally large segments the lower comes first.
    Returns:
        segment map (B, H, W), and B tensors (M_b,) with the class of each segment.
    """
    areas = region_areas(numbers)
    # One number ranks by area, then by order: no two segments of an image tie, so every device keeps the same ones.
    rank = torch.where(areas >= max(min_area, 1), areas * (order.max() + 1) - order, 0)
    index = numbers.flatten(1) + 1
    table = index.new_zeros(len(index), index.shape[1] + 1)  # by number; 0 is for pixels without a segment
    ranks, kept = table.scatter(1, index, rank.flatten(1)).topk(min(max_segments, index.shape[1]), dim=1)
    position = torch.where(ranks > 0, torch.arange(kept.shape[1], device=kept.device), -1)
    segment_map = (table - 1).scatter(1, kept, position).gather(1, index).view_as(numbers)
    classes = table.scatter(1, index, sem_seg.flatten(1)).gather(1, kept)
    return segment_map, [row[:count] for row, count in zip(classes, (ranks > 0).sum(1).tolist())]


def _instances(sem_seg, valid, numbers, num_classes, things):
    """Number each image's single objects and regions of stuff classes; -1 for a thing's pixels without an object."""
    single = valid & (numbers > 0)
    countable = torch.zeros(num_classes, dtype=torch.bool, device=sem_seg.device)
    countable[list(things)] = True
    stuff = valid & ~single & ~countable[sem_seg]
    # Object numbers may repeat across classes: an object is a pair of both. Stuff comes after the image's objects.
    image = torch.arange(len(sem_seg), device=sem_seg.device)[:, None, None]
    number = torch.where(single, numbers, 0)
    key = ((image * 2 + stuff) * num_classes + sem_seg) * (number.max() + 1) + number
    found = torch.where(single | stuff, key, -1).unique(return_inverse=True)[1]  # counted through the batch
    first = torch.where(single | stuff, found, found.numel()).flatten(1).amin(1)[:, None, None]
    return torch.where(single | stuff, found - first, -1)


class TargetBuilder:
    """Builds Targets from training inputs (see HierVL.forward), padded as the images are.

    Args:
        segments: one of SEGMENTS. min_area: of components, in pixels. max_segments: per image.
        things: ids of the classes whose objects are numbered.
        max_classes: classes that one image may show; None: all. Of a pseudo-labeled image, the most frequent ones are
            taken.
        size_divisibility: images are padded to multiples of it.
    """

    def __init__(self, *, segments, min_area, max_segments, things=(), max_classes=None, size_divisibility=1):
        self.segments, self.min_area, self.max_segments = segments, min_area, max_segments
        self.things, self.max_classes, self.size_divisibility = tuple(things), max_classes, size_divisibility

    def __call__(self, inputs: list, num_classes: int, device) -> Targets:
        """Targets of inputs that are all labeled, or all pseudo-labeled.

        Raises:
            UserError: a labeled image shows more than max_classes classes.
        """
        pseudo = inputs[0].get("pseudo", False)
        sem_seg = self._stack(inputs, "sem_seg", device, padding=-1)
        everywhere = torch.ones(inputs[0]["sem_seg"].shape, device=device)
        weight = stack_on_device([x.get("weight", everywhere) for x in inputs], device)
        weight = pad_to_multiple(weight.float(), self.size_divisibility)
        # The teacher finds regions, not objects: for "instances" they are cut into components.
        segments = "components" if pseudo and self.segments == "instances" else self.segments
        if pseudo and self.max_classes is not None:
            weight = keep_most_frequent_classes(sem_seg, weight, num_classes, self.max_classes)
        targets = build_targets(
            sem_seg,
            weight,
            num_classes,
            image_weight=stack_on_device([torch.as_tensor(x["image_weight"]) for x in inputs], device)
            if pseudo
            else None,
            unknown=stack_on_device([x["unknown"] for x in inputs], device) if pseudo else None,
            segments=segments,
            min_area=self.min_area,
            max_segments=self.max_segments,
            instances=self._stack(inputs, "instances", device, padding=0) if segments == "instances" else None,
            things=self.things,
        )
        if self.max_classes is not None and max(targets.num_present) > self.max_classes:
            raise UserError(
                f"MODEL.HSQG.TOP_K is {self.max_classes}, but a training image shows {max(targets.num_present)} "
                "classes; raise it to the largest number of classes in one image."
            )
        return targets

    def _stack(self, inputs, key, device, padding):
        maps = stack_on_device([x[key] for x in inputs], device)  # (B, H, W)
        return pad_to_multiple(maps, self.size_divisibility, padding)
