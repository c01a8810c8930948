"""A user's own images, labeled by index masks, color-coded masks or a COCO annotation file, and unlabeled images."""

import argparse
import os
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import yaml
from PIL import Image

from ...errors import UserError
from ..datasets import OWN_TABLE, TABLES, DatasetTable, data_root
from ..images import read_label
from ..index import MaskPaths, PackedIndex
from .coco_json import CocoFile, CocoMasks
from .command import Plan, need_folder, relative
from .files import list_line, read_lines, write_lines, write_whole
from .masks import Job

_IGNORED = 255
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_SPLIT = "splits/all"
_HEADER = "# Made by datasets/prepare_folder.py.\n"


def make_plan(args: argparse.Namespace) -> Plan:
    """Plans the training part (labeled images, then unlabeled ones) and the validation part (given or sampled)."""
    classes = read_classes(args.classes)
    palette = read_palette(args.palette) if args.palette else None
    if (TABLES / f"{args.name}.yaml").exists():
        raise UserError(f"--name {args.name} is the name of a built-in dataset; choose another")
    root = args.root or os.path.join(data_root(), args.name)
    coco = [CocoFile(path) for path in (args.coco, args.val_coco) if path]
    if coco:
        # Without a class called "background", pixels outside all objects have no known class and are ignored.
        background = classes.index("background") if "background" in classes else _IGNORED
        make = CocoMasks(coco, classes, _IGNORED, background)
    else:
        make = ColorMasks(palette, classes) if palette else read_indexed
    labeled, unlabeled, problems = _pair(args.images, args.masks, args, root, coco[:1], 0)
    val, val_unlabeled, val_problems = _pair(args.val_images, args.val_masks, args, root, coco[1:], 1)
    problems += val_problems
    problems += [f"{job.image} has no mask; add one, or remove the image from --val-images" for job in val_unlabeled]
    if not args.val_images:
        labeled, val = _sample_val(labeled, args.val_share, args.seed)
    if args.unlabeled:
        used = {os.path.realpath(job.image) for job in [*labeled, *val, *unlabeled]}
        unlabeled += [Job(path) for path in _list_images(args.unlabeled) if os.path.realpath(path) not in used]
    problems += [problem for file in coco for problem in file.problems]
    notes = tuple(note for file in coco for note in file.notes)
    problems += _find_overlap([*labeled, *unlabeled], val)
    table = _make_table(args.name, root, classes, palette, bool(coco))
    parts = {f"{args.name}_train": labeled + unlabeled, f"{args.name}_val": val}
    return Plan(
        table,
        root,
        parts,
        make,
        tuple(problems),
        notes,
        sources=tuple(filter(None, (args.classes, args.palette, args.coco, args.val_coco))),
        made=tuple(f"{root}/{name}" for name in (OWN_TABLE, f"{_SPLIT}/labeled.txt", f"{_SPLIT}/unlabeled.txt")),
        elsewhere="--root or --name",
        keep=False,
        in_place=make is read_indexed,
        ours=_has_our_table(root),
    )


def finish(plan: Plan) -> str:
    """Writes dataset.yaml and the split; returns instructions for training on them."""
    _write_table(plan)
    return _write_split(plan)


def read_classes(path: str) -> list[str]:
    """Reads class names, one per line, in the order of their ids.

    Raises:
        UserError: the list is empty, has a duplicate, or has more names than 8-bit masks can represent.
    """
    names = [line.strip() for line in read_lines(path)]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise UserError(f"{path}: the class '{duplicate}' appears twice; remove one of the two")
    if not 0 < len(names) <= _IGNORED:
        raise UserError(f"{path} has {len(names)} class names; provide 1 to {_IGNORED}, one per line")
    return names


def read_palette(path: str) -> dict[tuple[int, int, int], str]:
    """Reads {(R, G, B): class name, or "ignore"} from lines "R G B name".

    Raises:
        UserError: a line cannot be parsed, or a color appears twice.
    """
    palette = {}
    for number, line in enumerate(read_lines(path), start=1):
        words = line.replace(",", " ").split(maxsplit=3)
        if len(words) != 4 or not all(w.isdigit() and int(w) < 256 for w in words[:3]):
            raise UserError(f"{path}, line {number}: expected 'R G B class name', found '{line}'")
        color = tuple(map(int, words[:3]))
        if color in palette:
            raise UserError(f"{path}, line {number}: the color {color} appears twice; remove one of the two")
        palette[color] = words[3].strip()
    return palette


