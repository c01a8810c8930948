"""Evaluation of semantic segmentation; knows no model."""
from .boundary import BoundaryIoU
from .calibration import Calibration
from .confusion import ConfusionMatrix, Scores, scores
from .evaluator import SegmentationEvaluator
from .report import load_result, per_class_table, reliability_table, summary_table
from .report_files import write_report_files

__all__ = [
    "BoundaryIoU", "Calibration", "ConfusionMatrix", "Scores", "SegmentationEvaluator", "load_result",
    "per_class_table", "reliability_table", "scores", "summary_table", "write_report_files",
]
