"""Confusion matrix of a label map and a prediction, and every score that follows from it.

One matrix over the whole data set holds all that mIoU needs, so memory does not grow with the number of images
and the matrices of several ranks simply add up.
"""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from ..errors import UserError

# Label maps are smooth: neighbours fall into the same bin, and each increment waits for the one before it.
# Counting neighbours in separate copies of the histogram breaks that chain.
_LANES = 4
_CHUNK = 1 << 18  # pixels counted at a time: the temporaries then stay in the cache
_INT16_BINS = 1 << 15
_MAX_THREADS = 8  # more would wait for memory


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
        if prediction.size == 0:
            return
        if prediction.min() < 0 or prediction.max() >= self.num_classes:
            raise ValueError(f"predicted class outside [0, {self.num_classes}): {_range(prediction)}")
        count = self._count_8bit if label.dtype == np.uint8 and self.num_classes <= 256 else self._count_wide
        counts, ignored = count(label, prediction, source)
        self.counts += counts
        self.ignored += ignored

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds the counts of another matrix over the same classes (another rank's)."""
        self.counts += other.counts
        self.ignored += other.ignored

    def _count_8bit(self, label, prediction, source):
        """Counts all 256 possible labels and looks at the rows afterwards: no pass over the pixels to check them."""
        k = self.num_classes
        table = histogram_8bit(label, prediction, k)  # (256, K)
        pixels = table.sum(1)
        stray = [v for v in np.flatnonzero(pixels[k:]) + k if v != self.ignore_label]
        if stray:
            raise self._stray_label(int(stray[0]), int(pixels[stray].sum()), source)
        ignored = int(pixels[self.ignore_label]) if k <= self.ignore_label < 256 else 0
        return table[:k], ignored

    def _count_wide(self, label, prediction, source):
        """For labels of more than 8 bits: ignored pixels become row K, so that there are no more than K + 1 rows."""
        k = self.num_classes
        # An unsigned type may be unable to hold the ignore label (-1), and uint8 cannot hold K.
        label = label.astype(np.int64, copy=False)
        stray = ((label < 0) | (label >= k)) & (label != self.ignore_label)
        if stray.any():
            raise self._stray_label(int(label[stray][0]), int(stray.sum()), source)
        table = histogram_2d(np.where(label == self.ignore_label, k, label), k + 1, prediction, k)
        return table[:k], int(table[k].sum())

    def _stray_label(self, value, pixels, source):
        return UserError(
            f"{source}: label {value} ({pixels} pixels out of range) is neither one of the {self.num_classes} classes "
            f"(0 to {self.num_classes - 1}) nor the ignore label {self.ignore_label}; correct the label map, "
            "the class list or the ignore label"
        )


def histogram_8bit(rows: np.ndarray, columns: np.ndarray, num_columns: int) -> np.ndarray:
    """Counts pairs (row, column) of two (H, W) arrays: uint8, and integers in [0, num_columns), unchecked.

    OpenCV counts in integers, without a copy of its input; several threads take a share of the image each.

    Returns:
        (256, num_columns) int64.
    """
    columns = columns.astype(np.uint8, copy=False)
    threads = min(_MAX_THREADS, torch.get_num_threads())
    # Counts come back as float32, which is exact up to 2**24.
    parts = max(threads if rows.size >= _CHUNK else 1, -(-rows.size // (1 << 24)))

    def count(part):
        return cv2.calcHist(list(part), [0, 1], None, [256, num_columns], [0, 256, 0, num_columns]).astype(np.int64)

    shares = zip(*(np.array_split(np.ascontiguousarray(x).reshape(-1), parts) for x in (rows, columns)))
    if parts == 1:
        return count(next(shares))
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(count, shares))


def histogram_2d(rows: np.ndarray, num_rows: int, columns: np.ndarray, num_columns: int) -> np.ndarray:
    """Counts pairs (row, column) of equally many integers in [0, num_rows) and [0, num_columns), unchecked.

    Cells are numbered in the smallest type that holds them and counted by torch.bincount, which, unlike NumPy's,
    does not first copy its input to int64.

    Returns:
        (num_rows, num_columns) int64.
    """
    bins = num_rows * num_columns
    lanes = _LANES if _LANES * bins <= _INT16_BINS else 1
    cell_type = np.int16 if lanes * bins <= _INT16_BINS else np.int32
    rows, columns = rows.reshape(-1), columns.reshape(-1)
    chunk = max(_CHUNK, 8 * bins)  # adding up large tables must not cost more than the counting
    lane_start = np.tile(np.arange(lanes, dtype=cell_type) * bins, min(chunk, rows.size) // lanes + 1)
    counts = torch.zeros(lanes * bins, dtype=torch.int64)
    for start in range(0, rows.size, chunk):
        part = slice(start, start + chunk)
        cells = np.multiply(rows[part], cell_type(num_columns), dtype=cell_type, casting="unsafe")
        np.add(cells, columns[part], out=cells, casting="unsafe")
        if lanes > 1:
            cells += lane_start[:cells.size]
        counts += torch.bincount(torch.from_numpy(cells), minlength=lanes * bins)
    return counts.view(lanes, num_rows, num_columns).sum(0).numpy()


@dataclass(frozen=True)
class Scores:
    """Scores of one confusion matrix, in percent. NaN where a score is not defined.

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


def scores(counts: np.ndarray) -> Scores:
    """Computes every score of a (K, K) confusion matrix (rows: ground truth).

    Raises:
        ValueError: no pixel was counted, so that no score is defined.
    """
    counts = counts.astype(np.float64)
    hits, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    total, union = truth.sum(), truth + predicted - hits
    if total == 0:
        raise ValueError("no labelled pixel was counted")
    iou = _ratio(hits, union)
    return Scores(
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


def _range(values):
    return f"{values.min()} to {values.max()}"
