"""Data sets: registered from the small tables in ``hiervl/data/tables``, checked at start-up.

Importing this module registers every part of every table in Detectron2's catalogues. That reads the tables
alone; lists and images are touched when a part is asked for, so that no data set need be there at import.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from .images import image_size, read_label
from .index import PackedIndex

TABLES = Path(__file__).parent / "tables"
DEFAULT_SPLIT_ROOT = "datasets/splits"


@dataclass(frozen=True)
class DatasetTable:
    """One data set as its table describes it.

    Attributes:
        name: of the data set.
        folder: its folder under the data root.
        ignore_label: the id of pixels without a class.
        parts: part name -> {"list": file in the folder} or {"split_list": file under the split root}.
        classes: class names in the order of their ids.
        colors: (R, G, B) of each class.
        things: names of the classes whose instances can be counted.
    """

    name: str
    folder: str
    ignore_label: int
    parts: dict[str, dict[str, str]]
    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    things: tuple[str, ...]

    @classmethod
    def from_file(cls, path: Path) -> "DatasetTable":
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        classes = table["classes"]
        return cls(
            name=table["name"],
            folder=table["folder"],
            ignore_label=table["ignore_label"],
            parts=table["parts"],
            classes=tuple(c["name"] for c in classes),
            colors=tuple(tuple(c["color"]) for c in classes),
            things=tuple(c["name"] for c in classes if c.get("thing")),
        )


def data_root() -> str:
    """The folder that holds all data sets: DETECTRON2_DATASETS, or ``datasets``."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def dataset_root(name: str) -> str:
    """The folder of the data set that part ``name`` belongs to.

    Raises:
        UserError: an unknown part, or the folder does not exist.
    """
    root = os.path.join(data_root(), table_of(name).folder)
    if not os.path.isdir(root):
        raise UserError(
            f"{root} does not exist; set DETECTRON2_DATASETS to the folder that holds "
            f"'{table_of(name).folder}' (see datasets/README.md)"
        )
    return root


def dataset_index(name: str, split_root: str = DEFAULT_SPLIT_ROOT) -> PackedIndex:
    """All images of part ``name``, such as ``camvid_val``.

    Raises:
        UserError: an unknown part, a missing folder, a missing or broken list.
    """
    root, part = dataset_root(name), table_of(name).parts[name]
    if "split_list" in part:
        return PackedIndex.from_list_file(os.path.join(split_root or data_root(), part["split_list"]), root)
    return PackedIndex.from_list_file(os.path.join(root, part["list"]), root)


def table_of(name: str) -> DatasetTable:
    """The table that part ``name`` stands in."""
    for table in _tables():
        if name in table.parts:
            return table
    known = ", ".join(part for table in _tables() for part in table.parts)
    raise UserError(f"DATASETS: there is no data set '{name}'; known are {known}")


def check_dataset(
    index: PackedIndex, num_classes: int, ignore_label: int, sample: int | None = None, masks: bool = True
) -> None:
    """Stops at the first thing that would stop, or silently spoil, a run hours later.

    Args:
        index: the images.
        num_classes: valid ids are 0 to num_classes - 1 and ``ignore_label``.
        sample: look at this many images, evenly spaced; None: at all.
        masks: also open the masks. False for unlabelled images, whose masks are never opened.

    Raises:
        UserError: the root, an image or a mask is missing or broken; image and mask differ in size; a mask
            has an id outside the class list.
    """
    if not os.path.isdir(index.root):
        raise UserError(f"{index.root} does not exist; check DETECTRON2_DATASETS (see datasets/README.md)")
    count = len(index) if sample is None else min(sample, len(index))
    for i in np.linspace(0, len(index) - 1, count).astype(int):
        record = index[i]
        size = image_size(record["file_name"])
        if masks:
            _check_mask(record, size, num_classes, ignore_label)


def count_pixels(index: PackedIndex, num_classes: int) -> np.ndarray:
    """Pixels of every class in every image, int64 (images, num_classes); other ids are not counted."""
    counts = np.zeros((len(index), num_classes), np.int64)
    for i, record in enumerate(index):
        label = read_label(record["sem_seg_file_name"]).ravel()
        counts[i] = np.bincount(label[(label >= 0) & (label < num_classes)], minlength=num_classes)
    return counts


def _check_mask(record: dict, size: tuple[int, int], num_classes: int, ignore_label: int) -> None:
    if "sem_seg_file_name" not in record:
        raise UserError(f"{record['file_name']} has no mask in its list; write 'image mask' on its line")
    mask = record["sem_seg_file_name"]
    label = read_label(mask)
    if label.shape != size:
        raise UserError(
            f"{mask} is {label.shape[1]}x{label.shape[0]}, its image {record['file_name']} is "
            f"{size[1]}x{size[0]}; make the mask the size of the image"
        )
    ids = np.unique(label)
    wrong = ids[((ids < 0) | (ids >= num_classes)) & (ids != ignore_label)]
    if len(wrong):
        raise UserError(
            f"{mask} has the id {wrong[0]}, outside the {num_classes} classes (0 to {num_classes - 1}) and not "
            f"the ignore label {ignore_label}; correct the mask or the class list"
        )


@cache
def _tables() -> tuple[DatasetTable, ...]:
    return tuple(DatasetTable.from_file(path) for path in sorted(TABLES.glob("*.yaml")))


def _register(table: DatasetTable) -> None:
    for part in table.parts:
        DatasetCatalog.register(part, lambda part=part: dataset_index(part))
        MetadataCatalog.get(part).set(
            stuff_classes=list(table.classes),
            stuff_colors=[list(color) for color in table.colors],
            thing_classes=list(table.things),
            ignore_label=table.ignore_label,
            evaluator_type="sem_seg",
        )


for _table in _tables():
    _register(_table)
