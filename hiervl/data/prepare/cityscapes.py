"""Cityscapes: masks of the benchmark's 19 classes from the official *_labelIds.png."""

import argparse
import os
from pathlib import Path

from ..datasets import table_of
from .command import Plan, need_folder
from .masks import Job, Remap

_PARTS = {"cityscapes_train": "train", "cityscapes_val": "val"}
_NUM_LABELS = 34  # ids 0 to 33; all but 19 of them are ignored


def make_plan(args: argparse.Namespace) -> Plan:
    """Plans the masks *_labelTrainIds.png next to the official files, named as by Cityscapes' own scripts."""
    table = table_of("cityscapes_train")
    parts = {part: _jobs(args.root, folder) for part, folder in _PARTS.items()}
    remap = {i: table.ignore_label for i in range(_NUM_LABELS)}
    remap.update({label: i for i, label in enumerate(table.label_ids)})
    return Plan(table, args.root, parts, Remap(remap, "the ids 0 to 33 of Cityscapes' labels"))


def _jobs(root: str, folder: str) -> list[Job]:
    images = need_folder(os.path.join(root, "leftImg8bit", folder), "it is part of leftImg8bit_trainvaltest.zip")
    jobs = []
    for image in sorted(Path(images).glob("*/*_leftImg8bit.png")):
        stem = image.name.removesuffix("_leftImg8bit.png")
        base = os.path.join(root, "gtFine", folder, image.parent.name, stem)
        jobs.append(Job(str(image), f"{base}_gtFine_labelTrainIds.png", f"{base}_gtFine_labelIds.png"))
    return jobs
