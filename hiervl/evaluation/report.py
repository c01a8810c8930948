"""Plain-text tables of evaluation results: per class, reliability, and last against best.

``result`` is always the content of a result file, from load_result or from ``SegmentationEvaluator.result``.
"""

import json
import math

from tabulate import tabulate

from ..errors import UserError
from .evaluator import RESULT_FORMAT


def load_result(path: str) -> dict:
    """Reads a result file that the evaluator wrote (None stands for a score that is not defined).

    Raises:
        UserError: the file is missing or is something else.
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
    """IoU, precision, recall (percent), boundary IoU where it was measured, share of pixels per class, and the means.

    Args:
        result: content of a result file.
        previous: another one over the same classes; rows are then sorted by the gain in IoU over it.

    Raises:
        UserError: the two results have different class lists.
    """
    if previous is not None and sorted(previous["classes"]) != sorted(result["classes"]):
        raise UserError("the previous result has other classes; compare results of one data set and class list")
    scores, pixels = result["per_class"], max(result["pixels"], 1)
    rows = [
        [name, scores["iou"][i], scores["precision"][i], scores["recall"][i], 100 * scores["pixels"][i] / pixels]
        for i, name in enumerate(result["classes"])
    ]
    headers = ["class", "IoU", "precision", "recall", "% of pixels"]
    if "boundary_iou" in scores:
        rows = [[*row, iou] for row, iou in zip(rows, scores["boundary_iou"])]
        headers.append("boundary IoU")
    if previous is not None:
        before = dict(zip(previous["classes"], previous["per_class"]["iou"]))
        rows = [[*row, before[row[0]], _minus(row[1], before[row[0]])] for row in rows]
        rows.sort(key=lambda row: -math.inf if row[-1] is None else row[-1], reverse=True)
        headers += ["IoU before", "gain"]
    return _table(rows, headers) + "\n\n" + _means_table(result, previous)


def reliability_table(result: dict) -> str:
    """Reliability of the top class's probability: the 15 bins, and what confidence thresholds would keep."""
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
    """Last and best evaluation of every model (student, teacher) on every data set.

    The best one was chosen on images it is reported on; the last one was not, and is the figure to quote.

    Args:
        results: {"last": entry, "best": entry}, an entry being {"iteration": i, data set: {model: metrics}}: what a
            training run writes to ``results.json``.
    """
    last, best = results["last"], results["best"]
    rows = [
        [
            dataset,
            model,
            scores.get(metric),
            last["iteration"],
            best.get(dataset, {}).get(model, {}).get(metric),
            best["iteration"],
        ]
        for dataset, models in last.items()
        if dataset != "iteration"
        for model, scores in models.items()
    ]
    return _table(rows, ["data set", "model", f"last {metric}", "at iteration", f"best {metric}", "at iteration"])


def _means_table(result, previous):
    names = [
        n for n in ("mIoU", "mIoU_union", "mIoU_all", "fwIoU", "pACC", "boundary_mIoU", "ECE") if n in result["metrics"]
    ]
    headers = ["score", "%", "what it is"]
    rows = [[n, result["metrics"][n], result["definitions"][n]] for n in names]
    if previous is not None:
        headers[2:2] = ["before", "gain"]
        for row in rows:
            before = previous["metrics"].get(row[0])
            row[2:2] = [before, _minus(row[1], before)]
    return _table(rows, headers)


def _table(rows, headers):
    return tabulate(rows, headers, floatfmt=".2f", missingval="-")


def _minus(a, b):
    return None if a is None or b is None else a - b


def _percent(share):
    return None if share is None else 100 * share
