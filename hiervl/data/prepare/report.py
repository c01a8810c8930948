"""The report of a preparation: number of images against the official one, pixels per class, problems by file name."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tabulate import tabulate

from ..datasets import DatasetTable
from .masks import Job, Outcome

_MAX_NOTES = 20  # further notes are only counted; problems are all shown


@dataclass
class PartReport:
    """Report on one part of a dataset.

    Attributes:
        name: of the part, such as ``coco_train``.
        expected: official number of images; None if there is no such number.
        workers: number of processes.
        counts: (256,) number of pixels per id.
        images: number of images inspected.
        masks: number of valid masks.
        made: number of masks that this run made.
        seconds: duration.
        problems, notes: one line each.
    """

    name: str
    expected: int | None = None
    workers: int = 1
    counts: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    images: int = 0
    masks: int = 0
    made: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, job: Job, outcome: Outcome) -> None:
        self.images += 1
        self.counts += outcome.counts
        self.made += outcome.made
        self.masks += bool(job.mask) and not outcome.problem
        if outcome.problem:
            self.problems.append(outcome.problem)
        if outcome.note:
            self.notes.append(outcome.note)

    def headline(self) -> str:
        expected = "" if self.expected is None else f" ({self.expected} expected)"
        rate = f"{self.images / self.seconds:.0f} images/s" if self.seconds > 0 else ""
        return (
            f"{self.name}: {self.images} images{expected}, {self.masks} valid masks, {self.made} of them new, "
            f"{len(self.problems)} problems; {self.seconds:.1f} s, {rate}, {self.workers} processes"
        )


def describe(table: DatasetTable, parts: Sequence[PartReport], remarks: Sequence[str] = ()) -> str:
    """The final report as text. Problems are not included, because they go to stderr.

    Args:
        table: of the dataset.
        parts: one report per part.
        remarks: notes on the dataset as a whole.
    """
    lines = [part.headline() for part in parts]
    labeled = [part for part in parts if part.counts.any()]
    if labeled:
        lines += ["", _pixel_table(table, labeled), *_absent_classes(table, labeled)]
    lines += [f"note: {remark}" for remark in remarks]
    notes = [note for part in parts for note in part.notes]
    lines += [f"note: {note}" for note in notes[:_MAX_NOTES]]
    if len(notes) > _MAX_NOTES:
        lines.append(f"note: and {len(notes) - _MAX_NOTES} more")
    return "\n".join(lines)


def _pixel_table(table: DatasetTable, parts: Sequence[PartReport]) -> str:
    headers = ["id", "class"]
    for part in parts:
        headers += [f"{part.name}: pixels", "%"]
    ids = [*range(len(table.classes)), table.ignore_label]
    names = [*table.classes, "(ignored)"]
    rows = []
    for i, name in zip(ids, names):
        row = [i, name]
        for part in parts:
            row += [int(part.counts[i]), 100 * part.counts[i] / part.counts.sum()]
        rows.append(row)
    return tabulate(rows, headers, floatfmt=".2f")


def _absent_classes(table: DatasetTable, parts: Sequence[PartReport]) -> list[str]:
    lines = []
    for part in parts:
        absent = [f"{i} {name}" for i, name in enumerate(table.classes) if not part.counts[i]]
        if absent:
            lines.append(f"{part.name}: no pixels of {', '.join(absent)}")
    return lines
