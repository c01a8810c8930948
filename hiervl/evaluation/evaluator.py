"""Detectron2 evaluator for semantic segmentation, based on one confusion matrix and one reliability histogram.

It is independent of the model and uses only the model's input and output dicts.
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
    "mIoU_all": "mean IoU over all classes, counting those with an empty union as 0",
    "fwIoU": "mean IoU weighted by the share of ground-truth pixels",
    "pACC": "pixel accuracy: share of correctly classified pixels",
    "boundary_mIoU": "mean boundary IoU (2% of the diagonal) over the classes that occur in the ground truth",
    "ECE": "expected calibration error of the top class, 15 bins of equal width",
    "IoU": "TP / (TP + FP + FN) over the whole dataset, without ignored pixels",
    "confusion_matrix": "pixels; row = ground truth, column = prediction",
}
RESULT_FORMAT = "hiervl.segmentation.1"
RESULT_FILE = "segmentation.json"
_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class SegmentationEvaluator(DatasetEvaluator):
    """Compares predicted class probabilities with label maps, in memory that does not grow with the number of images.

    Args:
        dataset: name of a registered dataset whose metadata has ``stuff_classes``, or the class names themselves.
        output_dir: folder for ``segmentation.json``, created if missing; None writes nothing.
        ignore_label: value of ignored pixels in the label maps.
        calibration: also measure calibration, which requires scores in [0, 1].
        boundary: also measure boundary IoU.
        num_images: expected number of images over all ranks. evaluate() raises if the actual number differs: images
            were counted twice or not at all.
        protocol: description of the inference protocol (whole image, sliding window), for the result file.

    Attributes:
        result: content of the result file, on the main rank after evaluate(); see report.py for tables.
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
        self._with_calibration, self._with_boundary = calibration, boundary
        self.reset()

    def reset(self) -> None:
        """Discards all counts."""
        self._confusion = ConfusionMatrix(len(self.class_names), self.ignore_label)
        self._calibration = Calibration() if self._with_calibration else None
        self._boundary = BoundaryIoU(len(self.class_names), self.ignore_label) if self._with_boundary else None
        self._images = 0

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Counts a batch.

        Args:
            inputs: dicts with ``sem_seg_file_name``, the label map's path.
            outputs: dicts with ``sem_seg``, (K, H, W) float scores on any device, of the same size as the label map.
                If an output also has ``classes`` (K',), its scores are (K', H, W) and cover only those classes.

        Raises:
            UserError: a label map is missing, broken, of the wrong size or has a label out of range, or a score is
                not finite. The message names the label map's file.
            ValueError: the number of score channels differs from the number of classes, or calibration is measured
                and the scores are not probabilities.
        """
        for image, output in zip(inputs, outputs, strict=True):
            path = image.get("sem_seg_file_name")
            if not path:
                raise UserError(
                    f"{image.get('file_name', 'an image')}: no label map, so it cannot be evaluated; "
                    "evaluate on a dataset whose list names masks"
                )
            self._count(read_label(path), output["sem_seg"], path, output.get("classes"))
            self._images += 1

    def evaluate(self) -> OrderedDict | None:
        """Sums the counts of all ranks, writes the result file and logs mIoU.

        Returns:
            ``{"sem_seg": {"mIoU": …, "IoU-<class>": …}}`` on the main rank, with all metrics, including ECE, in
            percent; None on the other ranks.

        Raises:
            UserError: no pixel was scored, or the number of images is not ``num_images``.
        """
        parts = comm.gather((self._confusion, self._calibration, self._boundary, self._images))
        if not comm.is_main_process():
            return None
        confusion, calibration, boundary, images = _merged(parts)
        source = self.dataset or "the dataset"
        if self.num_images is not None and images != self.num_images:
            raise UserError(
                f"{source}: {images} images were scored instead of {self.num_images}; the test loader must "
                "give every image to exactly one rank"
            )
        if not confusion.counts.any():
            raise UserError(f"{source}: no labeled pixel in {images} images; check its list and its label maps")
        segmentation = compute_metrics(confusion.counts)
        self.result = _without_nan(self._describe(segmentation, confusion, calibration, boundary, images))
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
        per_class = {f"IoU-{name}": iou for name, iou in zip(self.class_names, segmentation.iou.tolist())}
        return OrderedDict(sem_seg={**metrics, **per_class})

    def _count(self, label: np.ndarray, class_scores: torch.Tensor, path: str, classes: torch.Tensor | None) -> None:
        """Counts one image: label (H, W) and scores (K, H, W), or (K', H, W) of only the `classes` (K',)."""
        k = len(self.class_names) if classes is None else len(classes)
        if class_scores.shape[0] != k:
            raise ValueError(f"scores have {class_scores.shape[0]} channels, but there are {k} classes")
        if tuple(class_scores.shape[1:]) != label.shape:
            height, width = class_scores.shape[1:]
            raise UserError(
                f"{path}: the label map is {label.shape[0]} x {label.shape[1]} (height x width), the "
                f"prediction {height} x {width}; is it the mask of another image?"
            )
        confidence, prediction = top_class(class_scores)  # (H, W) each
        if classes is not None:
            dtype = np.int16 if len(self.class_names) > 256 else np.uint8
            prediction = classes.cpu().numpy().astype(dtype)[prediction]  # position in `classes` -> class id
        if not torch.isfinite(confidence).all():
            raise UserError(
                f"{path}: the scores of this image are not finite, so the weights are broken or training "
                "diverged; evaluate an earlier checkpoint"
            )
        self._confusion.update(label, prediction, path)
        if self._boundary is not None:
            self._boundary.update(label, prediction)
        if self._calibration is not None:
            self._calibration.update(confidence, label == prediction, label != self.ignore_label)

    def _describe(
        self,
        segmentation: SegmentationMetrics,
        confusion: ConfusionMatrix,
        calibration: Calibration | None,
        boundary: BoundaryIoU | None,
        images: int,
    ) -> dict:
        """Builds the content of the result file. Undefined metrics are NaN."""
        metrics = OrderedDict(
            mIoU=segmentation.miou,
            mIoU_union=segmentation.miou_union,
            mIoU_all=segmentation.miou_all,
            fwIoU=segmentation.fwiou,
            pACC=segmentation.pacc,
        )
        per_class = _per_class(segmentation, confusion.counts)
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
    """Writes a result as JSON, atomically, and creates its folder if missing."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(result, file, allow_nan=False, ensure_ascii=False)
        file.write("\n")


def _merged(parts):
    """Sums (confusion, calibration, boundary, images) over ranks. What is not measured is None on every rank."""
    confusion, calibration, boundary, images = parts[0]
    for other_confusion, other_calibration, other_boundary, other_images in parts[1:]:
        confusion.merge(other_confusion)
        if calibration is not None:
            calibration.merge(other_calibration)
        if boundary is not None:
            boundary.merge(other_boundary)
        images += other_images
    return confusion, calibration, boundary, images


def _per_class(segmentation: SegmentationMetrics, counts: np.ndarray) -> dict:
    return {
        "iou": segmentation.iou.tolist(),
        "precision": segmentation.precision.tolist(),
        "recall": segmentation.recall.tolist(),
        "pixels": counts.sum(1).tolist(),
        "predicted": counts.sum(0).tolist(),
    }


def _without_nan(value):
    """Replaces each NaN in nested dicts and lists by None, because JSON does not support NaN."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
