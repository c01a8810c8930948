"""Pascal VOC 2012 augmented with the masks of SBD: 10,582 training and 1,449 validation images."""

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
    """Plans the training images (VOC's train list and all images of SBD, except VOC's val list) and VOC's val list."""
    table = table_of("voc_train")
    need_folder(args.root, "it should contain JPEGImages/, SegmentationClass/ and ImageSets/ of VOC 2012")
    voc_masks = dict(_stems(os.path.join(args.root, "SegmentationClass"), ".png"))
    sbd_masks = _find_sbd_masks(args)
    lists = os.path.join(args.root, "ImageSets", "Segmentation")
    train_list, val_list = os.path.join(lists, "train.txt"), os.path.join(lists, "val.txt")
    val = _ids(val_list)
    train = {*_ids(train_list), *voc_masks, *sbd_masks} - set(val)
    sources = {**sbd_masks, **voc_masks}  # VOC's masks are finer, so they take precedence
    parts = {
        "voc_train": [_job(args.root, i, sources) for i in sorted(train)],
        "voc_val": [_job(args.root, i, voc_masks) for i in val],
    }
    return Plan(
        table,
        args.root,
        parts,
        read_mask,
        sources=(train_list, val_list, *voc_masks.values(), *sbd_masks.values()),
        elsewhere="--aug or --root" if args.aug else "--root",
        in_place=True,
    )


def read_mask(job: Job, size: tuple[int, int]) -> tuple[np.ndarray, None]:
    """Maker for indexed PNGs and SBD's .mat files."""
    if not job.source:
        raise UserError(
            f"{job.image} has no mask; name SBD's folder with --sbd, or the folder of augmented PNGs with --aug"
        )
    if not job.source.endswith(".mat"):
        return read_label(job.source), None
    try:
        return np.asarray(loadmat(job.source)["GTcls"][0, 0]["Segmentation"], np.uint8), None
    except OSError as error:
        raise UserError(f"cannot read {job.source} ({error.strerror or error}); unpack SBD again") from None
    except Exception as error:  # on a damaged file, scipy's parser may raise almost anything
        raise UserError(
            f"{job.source} is not a mask of SBD ({' '.join(repr(error).split())}); unpack SBD again"
        ) from None


def _find_sbd_masks(args: argparse.Namespace) -> dict[str, str]:
    """{image id: mask} of SBD's .mat files (--sbd) or of the PNGs made from them (--aug)."""
    if args.aug:
        return dict(_stems(need_folder(args.aug, "--aug must name the folder of augmented PNGs"), ".png"))
    if not args.sbd:
        return {}
    for folder in ("dataset/cls", "cls", "benchmark_RELEASE/dataset/cls"):
        if os.path.isdir(os.path.join(args.sbd, folder)):
            return dict(_stems(os.path.join(args.sbd, folder), ".mat"))
    raise UserError(f"{args.sbd} has no folder cls of SBD; --sbd must name the unpacked benchmark_RELEASE")


def _stems(folder: str, suffix: str) -> list[tuple[str, str]]:
    """(name without suffix, path) of all files in a folder that have the suffix."""
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