def read_indexed(job: Job, size: tuple[int, int]) -> tuple[np.ndarray, None]:
    """Maker for 8-bit PNGs whose values are class ids, with 255 for ignored pixels."""
    label = read_label(job.source)
    if label.dtype != np.uint8:
        raise UserError(f"mask {job.source} has more than 8 bits per pixel; save it with 8 bits per pixel")
    return label, None


class ColorMasks:
    """Maker for PNGs whose colors encode classes.

    Args:
        palette: {(R, G, B): class name or "ignore"}.
        classes: class names in the order of their ids.

    Raises:
        UserError: the palette has a name that is not a class.
    """

    def __init__(self, palette: dict[tuple[int, int, int], str], classes: Sequence[str]) -> None:
        ids = {**{name: i for i, name in enumerate(classes)}, "ignore": _IGNORED}
        unknown = next((name for name in palette.values() if name not in ids), None)
        if unknown is not None:
            raise UserError(f"palette: '{unknown}' is not in the class list; correct one of the two, or call it ignore")
        pairs = sorted((r << 16 | g << 8 | b, ids[name]) for (r, g, b), name in palette.items())
        self._codes, self._ids = np.array(pairs, np.int32).T

    def __call__(self, job: Job, size: tuple[int, int]) -> tuple[np.ndarray, None]:
        colors = _read_colors(job.source).astype(np.int32)
        codes = colors[..., 0] << 16 | colors[..., 1] << 8 | colors[..., 2]
        index = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)  # (H, W)
        unknown = self._codes[index] != codes
        if unknown.any():
            color = tuple(int(c) for c in colors[unknown][0])
            raise UserError(
                f"mask {job.source} has the color {color} ({int(unknown.sum())} pixels have colors that are not "
                "in the palette); add it to the palette (masks saved as JPEG cannot be used)"
            )
        return self._ids[index].astype(np.uint8), None


def _read_colors(path: str) -> np.ndarray:
    """Reads a color-coded mask, RGB or indexed with a palette, as uint8 (H, W, 3)."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "P"):
                raise UserError(f"mask {path} is not a color image (mode {image.mode}); save it as RGB without alpha")
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"cannot decode {path} ({error}); replace the file") from None


def _pair(
    images: str | None, masks: str | None, args: argparse.Namespace, root: str, coco: Sequence[CocoFile], number: int
) -> tuple[list[Job], list[Job], list[str]]:
    """Pairs the images of a folder with their labels.

    Args:
        images: the folder; None if the user gave none.
        masks: the folder of the masks, unless there is a COCO file.
        coco: the annotation file, as a list of at most one.
        number: 0 for training, 1 for validation.

    Returns:
        jobs of labeled images, jobs of unlabeled images, problems.
    """
    if not images:
        return [], [], []
    part = "val" if number else "train"
    image_paths = {relative(path, images): path for path in _list_images(images)}
    if coco:
        sources = {name: (coco[0].path, (number, i)) for i, (name, *_) in coco[0].images.items()}
    else:
        need_folder(masks, f"{'--val-masks' if number else '--masks'} must name the folder of masks")
        sources = {name: (path, None) for name in image_paths if (path := _find_mask(name, masks, args.mask_suffix))}
    labeled, unlabeled = [], []
    for name, path in image_paths.items():
        if name not in sources:
            unlabeled.append(Job(path))
            continue
        source, key = sources[name]
        mask = os.path.join(root, "masks", part, os.path.splitext(name)[0] + ".png")
        job = Job(path, mask, source, key)
        labeled.append(replace(job, instances=_instance_map_path(job.mask)) if coco else job)
    if coco:
        problems = [
            f"{os.path.join(images, name)} does not exist, but {coco[0].path} lists it"
            for name in sources.keys() - image_paths.keys()
        ]
    else:
        problems = _find_orphans(masks, sources)
    return labeled, unlabeled, sorted(problems)


def _find_mask(name: str, masks: str, suffix: str) -> str:
    """Path of an image's mask: same subfolder and name plus the suffix, as PNG; "" if it does not exist."""
    path = os.path.join(masks, f"{os.path.splitext(name)[0]}{suffix}.png")
    return path if os.path.exists(path) else ""


def _find_orphans(masks: str, sources: dict) -> list[str]:
    """One problem for each mask without an image."""
    used = {os.path.normpath(path) for path, _ in sources.values()}
    return [
        f"mask {path} belongs to no image; it must be a PNG named like its image (plus --mask-suffix)"
        for path in _list_images(masks)
        if os.path.normpath(path) not in used
    ]


