"""Confusion matrix of a label map and a prediction, and every score that follows from it.

One matrix over the whole data set holds all that mIoU needs, so memory does not grow with the number of images
and the matrices of several ranks simply add up.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UserError
from ..ops.extension import has_kernel

_KERNEL_TYPES = (np.uint8, np.int16, np.int32, np.int64)
_CHUNK = 1 << 18  # pixels counted at a time without the kernel: the temporaries then stay in the cache


class ConfusionMatrix:
    """Counts pixels by (class in the ground truth, class predicted).

    Args:
        num_classes: K.
        ignore_label: value of the label map that is not counted.

    Attributes:
        counts: (K, K) int64; row = ground truth, column = prediction.
        ignored: pixels that carried the ignore label.

    Raises:
        UserError: the ignore label is also a class id.
    """

    def __init__(self, num_classes: int, ignore_label: int = 255):
        if 0 <= ignore_label < num_classes:
            raise UserError(
                f"ignore label {ignore_label} is also the id of one of the {num_classes} classes; store the labels "
                "with 16 bits and choose an ignore label outside the class list, such as 65535"
            )
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.counts = np.zeros((num_classes, num_classes), np.int64)
        self.ignored = 0

    def update(self, label: np.ndarray, prediction: np.ndarray, source: str = "the label map") -> None:
        """Counts one image.

        Args:
            label: (H, W) integers: class ids and the ignore label.
            prediction: (H, W) integers in [0, K).
            source: what to name in an error, usually the label's file.

        Raises:
            UserError: a label that is neither a class id nor the ignore label. Nothing of the image is counted.
            ValueError: the two differ in shape, or a predicted class is out of range (a bug of the caller).
        """
        if label.shape != prediction.shape:
            raise ValueError(f"label {label.shape} and prediction {prediction.shape} differ in shape")
        k = self.num_classes
        table = count_pairs(label, prediction, k, self.ignore_label)
        if table[:, k].any():
            raise ValueError(f"predicted class outside [0, {k}): {prediction.min()} to {prediction.max()}")
        if table[k + 1].any():
            raise self._stray_label(label, source)
        self.counts += table[:k, :k]
        self.ignored += int(table[k].sum())

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds the counts of another matrix over the same classes (another rank's)."""
        self.counts += other.counts
        self.ignored += other.ignored

    def _stray_label(self, label, source):
        k = self.num_classes
        stray = label[((label < 0) | (label >= k)) & (label != self.ignore_label)]
        return UserError(
            f"{source}: label {stray[0]} ({stray.size} pixels out of range) is neither one of the {k} classes "
            f"(0 to {k - 1}) nor the ignore label {self.ignore_label}; correct the label map, "
            "the class list or the ignore label"
        )


def count_pairs(label: np.ndarray, prediction: np.ndarray, num_classes: int, ignore_label: int) -> np.ndarray:
    """Counts pixels by (label, prediction), with point_coords for what is neither a class nor ignored.

    Args:
        label, prediction: integers of one shape.

    Returns:
        (K + 2, K + 1) int64; row K: ignored; row K + 1 and column K: out of range.
    """
    label, prediction = _tensor(label), _tensor(prediction)
    count = torch.ops.hiervl.confusion_counts if has_kernel("cpu") else _count_without_kernel
    return count(label, prediction, num_classes, ignore_label).numpy()


def _tensor(array):
    """The array flat and contiguous, in its own type if the kernel knows it."""
    array = np.ascontiguousarray(array).reshape(-1)
    return torch.from_numpy(array if array.dtype in _KERNEL_TYPES else array.astype(np.int64))


def _count_without_kernel(label, prediction, k, ignore_label):
    """hiervl::confusion_counts in PyTorch."""
    counts = torch.zeros((k + 2) * (k + 1), dtype=torch.int64)
    for truth, guess in zip(label.split(_CHUNK), prediction.split(_CHUNK)):
        truth, guess = truth.long(), guess.long()
        outside = torch.where(truth == ignore_label, k, k + 1)
        rows = torch.where((truth >= 0) & (truth < k), truth, outside)
        columns = torch.where((guess >= 0) & (guess < k), guess, k)
        counts += torch.bincount(rows * (k + 1) + columns, minlength=len(counts))
    return counts.view(k + 2, k + 1)


@dataclass(frozen=True)
class SegmentationMetrics:
    """SegmentationMetrics of one confusion matrix, in percent. NaN where a score is not defined.

    Attributes:
        miou: mean IoU over the classes that occur in the ground truth (what HierVL means by "mIoU").
        miou_union: mean over the classes in the ground truth or in the prediction (non-empty union).
        miou_all: mean over all K classes, a class with an empty union counting as 0.
        fwiou: mean IoU weighted by the share of the ground truth's pixels.
        pacc: share of pixels that are right.
        iou: (K,) TP / (TP + FP + FN); NaN for a class with an empty union.
        precision: (K,) TP / (TP + FP); NaN for a class never predicted.
        recall: (K,) TP / (TP + FN); NaN for a class not in the ground truth.
    """

    miou: float
    miou_union: float
    miou_all: float
    fwiou: float
    pacc: float
    iou: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


def compute_metrics(counts: np.ndarray) -> SegmentationMetrics:
    """Computes every score of a (K, K) confusion matrix (rows: ground truth).

    Raises:
        ValueError: no pixel was counted, so that no score is defined.
    """
    counts = counts.astype(np.float64)
    hits, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    total, union = truth.sum(), truth + predicted - hits
    if total == 0:
        raise ValueError("no labeled pixel was counted")
    iou = _ratio(hits, union)
    return SegmentationMetrics(
        miou=100 * iou[truth > 0].mean(),
        miou_union=100 * iou[union > 0].mean(),
        miou_all=100 * np.nan_to_num(iou).mean(),
        fwiou=100 * float((truth[truth > 0] / total * iou[truth > 0]).sum()),
        pacc=100 * hits.sum() / total,
        iou=100 * iou,
        precision=100 * _ratio(hits, predicted),
        recall=100 * _ratio(hits, truth),
    )


def _ratio(part, whole):
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
