"""Boundary IoU: how well a mask's outline fits. Cheng et al., "Boundary IoU", CVPR 2021.

The IoU of two masks hardly notices their outline when they are large; here only pixels near the outline count. It
costs several times what the confusion matrix does and is therefore optional.
"""

import cv2
import numpy as np

DIAGONAL_SHARE = 0.02  # of the image's diagonal: how near is near


class BoundaryIoU:
    """Counts, per class, the pixels of the two boundary regions and of what they share, over the whole set.

    The boundary region of a mask are its pixels within d of a pixel that is not in the mask, d = 2% of the image's
    diagonal (at least 1 pixel, city-block corners included: d erosions by 3x3); the image's border bounds every mask.
    Ignored pixels belong to no mask of either side.

    Args:
        num_classes: K.
        ignore_label: value of the label map that is not counted.

    Attributes:
        shared, truth, predicted: (K,) int64 pixels: in both boundary regions, in that of the ground truth, in that
            of the prediction.
    """

    def __init__(self, num_classes: int, ignore_label: int = 255):
        self.num_classes, self.ignore_label = num_classes, ignore_label
        self.shared, self.truth, self.predicted = (np.zeros(num_classes, np.int64) for _ in range(3))

    def update(self, label: np.ndarray, prediction: np.ndarray) -> None:
        """Counts one image: (H, W) class ids, the label map with ignored pixels; both known to be in range."""
        void = label == self.ignore_label
        # K stands for "ignored" on both sides; 16 bits are what OpenCV erodes at most.
        kind = np.uint8 if self.num_classes < 256 else np.uint16
        label, prediction = (np.where(void, self.num_classes, ids).astype(kind) for ids in (label, prediction))
        distance = max(1, round(DIAGONAL_SHARE * float(np.hypot(*label.shape))))
        near_label, near_prediction = (boundary_region(ids, distance) for ids in (label, prediction))
        self.truth += self._count(label[near_label])
        self.predicted += self._count(prediction[near_prediction])
        self.shared += self._count(label[near_label & near_prediction & (label == prediction)])

    def merge(self, other: "BoundaryIoU") -> None:
        """Adds the counts of another set of images (another rank's)."""
        self.shared += other.shared
        self.truth += other.truth
        self.predicted += other.predicted

    def iou(self) -> np.ndarray:
        """(K,) in percent; NaN for a class that occurs on neither side."""
        union = self.truth + self.predicted - self.shared
        return 100 * np.divide(self.shared, union, out=np.full(len(union), np.nan), where=union > 0)

    def mean(self) -> float:
        """Mean over the classes that occur in the ground truth, in percent; NaN if there is none."""
        return float(self.iou()[self.truth > 0].mean()) if self.truth.any() else float("nan")

    def _count(self, ids):
        return np.bincount(ids, minlength=self.num_classes + 1)[: self.num_classes]


def boundary_region(ids: np.ndarray, distance: int) -> np.ndarray:
    """Pixels of a map of ids that have another id, or the image's border, within ``distance``.

    All classes at once: a square window holds one id only if its smallest and its largest are the same.

    Args:
        ids: (H, W) uint8 or uint16.

    Returns:
        (H, W) bool.
    """
    window = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    near = cv2.erode(ids, window) != cv2.dilate(ids, window)
    near[:distance] = near[-distance:] = True
    near[:, :distance] = near[:, -distance:] = True
    return near
