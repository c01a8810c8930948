"""Confusion matrix of label maps and predictions, and all metrics derived from it.

A single matrix over the whole dataset is all that mIoU needs. Memory therefore does not grow with the number of
images, and the matrices of several ranks are simply added.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UserError
from ..ops.extension import has_kernel

_KERNEL_TYPES = (np.uint8, np.int16, np.int32, np.int64)
_CHUNK = 1 << 18  # pixels counted at a time without the kernel, so that temporaries stay in the cache


class ConfusionMatrix:
    """Counts pixels by (ground-truth class, predicted class).

    Args:
        num_classes: K.
        ignore_label: value of the label map that is not counted.

    Attributes:
        counts: (K, K) int64; row = ground truth, column = prediction.
        ignored: number of pixels with the ignore label.

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
            source: name for error messages, usually the label map's file.

        Raises:
            UserError: a label is neither a class id nor the ignore label. No pixel of the image is counted then.
            ValueError: the shapes differ, or a predicted class is out of range (a bug in the caller).
        """
        if label.shape != prediction.shape:
            raise ValueError(f"label {label.shape} and prediction {prediction.shape} differ in shape")
        k = self.num_classes
        table = count_pairs(label, prediction, k, self.ignore_label)
        if table[:, k].any():
            raise ValueError(f"predicted class outside [0, {k}): {prediction.min()} to {prediction.max()}")
        if table[k + 1].any():
            raise self._invalid_label_error(label, source)
        self.counts += table[:k, :k]
        self.ignored += int(table[k].sum())

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds the counts of another matrix over the same classes, such as that of another rank."""
        self.counts += other.counts
        self.ignored += other.ignored

    def _invalid_label_error(self, label, source):
        k = self.num_classes
        invalid = label[((label < 0) | (label >= k)) & (label != self.ignore_label)]
        return UserError(
            f"{source}: label {invalid[0]} ({invalid.size} pixels out of range) is neither one of the {k} classes "
            f"(0 to {k - 1}) nor the ignore label {self.ignore_label}; correct the label map, "
            "the class list or the ignore label"
        )


def count_pairs(label: np.ndarray, prediction: np.ndarray, num_classes: int, ignore_label: int) -> np.ndarray:
    """Counts pixels by (label, prediction), with extra rows and a column for ignored and out-of-range values.

    Args:
        label, prediction: integers of the same shape.
        num_classes: K.
        ignore_label: value of ignored pixels in the label map.

    Returns:
        (K + 2, K + 1) int64. Row K counts ignored labels; row K + 1 and column K count values out of range.
    """
    label, prediction = _tensor(label), _tensor(prediction)
    count = torch.ops.hiervl.confusion_counts if has_kernel("cpu") else _count_without_kernel
    return count(label, prediction, num_classes, ignore_label).numpy()


def _tensor(array):
    """Flattens an array to a contiguous tensor, converted to int64 if the kernel does not support its type."""
    array = np.ascontiguousarray(array).reshape(-1)
    return torch.from_numpy(array if array.dtype in _KERNEL_TYPES else array.astype(np.int64))


def _count_without_kernel(label, prediction, k, ignore_label):
    """PyTorch implementation of hiervl::confusion_counts, for (N,) labels and predictions."""
    counts = torch.zeros((k + 2) * (k + 1), dtype=torch.int64)
    for truth, predicted in zip(label.split(_CHUNK), prediction.split(_CHUNK)):
        truth, predicted = truth.long(), predicted.long()
        extra_row = torch.where(truth == ignore_label, k, k + 1)
        rows = torch.where((truth >= 0) & (truth < k), truth, extra_row)
        columns = torch.where((predicted >= 0) & (predicted < k), predicted, k)
        counts += torch.bincount(rows * (k + 1) + columns, minlength=len(counts))
    return counts.view(k + 2, k + 1)


@dataclass(frozen=True)
class SegmentationMetrics:
    """Metrics of one confusion matrix, in percent. Undefined metrics are NaN.

    Attributes:
        miou: mean IoU over the classes in the ground truth (the metric that HierVL reports as "mIoU").
        miou_union: mean IoU over the classes in the ground truth or in the prediction (non-empty union).
        miou_all: mean IoU over all K classes, counting a class with an empty union as 0.
        fwiou: mean IoU weighted by the share of ground-truth pixels.
        pacc: share of correctly classified pixels.
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
    """Computes all metrics of a (K, K) confusion matrix (rows: ground truth).

    Raises:
        ValueError: no pixel was counted, so no metric is defined.
    """
    counts = counts.astype(np.float64)
    true_positives, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)  # (K,) each
    total, union = truth.sum(), truth + predicted - true_positives
    if total == 0:
        raise ValueError("no labeled pixel was counted")
    iou = _ratio(true_positives, union)
    return SegmentationMetrics(
        miou=100 * iou[truth > 0].mean(),
        miou_union=100 * iou[union > 0].mean(),
        miou_all=100 * np.nan_to_num(iou).mean(),
        fwiou=100 * float((truth[truth > 0] / total * iou[truth > 0]).sum()),
        pacc=100 * true_positives.sum() / total,
        iou=100 * iou,
        precision=100 * _ratio(true_positives, predicted),
        recall=100 * _ratio(true_positives, truth),
    )


def _ratio(numerator, denominator):
    """Elementwise ratio of (K,) arrays, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)
