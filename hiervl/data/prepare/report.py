"""What a preparation found: counts against the expected ones, ids, pixels, and everything that is wrong, by name."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tabulate import tabulate

from ..datasets import DatasetTable
from .masks import Job, Outcome

_SHOWN = 20  # notes of one kind; problems are all shown


@dataclass
class PartReport:
    """Of one part.

    Attributes:
        counts: (256,) pixels per id.
        images, masks, made: images looked at; masks that are right; of these, made just now.
        seconds: how long it took, with so many ``workers``.
        expected: the official number of images, None if there is none.
        problems, notes: lines.
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
            f"{self.name}: {self.images} images{expected}, {self.masks} masks right, {self.made} of them made now, "
            f"{len(self.problems)} problems; {self.seconds:.1f} s, {rate}, {self.workers} processes"
        )


def describe(table: DatasetTable, parts: Sequence[PartReport], remarks: Sequence[str] = ()) -> str:
    """The final report as text, with ``remarks`` on the whole; problems are left out, they go to the error stream."""
    lines = [part.headline() for part in parts]
    labeled = [part for part in parts if part.counts.any()]
    if labeled:
        lines += ["", _pixels(table, labeled), *_unseen(table, labeled)]
    lines += [f"note: {remark}" for remark in remarks]
    notes = [note for part in parts for note in part.notes]
    lines += [f"note: {note}" for note in notes[:_SHOWN]]
    if len(notes) > _SHOWN:
        lines.append(f"note: and {len(notes) - _SHOWN} more of this kind")
    return "\n".join(lines)


def _pixels(table: DatasetTable, parts: Sequence[PartReport]) -> str:
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


def _unseen(table: DatasetTable, parts: Sequence[PartReport]) -> list[str]:
    lines = []
    for part in parts:
        unseen = [f"{i} {name}" for i, name in enumerate(table.classes) if not part.counts[i]]
        if unseen:
            lines.append(f"{part.name}: no pixel of {', '.join(unseen)}")
    return lines
