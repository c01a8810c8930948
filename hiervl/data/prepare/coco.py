"""COCO 2017: masks of 81 classes (80 things and background) from the official instance annotations."""

import argparse
import os
from pathlib import Path

import numpy as np

from ...errors import UserError
from ..datasets import table_of
from ..images import read_label
from .coco_json import CocoFile, CocoMasks
from .command import Plan, need_folder, with_instances
from .masks import Job

_PARTS = {"coco_train": "train2017", "coco_val": "val2017"}


def make_plan(args: argparse.Namespace) -> Plan:
    """Plans all images of the annotation files, including those without objects."""
    table = table_of("coco_train")
    need_folder(args.root, "it should contain annotations/, train2017/ and val2017/ of COCO 2017")
    files = [CocoFile(os.path.join(args.root, "annotations", f"instances_{folder}.json")) for folder in _PARTS.values()]
    parts = {}
    for number, (part, folder) in enumerate(_PARTS.items()):
        jobs = [_job(args.root, folder, number, i, name) for i, (name, *_) in sorted(files[number].images.items())]
        parts[part] = with_instances(jobs, table) if args.instances else jobs
    if args.masks and args.instances:
        raise UserError("--masks and --instances: an archive of masks has no instance maps; use only one of the two")
    sources = tuple(file.path for file in files)
    if not args.masks:
        return Plan(
            table,
            args.root,
            parts,
            CocoMasks(files, table.classes, table.ignore_label),
            tuple(problem for file in files for problem in file.problems),
            tuple(note for file in files for note in file.notes),
            sources=sources,
        )
    make = ReadyMade(args.masks)
    sources += tuple(path for jobs in parts.values() for job in jobs if (path := make.find(job)))
    return Plan(table, args.root, parts, make, sources=sources, elsewhere="--masks or --root", in_place=True)


def _job(root: str, folder: str, number: int, image_id: int, name: str) -> Job:
    mask = os.path.join(root, "masks", f"{Path(name).stem}.png")
    return Job(os.path.join(root, folder, name), mask, key=(number, image_id))


class ReadyMade:
    """Maker that copies the masks of an archive, found by name in its folder or its subfolders train2017/ and val2017/.

    Args:
        folder: of the unpacked archive.
    """

    def __init__(self, folder: str) -> None:
        self._folder = need_folder(folder, "--masks must name the unpacked archive of ready-made masks")

    def __call__(self, job: Job, size: tuple[int, int]) -> tuple[np.ndarray, None]:
        path = self.find(job)
        if not path:
            name = os.path.join(self._folder, os.path.basename(job.mask))
            raise UserError(f"{name} does not exist; the archive is incomplete, unpack it again")
        return read_label(path), None

    def find(self, job: Job) -> str:
        """Path of the archive's mask; "" if it has none."""
        paths = (os.path.join(self._folder, folder, os.path.basename(job.mask)) for folder in ("", *_PARTS.values()))
        return next((path for path in paths if os.path.exists(path)), "")
