"""Evaluation of semantic segmentation; knows no model."""
from .calibration import Calibration
from .confusion import ConfusionMatrix, Scores, scores
from .evaluator import SegmentationEvaluator
from .report import load_result, per_class_table, read_history, reliability_table, summary_table

__all__ = [
    "Calibration", "ConfusionMatrix", "Scores", "SegmentationEvaluator", "load_result", "per_class_table",
    "read_history", "reliability_table", "scores", "summary_table",
]
