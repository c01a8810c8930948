"""What the criterion compares with: label maps with a validity weight per pixel, cut into segments.

Labelled and pseudo-labelled images are the same kind of object; they differ in their weights only.
"""
from dataclasses import dataclass

import cv2
import numpy as np
import torch


@dataclass
class Targets:
    """Targets of B images of one size.

    Attributes:
        sem_seg: (B, H, W) int64, the class of each pixel; meaningless where `weight` is 0.
        weight: (B, H, W) float in [0, 1]; 0 = ignore label, padding or a rejected pseudo-label.
        segments: (B, H, W) int64, index of the pixel's segment within its image, -1 for none.
        labels: B tensors (M_b,) int64, the class of each segment.
        image_weight: (B,) float, 1 for labelled images, the kept share for pseudo-labelled ones, 0 for an image
            without a valid pixel.
        no_object_weight: (B,) float, how much an unmatched query counts.
        unknown: (B, K) bool, classes that may hide in pixels that are not valid.
    """

    sem_seg: torch.Tensor
    weight: torch.Tensor
    segments: torch.Tensor
    labels: list
    image_weight: torch.Tensor
    no_object_weight: torch.Tensor
    unknown: torch.Tensor

    @property
    def counts(self) -> list:
        """Number of segments of each image."""
        return [len(labels) for labels in self.labels]


def build_targets(sem_seg, weight, num_classes, *, image_weight=None, unknown=None, segments="class_regions",
                  min_area=64, max_segments=50) -> Targets:
    """
    Args:
        sem_seg: (B, H, W) int64; ids outside 0..K-1 are not valid.
        weight: (B, H, W) float validity.
        image_weight: (B,) kept share, or None for labelled images.
        unknown: (B, K) bool, or None when every class without a pixel is known to be absent.
        segments: a key of SEGMENTS.
        min_area, max_segments: of components, in pixels and per image.
    """
    batch = len(sem_seg)
    weight = weight * ((sem_seg >= 0) & (sem_seg < num_classes))
    sem_seg = sem_seg.clamp(0, num_classes - 1)
    segment_map, labels = SEGMENTS[segments](sem_seg, weight > 0, num_classes, min_area, max_segments)
    has_pixel = (weight > 0).flatten(1).any(dim=1).to(weight.dtype)
    share = torch.ones_like(has_pixel) if image_weight is None else image_weight.to(weight.dtype)
    if unknown is None:
        unknown = torch.zeros(batch, num_classes, dtype=torch.bool, device=sem_seg.device)
    return Targets(sem_seg, weight, segment_map, labels, share * has_pixel, share * has_pixel, unknown)


def _class_regions(sem_seg, valid, num_classes, min_area, max_segments):
    """One segment per class that has a valid pixel."""
    batch = len(sem_seg)
    present = torch.zeros(batch, num_classes, dtype=torch.long, device=sem_seg.device)
    present.scatter_reduce_(1, sem_seg.flatten(1), valid.flatten(1).long(), "amax")  # (B, K)
    index = present.cumsum(1) - 1
    segments = index.gather(1, sem_seg.flatten(1)).view_as(sem_seg)
    return torch.where(valid, segments, -1), [row.nonzero()[:, 0] for row in present]


def _components(sem_seg, valid, num_classes, min_area, max_segments):
    """Connected components of the class regions, largest first; smaller or surplus ones belong to no segment."""
    segment_map, labels = torch.full_like(sem_seg, -1), []
    for b in range(len(sem_seg)):
        classes = torch.where(valid[b], sem_seg[b], -1).cpu().numpy()
        found = []
        for k in np.unique(classes[classes >= 0]):
            _, parts, stats, _ = cv2.connectedComponentsWithStats((classes == k).astype(np.uint8), connectivity=8)
            found += [(stats[i, cv2.CC_STAT_AREA], int(k), parts == i) for i in range(1, len(stats))
                      if stats[i, cv2.CC_STAT_AREA] >= min_area]
        found = sorted(found, key=lambda part: -part[0])[:max_segments]
        for index, (_, _, mask) in enumerate(found):
            segment_map[b][torch.from_numpy(mask).to(sem_seg.device)] = index
        labels.append(torch.tensor([k for _, k, _ in found], dtype=torch.long, device=sem_seg.device))
    return segment_map, labels


# What the instance queries are matched to, by the name that the config uses.
SEGMENTS = {"class_regions": _class_regions, "components": _components}
