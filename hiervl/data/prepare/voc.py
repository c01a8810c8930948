"""Pascal VOC 2012 with the masks of SBD: 10,582 training images, 1,449 for validation."""

import argparse
import os
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from ...errors import UserError
from ..datasets import table_of
from ..images import read_label
from .command import Plan, need_folder
from .files import read_lines
from .masks import Job


def make_plan(args: argparse.Namespace) -> Plan:
    """Training images: VOC's train list and every image of SBD, without VOC's val list."""
    table = table_of("voc_train")
    need_folder(args.root, "it should hold JPEGImages/, SegmentationClass/ and ImageSets/ of VOC 2012")
    own = {stem: path for stem, path in _stems(os.path.join(args.root, "SegmentationClass"), ".png")}
    more = _augmented(args)
    lists = os.path.join(args.root, "ImageSets", "Segmentation")
    train_list, val_list = os.path.join(lists, "train.txt"), os.path.join(lists, "val.txt")
    val = _ids(val_list)
    train = {*_ids(train_list), *own, *more} - set(val)
    sources = {**more, **own}  # where there are both, VOC's own is the finer mask
    parts = {
        "voc_train": [_job(args.root, i, sources) for i in sorted(train)],
        "voc_val": [_job(args.root, i, own) for i in val],
    }
    return Plan(
        table,
        args.root,
        parts,
        read_mask,
        sources=(train_list, val_list, *own.values(), *more.values()),
        elsewhere="--aug or --root" if args.aug else "--root",
        in_place=True,
    )


def read_mask(job: Job, size: tuple[int, int]) -> tuple[np.ndarray, None]:
    """Maker: an indexed PNG, or SBD's .mat."""
    if not job.source:
        raise UserError(
            f"{job.image} has no mask; name SBD's folder with --sbd, or that of the augmented PNGs with --aug"
        )
    if not job.source.endswith(".mat"):
        return read_label(job.source), None
    try:
        return np.asarray(loadmat(job.source)["GTcls"][0, 0]["Segmentation"], np.uint8), None
    except OSError as error:
        raise UserError(f"cannot read {job.source} ({error.strerror or error}); unpack SBD again") from None
    except Exception as error:  # of a broken file scipy raises what its parser happens to meet
        raise UserError(
            f"{job.source} is not a mask of SBD ({' '.join(repr(error).split())}); unpack SBD again"
        ) from None


def _augmented(args: argparse.Namespace) -> dict[str, str]:
    """{image id: mask} of SBD's .mat files (--sbd) or of the PNGs made from them (--aug)."""
    if args.aug:
        return dict(_stems(need_folder(args.aug, "--aug names the folder of the augmented PNGs"), ".png"))
    if not args.sbd:
        return {}
    for folder in ("dataset/cls", "cls", "benchmark_RELEASE/dataset/cls"):
        if os.path.isdir(os.path.join(args.sbd, folder)):
            return dict(_stems(os.path.join(args.sbd, folder), ".mat"))
    raise UserError(f"{args.sbd} has no folder cls of SBD; --sbd names the unpacked benchmark_RELEASE")


def _stems(folder: str, suffix: str) -> list[tuple[str, str]]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [(Path(name).stem, os.path.join(folder, name)) for name in names if name.endswith(suffix)]


def _ids(path: str) -> list[str]:
    return [line.split()[0] for line in read_lines(path)]


def _job(root: str, image_id: str, sources: dict[str, str]) -> Job:
    return Job(
        os.path.join(root, "JPEGImages", f"{image_id}.jpg"),
        os.path.join(root, "SegmentationClassAug", f"{image_id}.png"),
        sources.get(image_id, ""),
    )