def _list_images(folder: str) -> list[str]:
    """All image files in a folder and its subfolders, sorted."""
    need_folder(folder, "it should contain images")
    paths = [
        os.path.join(base, name)
        for base, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(_IMAGE_SUFFIXES) and not name.startswith(".")
    ]
    if not paths:
        raise UserError(f"{folder} contains no images ({', '.join(_IMAGE_SUFFIXES)})")
    return sorted(paths)


def _sample_val(labeled: list[Job], share: float, seed: int) -> tuple[list[Job], list[Job]]:
    """Splits labeled jobs into (training, validation) at random."""
    if len(labeled) < 2:
        raise UserError(
            f"{len(labeled)} images have a mask; at least 2 are needed, one for training and one for validation"
        )
    count = min(max(1, round(share * len(labeled))), len(labeled) - 1)
    val = set(random.Random(seed).sample(range(len(labeled)), count))
    return ([job for i, job in enumerate(labeled) if i not in val], [job for i, job in enumerate(labeled) if i in val])


def _find_overlap(train: list[Job], val: list[Job]) -> list[str]:
    """One problem for each image that is in both parts."""
    train_paths = {os.path.realpath(job.image) for job in train}
    return [
        f"{job.image} is both a training and a validation image; remove it from one of the two"
        for job in val
        if os.path.realpath(job.image) in train_paths
    ]


def _make_table(name: str, root: str, classes: list[str], palette: dict | None, instances: bool) -> DatasetTable:
    class_colors = {}  # if the palette has several colors for a class, the first one counts
    for color, class_name in (palette or {}).items():
        class_colors.setdefault(class_name, color)
    return DatasetTable(
        name=name,
        folder=os.path.basename(os.path.abspath(root)),
        ignore_label=_IGNORED,
        parts={f"{name}_train": {"list": "train.txt"}, f"{name}_val": {"list": "val.txt"}},
        classes=tuple(classes),
        colors=tuple(class_colors.get(c, _bit_color(i + 1)) for i, c in enumerate(classes)),
        things=tuple(name for name in classes if name != "background") if instances else (),
        paths=MaskPaths((), ("masks/", "instances/") if instances else ()),
    )


def _instance_map_path(mask: str) -> str:
    folder, _, name = mask.rpartition("masks" + os.sep)
    return f"{folder}instances{os.sep}{name}"


def _bit_color(i: int) -> tuple[int, int, int]:
    """Color i of Pascal VOC's colormap: bits 0, 3, 6 of i are red's highest bits, 1, 4, 7 green's, 2, 5 blue's."""
    return tuple(sum((i >> (3 * j + c) & 1) << (7 - j) for j in range(3)) for c in range(3))


def _has_our_table(root: str) -> bool:
    """Whether the folder has a dataset.yaml that prepare_folder.py wrote."""
    try:
        with open(os.path.join(root, OWN_TABLE), encoding="utf-8") as file:
            return file.readline() == _HEADER
    except (OSError, UnicodeDecodeError):
        return False


def _write_table(plan: Plan) -> None:
    table = plan.table
    content = {"name": table.name, "ignore_label": table.ignore_label, "parts": table.parts}
    if table.paths.instances:
        content["instances"] = list(table.paths.instances)
    content["classes"] = [
        {"name": name, "color": list(color), **({"thing": True} if name in table.things else {})}
        for name, color in zip(table.classes, table.colors)
    ]
    text = _HEADER + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(os.path.join(plan.root, OWN_TABLE), text.encode())


def _write_split(plan: Plan) -> str:
    """Writes the split: images with a mask are labeled, the others unlabeled. Returns instructions for training."""
    pairs = list(PackedIndex.from_list_file(os.path.join(plan.root, "train.txt"), plan.root).all_names())
    folder = os.path.join(plan.root, _SPLIT)
    counts = {}
    for kind, labeled in (("labeled", True), ("unlabeled", False)):
        lines = [list_line(*pair) for pair in pairs if bool(pair[1]) == labeled]
        path = f"{folder}/{kind}.txt"
        counts[kind] = len(lines)
        if lines:
            write_lines(path, lines)
        elif os.path.exists(path):
            os.remove(path)
    name, parent = plan.table.name, os.path.dirname(os.path.abspath(plan.root))
    in_data_root = os.path.realpath(parent) == os.path.realpath(data_root())
    environment = "" if in_data_root else f"DETECTRON2_DATASETS={parent} and "
    return (
        f"{counts['labeled']} labeled and {counts['unlabeled']} unlabeled images; to train on them:\n"
        f"  {environment}DATASETS.TRAIN \"('{name}_train',)\" DATASETS.TEST \"('{name}_val',)\" DATASETS.SPLIT_ROOT '' "
        f"DATASETS.SPLIT {plan.table.folder}/{_SPLIT}"
    )
