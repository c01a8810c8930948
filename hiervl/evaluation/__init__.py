"""Evaluation of semantic segmentation; independent of the model."""

from .boundary import BoundaryIoU
from .calibration import Calibration
from .confusion import ConfusionMatrix, SegmentationMetrics, compute_metrics
from .evaluator import SegmentationEvaluator
from .report import load_result, per_class_table, reliability_table, summary_table
from .report_files import write_report_files

__all__ = [
    "BoundaryIoU",
    "Calibration",
    "ConfusionMatrix",
    "SegmentationMetrics",
    "SegmentationEvaluator",
    "load_result",
    "per_class_table",
    "reliability_table",
    "compute_metrics",
    "summary_table",
    "write_report_files",
]
