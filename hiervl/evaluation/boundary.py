"""Boundary IoU: how accurate mask outlines are. Cheng et al., "Boundary IoU", CVPR 2021.

For large masks, IoU barely reflects errors at the outline; Boundary IoU counts only pixels near the outline. It takes
several times as long as the confusion matrix and is therefore optional.
"""

import cv2
import numpy as np

DIAGONAL_SHARE = 0.02  # width of the boundary region, as a fraction of the image's diagonal


class BoundaryIoU:
    """Counts, for each class, the pixels of both boundary regions and of their intersection over a whole dataset.

    The boundary region of a mask consists of its pixels within distance d of a pixel outside the mask. d is 2% of the
    image's diagonal, at least 1 pixel, in the chessboard metric (d erosions with a 3x3 square). The image border
    counts as outside. Ignored pixels belong to no mask, neither in the ground truth nor in the prediction.

    Args:
        num_classes: K.
        ignore_label: value of the label map that is not counted.

    Attributes:
        shared, truth, predicted: (K,) int64, pixels in both boundary regions, in that of the ground truth and in that
            of the prediction.
    """

    def __init__(self, num_classes: int, ignore_label: int = 255):
        self.num_classes, self.ignore_label = num_classes, ignore_label
        self.shared, self.truth, self.predicted = (np.zeros(num_classes, np.int64) for _ in range(3))

    def update(self, label: np.ndarray, prediction: np.ndarray) -> None:
        """Counts one image.

        Args:
            label: (H, W) class ids and ignored pixels. Must be in range; this is not checked.
            prediction: (H, W) class ids. Must be in range; this is not checked.
        """
        ignored = label == self.ignore_label
        # Id K marks ignored pixels in both maps. OpenCV cannot erode integers of more than 16 bits.
        dtype = np.uint8 if self.num_classes < 256 else np.uint16
        label, prediction = (np.where(ignored, self.num_classes, ids).astype(dtype) for ids in (label, prediction))
        distance = max(1, round(DIAGONAL_SHARE * float(np.hypot(*label.shape))))
        label_boundary, predicted_boundary = (boundary_region(ids, distance) for ids in (label, prediction))
        self.truth += self._count(label[label_boundary])
        self.predicted += self._count(prediction[predicted_boundary])
        self.shared += self._count(label[label_boundary & predicted_boundary & (label == prediction)])

    def merge(self, other: "BoundaryIoU") -> None:
        """Adds the counts of other images, such as those of another rank."""
        self.shared += other.shared
        self.truth += other.truth
        self.predicted += other.predicted

    def iou(self) -> np.ndarray:
        """Boundary IoU of each class, (K,) in percent; NaN for a class in neither ground truth nor prediction."""
        union = self.truth + self.predicted - self.shared
        return 100 * np.divide(self.shared, union, out=np.full(len(union), np.nan), where=union > 0)

    def mean(self) -> float:
        """Mean over the classes in the ground truth, in percent; NaN if no pixel is labeled."""
        return float(self.iou()[self.truth > 0].mean()) if self.truth.any() else float("nan")

    def _count(self, ids):
        """Pixels per class: (N,) ids -> (K,)."""
        return np.bincount(ids, minlength=self.num_classes + 1)[: self.num_classes]


def boundary_region(ids: np.ndarray, distance: int) -> np.ndarray:
    """Finds the pixels that have a different id, or the image's border, within ``distance``.

    All classes are processed at once: a square window contains a single id if and only if its minimum equals its
    maximum.

    Args:
        ids: (H, W) uint8 or uint16.
        distance: half the width of the window, pixels, >= 1.

    Returns:
        (H, W) bool.
    """
    window = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    boundary = cv2.erode(ids, window) != cv2.dilate(ids, window)
    boundary[:distance] = boundary[-distance:] = True
    boundary[:, :distance] = boundary[:, -distance:] = True
    return boundary
