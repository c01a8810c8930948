"""CamVid from the layout of the SegNet tutorial: 11 classes; id 11 is void."""

import argparse
import functools
import io
import os
import re

from PIL import Image

from ...errors import UserError
from ..datasets import table_of
from ..images import read_image
from .command import Plan, need_folder
from .files import WriteError, read_lines, write_whole
from .masks import Job, Remap
from .parallel import parallel

PARTS = {"camvid_train": "train", "camvid_val": "val", "camvid_test": "test"}
_JPEG_QUALITY = 90


def make_plan(args: argparse.Namespace) -> Plan:
    """Plans JPEGs (PNGs with --png) in images/ and masks in masks/.

    Only the file names of the source's lists are used, because their folders are those of another machine.
    """
    table = table_of("camvid_train")
    suffix = ".png" if args.png else ".jpg"
    pairs = {part: _pairs(args.source, args.root, folder, suffix) for part, folder in PARTS.items()}
    all_pairs = [pair for part_pairs in pairs.values() for pair in part_pairs]
    lists = [os.path.join(args.source, f"{folder}.txt") for folder in PARTS.values()]
    parts = {part: [job for _, job in part_pairs] for part, part_pairs in pairs.items()}
    classes = len(table.classes)
    remap = {**{i: i for i in range(classes)}, classes: table.ignore_label}
    return Plan(
        table,
        args.root,
        parts,
        Remap(remap, "the ids 0 to 11 of CamVid"),
        before=functools.partial(_write_images, all_pairs, args),
        sources=(*lists, *(image for image, _ in all_pairs)),
        made=tuple(job.image for _, job in all_pairs if not os.path.exists(job.image)),
    )


def _pairs(source: str, root: str, folder: str, suffix: str) -> list[tuple[str, Job]]:
    """(image in the source, job) for every line of a list."""
    need_folder(os.path.join(source, folder), "--source must name the folder CamVid of the SegNet tutorial")
    pairs = []
    for line in sorted(read_lines(os.path.join(source, f"{folder}.txt"))):
        words = line.split()
        if len(words) != 2:
            raise UserError(f"{source}/{folder}.txt: expected 'image mask', found '{line}'")
        image, mask = (re.split(r"[\\/]", word)[-1] for word in words)
        stem = os.path.splitext(image)[0]
        pairs.append(
            (
                os.path.join(source, folder, image),
                Job(
                    os.path.join(root, "images", folder, stem + suffix),
                    os.path.join(root, "masks", folder, f"{stem}.png"),
                    os.path.join(source, f"{folder}annot", mask),
                ),
            )
        )
    return pairs


def _write_images(pairs: list[tuple[str, Job]], args: argparse.Namespace) -> list[str]:
    work = functools.partial(_write_image, png=args.png)
    return [problem for problem in parallel(work, pairs, args.workers, "images") if problem]


def _write_image(pair: tuple[str, Job], png: bool) -> str:
    """Writes an image unless it exists; returns a problem, or ""."""
    source, job = pair
    try:
        if os.path.exists(job.image):
            return ""
        image = read_image(source)
        if png:
            with open(source, "rb") as file:
                write_whole(job.image, file.read())
        else:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=_JPEG_QUALITY)
            write_whole(job.image, buffer.getvalue())
        return ""
    except WriteError:
        raise
    except UserError as error:
        return str(error)
