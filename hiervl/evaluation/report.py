"""Plain-text tables of evaluation results: per class, reliability, and last versus best.

``result`` is always the content of a result file, from load_result or ``SegmentationEvaluator.result``.
"""

import json
import math

from tabulate import tabulate

from ..errors import UserError
from .evaluator import RESULT_FORMAT


def load_result(path: str) -> dict:
    """Reads a result file written by the evaluator. Undefined metrics are None.

    Raises:
        UserError: the file is missing or not a result file of this version.
    """
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such result file; an evaluation writes it to its output folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())}); evaluate again") from None
    if not isinstance(result, dict) or result.get("format") != RESULT_FORMAT:
        raise UserError(f"{path}: not a result file of this version (format {RESULT_FORMAT}); evaluate again")
    return result


def per_class_table(result: dict, previous: dict | None = None) -> str:
    """Formats IoU, precision, recall, share of pixels and, if measured, boundary IoU per class, and the means.

    Args:
        result: content of a result file.
        previous: content of another result file over the same classes; rows are then sorted by the gain in IoU.

    Raises:
        UserError: the two results have different class lists.
    """
    if previous is not None and sorted(previous["classes"]) != sorted(result["classes"]):
        raise UserError(
            "the previous result has other classes; compare only results with the same dataset and class list"
        )
    per_class, pixels = result["per_class"], max(result["pixels"], 1)
    rows = [
        [
            name,
            per_class["iou"][i],
            per_class["precision"][i],
            per_class["recall"][i],
            100 * per_class["pixels"][i] / pixels,
        ]
        for i, name in enumerate(result["classes"])
    ]
    headers = ["class", "IoU", "precision", "recall", "% of pixels"]
    if "boundary_iou" in per_class:
        rows = [[*row, iou] for row, iou in zip(rows, per_class["boundary_iou"])]
        headers.append("boundary IoU")
    if previous is not None:
        previous_iou = dict(zip(previous["classes"], previous["per_class"]["iou"]))
        rows = [[*row, previous_iou[row[0]], _difference(row[1], previous_iou[row[0]])] for row in rows]
        rows.sort(key=lambda row: -math.inf if row[-1] is None else row[-1], reverse=True)  # undefined gains last
        headers += ["IoU before", "gain"]
    return _table(rows, headers) + "\n\n" + _means_table(result, previous)


def reliability_table(result: dict) -> str:
    """Formats the reliability of the top class's probability: the 15 bins and the effect of confidence thresholds."""
    if not result.get("reliability"):
        return "reliability was not measured"
    pixels = max(result["pixels"], 1)
    bins = [
        [
            f"{b['low']:.2f}-{b['high']:.2f}",
            100 * b["pixels"] / pixels,
            _percent(b["confidence"]),
            _percent(b["accuracy"]),
        ]
        for b in result["reliability"]["bins"]
        if b["pixels"]
    ]
    kept = [
        [f"{t['threshold']:.2f}", _percent(t["kept"]), _percent(t["accuracy"])]
        for t in result["reliability"]["thresholds"]
    ]
    return "\n\n".join(
        [
            f"expected calibration error: {result['metrics']['ECE']:.2f} (percent)",
            _table(bins, ["confidence", "% of pixels", "mean confidence", "accuracy"]),
            _table(kept, ["threshold", "% kept", "accuracy of kept"]),
        ]
    )


def summary_table(results: dict, metric: str = "mIoU") -> str:
    """Formats the last and best evaluation of each model (student, teacher) on each dataset.

    The best evaluation was selected on the same images it is reported on, so quote the last one.

    Args:
        results: content of a training run's ``results.json``: {"last": entry, "best": entry}, where an entry is
            {"iteration": i, dataset: {model: metrics}}.
        metric: name of the metric to show.
    """
    last, best = results["last"], results["best"]
    rows = [
        [
            dataset,
            model,
            metrics.get(metric),
            last["iteration"],
            best.get(dataset, {}).get(model, {}).get(metric),
            best["iteration"],
        ]
        for dataset, models in last.items()
        if dataset != "iteration"
        for model, metrics in models.items()
    ]
    return _table(rows, ["dataset", "model", f"last {metric}", "at iteration", f"best {metric}", "at iteration"])


def _means_table(result, previous):
    """Formats the metrics over all classes, compared with those of ``previous`` unless that is None."""
    names = [
        n for n in ("mIoU", "mIoU_union", "mIoU_all", "fwIoU", "pACC", "boundary_mIoU", "ECE") if n in result["metrics"]
    ]
    headers = ["metric", "%", "definition"]
    rows = [[n, result["metrics"][n], result["definitions"][n]] for n in names]
    if previous is not None:
        headers[2:2] = ["before", "gain"]
        for row in rows:
            previous_value = previous["metrics"].get(row[0])
            row[2:2] = [previous_value, _difference(row[1], previous_value)]
    return _table(rows, headers)


def _table(rows, headers):
    return tabulate(rows, headers, floatfmt=".2f", missingval="-")


def _difference(a, b):
    """a - b, None if either is undefined."""
    return None if a is None or b is None else a - b


def _percent(share):
    """A share in [0, 1] in percent; None if it is undefined."""
    return None if share is None else 100 * share
