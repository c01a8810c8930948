"""Processes one image of a dataset: validates it, makes its mask unless a valid one exists, and counts its pixels."""

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
    """An image and the files to make for it.

    Attributes:
        image: path of the image.
        mask: path of the mask to make; "" for an unlabeled image, which is only validated.
        source: file that the mask is made from; a mask older than its source is made again. "" if there is no such
            file, or if it never changes.
        key: anything else that the maker needs to know.
        instances: path of the instance map to make; "" for none.
    """

    image: str
    mask: str = ""
    source: str = ""
    key: object = None
    instances: str = ""


@dataclass(frozen=True)
class Outcome:
    """Result of a job.

    Attributes:
        counts: int64 (256,), number of pixels per id.
        made: whether the mask was made, rather than found in place.
        problem, note: one line, or "".
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    made: bool = False
    problem: str = ""
    note: str = ""


class OutdatedError(UserError):
    """A file to make is missing, or older than its source."""


# (job, (H, W) of the image) -> ids uint8 (H, W), instance numbers uint16 (H, W) or None
Maker = Callable[[Job, tuple[int, int]], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class MaskTask:
    """Processes a job: ``task(job)`` returns an :class:`Outcome`.

    Valid masks are kept, so that an interrupted preparation can be continued.

    Attributes:
        make: makes the mask of a job.
        num_classes, ignore_label: the valid ids are 0 to num_classes - 1, and ignore_label.
        palette: colors of the PNGs, 256 x (R, G, B).
        check: make nothing; report masks that are missing, outdated or invalid as problems.
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
        except OutdatedError as error:  # raised with `check` only; otherwise the file is made
            return Outcome(problem=f"{error}; run without --check to make it")
        except UserError as error:
            return Outcome(problem=str(error))

    def objection(self, job: Job) -> str:
        """The reason why an existing mask would be overwritten; "" if it would be kept."""
        try:
            size, _ = inspect_image(job.image)
        except UserError as error:  # an image that does not exist yet is written before its mask
            return "" if os.path.exists(job.image) else str(error)
        try:
            replace(self, check=True)._find(job, size)
            return ""
        except UserError as error:
            return str(error)

    def _find(self, job: Job, size: tuple[int, int]) -> np.ndarray | None:
        """The existing mask, uint8 (H, W); None if it has to be made."""
        try:
            _check_age(job)
            label = read_label(job.mask)
            check_label(label, job.mask, job.image, size, self.num_classes, self.ignore_label)
            if job.instances and image_size(job.instances) != size:
                raise UserError(f"{job.instances} differs in size from its image")
            return label
        except UserError:
            if self.check:
                raise
            return None

    def _make(self, job: Job, size: tuple[int, int]) -> np.ndarray:
        """Makes the mask, uint8 (H, W), and writes it."""
        label, instances = self.make(job, size)
        check_label(label, job.source or job.mask, job.image, size, self.num_classes, self.ignore_label)
        if job.instances:
            write_label(job.instances, instances)
        write_label(job.mask, label, self.palette)
        return label


class Remap:
    """Maker that reads an indexed mask and maps its ids.

    Args:
        table: {id in the source: id in the mask}; any other id is an error.
        what: describes the valid source ids in error messages, such as "the ids 0 to 150 of ADE20K's masks".
    """

    def __init__(self, table: dict[int, int], what: str) -> None:
        self._lut = np.full(256, -1, np.int16)
        self._lut[list(table)] = list(table.values())
        self._what = what

    def __call__(self, job: Job, size: tuple[int, int]) -> tuple[np.ndarray, None]:
        label = read_label(job.source)
        invalid = label > 255 if label.dtype != np.uint8 else self._lut[label] < 0
        if invalid.any():
            raise UserError(
                f"{job.source} has the id {label[invalid][0]}, which is not one of {self._what}; replace the file"
            )
        return self._lut[label].astype(np.uint8), None


def _check_age(job: Job) -> None:
    """Raises OutdatedError if a file to make is missing, or older than its source."""
    for path in filter(None, (job.mask, job.instances)):
        if not os.path.exists(path):
            raise OutdatedError(f"{path} is missing")
        if job.source and os.path.exists(job.source) and os.path.getmtime(job.source) > os.path.getmtime(path):
            raise OutdatedError(f"{path} is older than {job.source}")
