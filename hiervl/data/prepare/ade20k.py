"""ADE20K's scene parsing benchmark (ADEChallengeData2016): id 0 is ignored, ids 1 to 150 become 0 to 149."""

import argparse
import os

from ..datasets import table_of
from .command import Plan, need_folder
from .masks import Job, Remap

_PARTS = {"ade20k_train": "training", "ade20k_val": "validation"}


def make_plan(args: argparse.Namespace) -> Plan:
    """Plans the masks in annotations_detectron2/, as in Detectron2."""
    table = table_of("ade20k_train")
    parts = {part: _jobs(args.root, folder) for part, folder in _PARTS.items()}
    remap = {0: table.ignore_label, **{i + 1: i for i in range(len(table.classes))}}
    return Plan(table, args.root, parts, Remap(remap, "the ids 0 to 150 of ADE20K's masks"))


def _jobs(root: str, folder: str) -> list[Job]:
    images = need_folder(os.path.join(root, "images", folder), "it is part of ADEChallengeData2016.zip")
    stems = sorted(os.path.splitext(name)[0] for name in os.listdir(images) if name.endswith(".jpg"))
    return [
        Job(
            os.path.join(images, f"{stem}.jpg"),
            os.path.join(root, "annotations_detectron2", folder, f"{stem}.png"),
            os.path.join(root, "annotations", folder, f"{stem}.png"),
        )
        for stem in stems
    ]
