"""One image of a dataset: looked at, its mask made or found, and counted. The same for every dataset."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from ...errors import UserError
from ..datasets import check_label
from ..images import image_size, inspect_image, read_label
from .files import WriteError, write_label


@dataclass(frozen=True)
class Job:
    """An image and what is to be made for it.

    Attributes:
        image: its path.
        mask: the path of the mask to make; "" for an unlabeled image, which is only looked at.
        source: the file that the mask is made from; a mask older than it is made again. "": made from what never
            changes.
        key: what else the maker has to know.
        instances: the path of the instance map to make; "" for none.
    """

    image: str
    mask: str = ""
    source: str = ""
    key: object = None
    instances: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a job: ``counts`` (256,) pixels per id; ``problem`` and ``note`` are lines, or ""."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    made: bool = False
    problem: str = ""
    note: str = ""


# (job, (H, W) of the image) -> ids uint8 (H, W), instance numbers uint16 (H, W) or None
Maker = Callable[[Job, tuple[int, int]], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class MaskTask:
    """``task(job)`` -> Outcome. A mask that is there and right is counted, any other is made (resumable).

    Attributes:
        make: of this dataset.
        num_classes, ignore_label: which ids are right.
        palette: colors of the PNGs.
        check: make nothing; what is missing or wrong is a problem.
    """

    make: Maker
    num_classes: int
    ignore_label: int
    palette: bytes
    check: bool = False

    def __call__(self, job: Job) -> Outcome:
        try:
            size, note = inspect_image(job.image)
            note = note and f"{job.image}: {note}"
            if not job.mask:
                return Outcome(note=note)
            label = self._find(job, size)
            made = label is None
            if made:
                label = self._make(job, size)
            return Outcome(np.bincount(label.ravel(), minlength=256), made, note=note)
        except WriteError:
            raise
        except UserError as error:
            return Outcome(problem=str(error))

    def objection(self, job: Job) -> str:
        """Why the mask that is there would be made again; "" if it is left alone."""
        try:
            size, _ = inspect_image(job.image)
        except UserError as error:  # then no mask is made either, unless the image itself comes from elsewhere
            return "" if os.path.exists(job.image) else str(error)
        try:
            replace(self, check=True)._find(job, size)
            return ""
        except UserError as error:
            return str(error)

    def _find(self, job: Job, size: tuple[int, int]) -> np.ndarray | None:
        """The mask that is there already; None if it has to be made."""
        try:
            _check_age(job)
            label = read_label(job.mask)
            check_label(label, job.mask, job.image, size, self.num_classes, self.ignore_label)
            if job.instances and image_size(job.instances) != size:
                raise UserError(f"{job.instances} has another size than its image")
            return label
        except UserError:
            if self.check:
                raise
            return None

    def _make(self, job: Job, size: tuple[int, int]) -> np.ndarray:
        label, instances = self.make(job, size)
        check_label(label, job.source or job.mask, job.image, size, self.num_classes, self.ignore_label)
        if job.instances:
            write_label(job.instances, instances)
        write_label(job.mask, label, self.palette)
        return label


class Remap:
    """Maker that reads an indexed mask and replaces its ids by a table.

    Args:
        table: {id in the source: id in the mask}; any other id is an error.
        what: of which ids these are, for that error.
    """

    def __init__(self, table: dict[int, int], what: str) -> None:
        self._lut = np.full(256, -1, np.int16)
        self._lut[list(table)] = list(table.values())
        self._what = what

    def __call__(self, job: Job, size: tuple[int, int]) -> tuple[np.ndarray, None]:
        label = read_label(job.source)
        stray = label > 255 if label.dtype != np.uint8 else self._lut[label] < 0
        if stray.any():
            raise UserError(
                f"{job.source} has the id {label[stray][0]}, which is none of {self._what}; replace the file"
            )
        return self._lut[label].astype(np.uint8), None


def _check_age(job: Job) -> None:
    for path in filter(None, (job.mask, job.instances)):
        if not os.path.exists(path):
            raise UserError(f"{path} is missing; run without --check to make it")
        if job.source and os.path.exists(job.source) and os.path.getmtime(job.source) > os.path.getmtime(path):
            raise UserError(f"{path} is older than {job.source}; run without --check to make it again")
