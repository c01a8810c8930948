"""Detectron2 evaluator for semantic segmentation: one confusion matrix and one reliability histogram.

It knows no model: all it sees is the list of dicts that goes in and the list of dicts that comes out.
"""

import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..checkpoint import atomic_write
from ..data.images import read_label
from ..errors import UserError
from .boundary import BoundaryIoU
from .calibration import Calibration
from .confusion import ConfusionMatrix, SegmentationMetrics, compute_metrics
from .top_class import top_class

DEFINITIONS = {
    "mIoU": "mean IoU over the classes that occur in the ground truth",
    "mIoU_union": "mean IoU over the classes that occur in the ground truth or in the prediction",
    "mIoU_all": "mean IoU over all classes, those with an empty union counting as 0",
    "fwIoU": "mean IoU weighted by the share of ground-truth pixels",
    "pACC": "share of pixels that are right",
    "boundary_mIoU": "mean boundary IoU (2% of the diagonal) over the classes that occur in the ground truth",
    "ECE": "expected calibration error of the top class, 15 bins of equal width",
    "IoU": "TP / (TP + FP + FN) over the whole set, ignored pixels left out",
    "confusion_matrix": "pixels; row = ground truth, column = prediction",
}
RESULT_FORMAT = "hiervl.segmentation.1"
RESULT_FILE = "segmentation.json"
_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class SegmentationEvaluator(DatasetEvaluator):
    """SegmentationMetrics p̂ against label maps; memory does not grow with the number of images.

    Args:
        dataset: name of a registered data set whose metadata has ``stuff_classes``, or the class names themselves.
        output_dir: where ``segmentation.json`` is written (made if missing); None writes nothing.
        ignore_label: value of the label maps that is not scored.
        calibration: also measure reliability; the scores must then lie in [0, 1].
        boundary: also measure boundary IoU.
        num_images: if given, evaluate() refuses a count that differs: over several ranks no image may be counted
            twice or be left out.
        protocol: how the images were covered, for the result file.

    Attributes:
        result: after evaluate(), on the main rank: the content of the result file (see report.py for tables).
    """

    def __init__(
        self,
        dataset: str | Sequence[str],
        output_dir: str | None = None,
        *,
        ignore_label: int = 255,
        calibration: bool = True,
        boundary: bool = False,
        num_images: int | None = None,
        protocol: str | None = None,
    ):
        named = isinstance(dataset, str)
        self.dataset = dataset if named else None
        self.class_names = list(MetadataCatalog.get(dataset).stuff_classes if named else dataset)
        self.output_dir = output_dir
        self.ignore_label = ignore_label
        self.num_images = num_images
        self.protocol = protocol
        self.result = None
        self._calibrate, self._trace = calibration, boundary
        self.reset()

    def reset(self) -> None:
        """Forgets everything that was counted."""
        self._confusion = ConfusionMatrix(len(self.class_names), self.ignore_label)
        self._calibration = Calibration() if self._calibrate else None
        self._boundary = BoundaryIoU(len(self.class_names), self.ignore_label) if self._trace else None
        self._images = 0

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Counts a batch.

        Args:
            inputs: each with ``sem_seg_file_name``, the label map's path.
            outputs: each with ``sem_seg``, (K, H, W) float scores on any device at the label map's own size; or, with
                ``classes`` (K',), (K', H, W) scores of those classes alone.

        Raises:
            UserError: a label map is missing, broken, of another size, or holds a label out of range; a score is
                not a number. The message names the label map's file.
        """
        for image, output in zip(inputs, outputs, strict=True):
            path = image.get("sem_seg_file_name")
            if not path:
                raise UserError(
                    f"{image.get('file_name', 'an image')}: no label map, so it cannot be evaluated; "
                    "evaluate on a data set that lists masks"
                )
            self._count(read_label(path), output["sem_seg"], path, output.get("classes"))
            self._images += 1

    def evaluate(self) -> OrderedDict | None:
        """Adds up all ranks, writes the result file and logs the headline.

        Returns:
            on the main rank ``{"sem_seg": {"mIoU": …, "IoU-<class>": …}}``, in percent, ECE included; None elsewhere.

        Raises:
            UserError: nothing was scored, or ``num_images`` images were promised and another number came.
        """
        parts = comm.gather((self._confusion, self._calibration, self._boundary, self._images))
        if not comm.is_main_process():
            return None
        confusion, calibration, boundary, images = _merged(parts)
        source = self.dataset or "the data set"
        if self.num_images is not None and images != self.num_images:
            raise UserError(
                f"{source}: {images} images were scored instead of {self.num_images}; the test loader must "
                "give every image to exactly one rank"
            )
        if not confusion.counts.any():
            raise UserError(f"{source}: no labeled pixel in {images} images; check its list and its label maps")
        found = compute_metrics(confusion.counts)
        self.result = _without_nan(self._describe(found, confusion, calibration, boundary, images))
        if self.output_dir:
            write_result(os.path.join(self.output_dir, RESULT_FILE), self.result)
        metrics = self.result["metrics"]
        logging.getLogger(__name__).info(
            "%d images: mIoU %.2f (classes in the ground truth), %.2f (non-empty union), %.2f (all %d classes)",
            images,
            metrics["mIoU"],
            metrics["mIoU_union"],
            metrics["mIoU_all"],
            len(self.class_names),
        )
        per_class = {f"IoU-{name}": iou for name, iou in zip(self.class_names, found.iou.tolist())}
        return OrderedDict(sem_seg={**metrics, **per_class})

    def _count(self, label: np.ndarray, class_scores: torch.Tensor, path: str, classes: torch.Tensor | None) -> None:
        """One image: label (H, W) and scores (K, H, W), or (K', H, W) of `classes` (K',)."""
        k = len(self.class_names) if classes is None else len(classes)
        if class_scores.shape[0] != k:
            raise ValueError(f"{class_scores.shape[0]} channels of scores for {k} classes")
        if tuple(class_scores.shape[1:]) != label.shape:
            height, width = class_scores.shape[1:]
            raise UserError(
                f"{path}: the label map is {label.shape[0]} x {label.shape[1]} (height x width), the "
                f"prediction {height} x {width}; is it the mask of another image?"
            )
        confidence, prediction = top_class(class_scores)  # (H, W) each
        if classes is not None:
            wide = len(self.class_names) > 256
            prediction = classes.cpu().numpy().astype(np.int16 if wide else np.uint8)[prediction]
        if not torch.isfinite(confidence).all():
            raise UserError(
                f"{path}: the scores of this image are not finite; the weights are broken or training "
                "diverged: evaluate an earlier checkpoint"
            )
        self._confusion.update(label, prediction, path)
        if self._boundary is not None:
            self._boundary.update(label, prediction)
        if self._calibration is not None:
            self._calibration.update(confidence, label == prediction, label != self.ignore_label)

    def _describe(
        self,
        found: SegmentationMetrics,
        confusion: ConfusionMatrix,
        calibration: Calibration | None,
        boundary: BoundaryIoU | None,
        images: int,
    ) -> dict:
        """The content of the result file; NaN where a score is not defined."""
        metrics = OrderedDict(
            mIoU=found.miou, mIoU_union=found.miou_union, mIoU_all=found.miou_all, fwIoU=found.fwiou, pACC=found.pacc
        )
        per_class = _per_class(found, confusion.counts)
        if boundary is not None:
            metrics["boundary_mIoU"] = boundary.mean()
            per_class["boundary_iou"] = boundary.iou().tolist()
        reliability = None
        if calibration is not None:
            metrics["ECE"] = 100 * calibration.ece()
            reliability = {"bins": calibration.bins(), "thresholds": [calibration.above(t) for t in _THRESHOLDS]}
        return {
            "format": RESULT_FORMAT,
            "dataset": self.dataset,
            "images": images,
            "protocol": self.protocol,
            "pixels": int(confusion.counts.sum()),
            "ignored_pixels": confusion.ignored,
            "ignore_label": self.ignore_label,
            "units": "scores in percent; reliability in [0, 1]",
            "definitions": DEFINITIONS,
            "metrics": {name: float(value) for name, value in metrics.items()},
            "classes": self.class_names,
            "per_class": per_class,
            "reliability": reliability,
            "confusion_matrix": confusion.counts.tolist(),
        }


def write_result(path: str, result: dict) -> None:
    """Writes a result as JSON, whole or not at all; makes the folder."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(result, file, allow_nan=False, ensure_ascii=False)
        file.write("\n")


def _merged(parts):
    """Sums (confusion, calibration, boundary, images) over ranks; what is not measured is None on all of them."""
    confusion, calibration, boundary, images = parts[0]
    for other_confusion, other_calibration, other_boundary, other_images in parts[1:]:
        confusion.merge(other_confusion)
        if calibration is not None:
            calibration.merge(other_calibration)
        if boundary is not None:
            boundary.merge(other_boundary)
        images += other_images
    return confusion, calibration, boundary, images


def _per_class(found: SegmentationMetrics, counts: np.ndarray) -> dict:
    return {
        "iou": found.iou.tolist(),
        "precision": found.precision.tolist(),
        "recall": found.recall.tolist(),
        "pixels": counts.sum(1).tolist(),
        "predicted": counts.sum(0).tolist(),
    }


def _without_nan(value):
    """``value`` with None in place of every NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
