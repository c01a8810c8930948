"""Human-readable output of an evaluation: tables as text, the confusion matrix as CSV and as an image."""

import csv
import io
import os

import numpy as np
from matplotlib.figure import Figure

from ..checkpoint import atomic_write
from .report import per_class_table, reliability_table

REPORT, CSV, PICTURE = "report.txt", "confusion.csv", "confusion.png"
_MAX_NAMED_CLASSES = 40  # with more classes, names and numbers would be too small to read
_MIN_SHOWN_SHARE = 0.01  # cells with smaller shares have no number


def write_report_files(result: dict, folder: str, previous: dict | None = None) -> None:
    """Writes report.txt, confusion.csv and confusion.png into ``folder``, each of them atomically.

    Args:
        result: content of a result file.
        folder: output folder.
        previous: content of another result file over the same classes, to compare with (see per_class_table).
    """
    protocol = f", {result['protocol']}" if result.get("protocol") else ""
    text = f"{result['dataset']}: {result['images']} images{protocol}\n\n{per_class_table(result, previous)}\n\n"
    text += f"{reliability_table(result)}\n"
    matrix = np.array(result["confusion_matrix"])
    for name, content in (
        (REPORT, text.encode()),
        (CSV, confusion_csv(matrix, result["classes"]).encode()),
        (PICTURE, confusion_picture(matrix, result["classes"])),
    ):
        with atomic_write(os.path.join(folder, name)) as file:
            file.write(content)


def confusion_csv(matrix: np.ndarray, classes: list[str]) -> str:
    """Formats the matrix (K, K), in pixels, with a row per ground-truth class and a column per predicted class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ground truth \\ predicted", *classes])
    writer.writerows([name, *row] for name, row in zip(classes, matrix.tolist()))
    return text.getvalue()


def confusion_picture(matrix: np.ndarray, classes: list[str]) -> bytes:
    """Draws the matrix (K, K) as a PNG of the share of each ground-truth class that was predicted as each class."""
    truth = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, truth, out=np.full(matrix.shape, np.nan), where=truth > 0)
    named = len(classes) <= _MAX_NAMED_CLASSES
    # Margin for the longest name, in inches. Matplotlib's automatic layout would draw everything twice.
    margin = 0.6 + (0.09 * max(map(len, classes)) if named else 0.2)
    field = 0.3 * len(classes) + 0.5 if named else 10.0
    edge = 0.1
    side = margin + field + edge
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((margin / side, margin / side, 1 - (margin + edge) / side, 1 - (margin + edge) / side))
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set_xlabel("predicted")
    axes.set_ylabel("ground truth")
    if named:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for row, column in zip(*np.nonzero(shares >= _MIN_SHOWN_SHARE)):
            share = shares[row, column]
            axes.text(
                column,
                row,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                fontsize=6,
                color="white" if share > 0.5 else "black",
            )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
