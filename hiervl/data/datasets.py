"""Datasets, registered from small YAML tables and checked before training.

The tables of the built-in datasets are in ``hiervl/data/tables``. A custom dataset keeps its table in its own folder
(``<data root>/*/dataset.yaml``, written by ``datasets/prepare_folder.py``). Importing this module registers every
part of every table in Detectron2's catalogs. This reads only the tables; lists and images are read when a part is
requested, so importing works without any dataset on disk.
"""

import logging
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from .images import image_size, read_label
from .index import MaskPaths, PackedIndex

TABLES = Path(__file__).parent / "tables"
OWN_TABLE = "dataset.yaml"
DEFAULT_SPLIT_ROOT = "datasets/splits"


@dataclass(frozen=True)
class DatasetTable:
    """Description of one dataset, as given by its table.

    Attributes:
        name: name of the dataset.
        folder: its folder under the data root.
        ignore_label: id of pixels without a class.
        parts: part name -> {"list": file in the folder} or {"split_list": file under the split root}, and
            "images", the number of images, if known.
        classes: class names in the order of their ids.
        colors: (R, G, B) of each class.
        things: names of the classes with countable instances.
        paths: rules that locate masks and instance maps.
        first_instance: smallest value in an instance map that denotes a single object.
        label_ids: class ids in the original masks, if they differ (Cityscapes).
    """

    name: str
    folder: str
    ignore_label: int
    parts: dict[str, dict]
    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    things: tuple[str, ...]
    paths: MaskPaths = field(default_factory=MaskPaths)
    first_instance: int = 1
    label_ids: tuple[int, ...] = ()

    @classmethod
    def from_file(cls, path: Path) -> "DatasetTable":
        """Reads a table. The key ``folder`` defaults to the name of the folder that contains the file.

        Raises:
            UserError: the file is not YAML, or a key is missing or malformed.
        """
        try:
            table = yaml.safe_load(path.read_text(encoding="utf-8"))
            classes = table["classes"]
            return cls(
                name=table["name"],
                folder=table.get("folder", path.parent.name),
                ignore_label=table["ignore_label"],
                parts=table["parts"],
                classes=tuple(str(c["name"]) for c in classes),
                colors=tuple(tuple(c["color"]) for c in classes),
                things=tuple(str(c["name"]) for c in classes if c.get("thing")),
                paths=MaskPaths(tuple(table.get("masks", ())), tuple(table.get("instances", ()))),
                first_instance=table.get("first_instance", 1),
                label_ids=tuple(c["label_id"] for c in classes if "label_id" in c),
            )
        except (KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"{path} is not a table that describes a dataset ({' '.join(str(error).split())}); recreate it with "
                "datasets/prepare_folder.py"
            ) from None


def data_root() -> str:
    """Returns the folder that holds all datasets: DETECTRON2_DATASETS, or ``datasets``."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def dataset_root(name: str) -> str:
    """Returns the folder of the dataset that part ``name`` belongs to.

    Raises:
        UserError: the part is unknown, or the folder does not exist.
    """
    root = os.path.join(data_root(), table_of(name).folder)
    if not os.path.isdir(root):
        raise UserError(
            f"{root} does not exist; set DETECTRON2_DATASETS to the folder that holds "
            f"'{table_of(name).folder}' (see datasets/README.md)"
        )
    return root


def dataset_index(name: str, split_root: str = DEFAULT_SPLIT_ROOT) -> PackedIndex:
    """Returns the index of all images of part ``name``, such as ``camvid_val``.

    Raises:
        UserError: the part is unknown, or its folder or list is missing or broken.
    """
    root, table = dataset_root(name), table_of(name)
    part = table.parts[name]
    if "split_list" in part:
        path = os.path.join(split_root or data_root(), part["split_list"])
    else:
        path = os.path.join(root, part["list"])
    return PackedIndex.from_list_file(path, root, paths=table.paths)


def table_of(name: str) -> DatasetTable:
    """Returns the table that defines part ``name``.

    Raises:
        UserError: no table defines it.
    """
    tables = (*_builtin_tables(), *_custom_tables())
    for table in tables:
        if name in table.parts:
            if name not in MetadataCatalog or MetadataCatalog.get(name).stuff_classes != list(table.classes):
                _register(table)  # created or changed since this module was imported
            return table
    available = ", ".join(part for table in tables for part in table.parts)
    raise UserError(f"DATASETS: unknown dataset '{name}'; available: {available}")


def check_dataset(
    index: PackedIndex,
    num_classes: int,
    ignore_label: int,
    sample: int | None = None,
    masks: bool = True,
    instances: bool = False,
    max_classes: int | None = None,
) -> None:
    """Raises at the first problem that would otherwise stop a run hours later, or silently spoil it.

    Args:
        index: the images.
        num_classes: valid ids are 0 to num_classes - 1 and ``ignore_label``.
        ignore_label: id of pixels without a class.
        sample: check this many images, evenly spaced; None checks all of them.
        masks: also check the masks. False for unlabeled images, whose masks are never opened.
        instances: also require an instance map of the image's size.
        max_classes: maximum number of classes in one mask (MODEL.HSQG.TOP_K); None for no limit.

    Raises:
        UserError: the root, an image or a mask is missing or broken; image and mask differ in size; a mask
            has an id outside the class list or too many classes; an instance map is missing or of the wrong size.
    """
    if not os.path.isdir(index.root):
        raise UserError(f"{index.root} does not exist; check DETECTRON2_DATASETS (see datasets/README.md)")
    count = len(index) if sample is None else min(sample, len(index))
    for i in np.linspace(0, len(index) - 1, count).astype(int):
        record = index[i]
        size = image_size(record["file_name"])
        if masks:
            _check_mask(record, size, num_classes, ignore_label, max_classes or num_classes)
        if instances:
            _check_instances(record, size)


def check_label(
    label: np.ndarray, mask: str, image: str, size: tuple[int, int], num_classes: int, ignore_label: int
) -> None:
    """Checks the size and the ids of a label map.

    Args:
        label: (H, W) integer ids.
        mask, image: file names for error messages.
        size: (height, width) of the image.
        num_classes: valid ids are 0 to num_classes - 1 and ``ignore_label``.
        ignore_label: id of pixels without a class.

    Raises:
        UserError: the sizes differ, or an id is neither a class id nor the ignore label.
    """
    if label.shape != size:
        raise UserError(
            f"{mask} is {label.shape[1]}x{label.shape[0]}, its image {image} is "
            f"{size[1]}x{size[0]}; make the mask the size of the image"
        )
    ids = np.flatnonzero(np.bincount(label.ravel())) if label.dtype == np.uint8 else np.unique(label)
    invalid = ids[((ids < 0) | (ids >= num_classes)) & (ids != ignore_label)]
    if len(invalid):
        raise UserError(
            f"{mask} has the id {invalid[0]}, which is neither one of the {num_classes} classes (0 to "
            f"{num_classes - 1}) nor the ignore label {ignore_label}; correct the mask or the class list"
        )


def count_pixels(index: PackedIndex, num_classes: int) -> np.ndarray:
    """Counts the pixels of each class in each image: int64 (num_images, num_classes). Other ids are not counted."""
    counts = np.zeros((len(index), num_classes), np.int64)
    for i, record in enumerate(index):
        label = read_label(record["sem_seg_file_name"]).ravel()
        counts[i] = np.bincount(label[(label >= 0) & (label < num_classes)], minlength=num_classes)
    return counts


def _check_mask(record: dict, size: tuple[int, int], num_classes: int, ignore_label: int, max_classes: int) -> None:
    if "sem_seg_file_name" not in record:
        raise UserError(f"{record['file_name']} has no mask in its list; write 'image mask' on its line")
    mask = record["sem_seg_file_name"]
    label = read_label(mask)
    check_label(label, mask, record["file_name"], size, num_classes, ignore_label)
    if max_classes < num_classes:
        num_present = len(np.setdiff1d(label, [ignore_label]))
        if num_present > max_classes:
            raise UserError(
                f"{mask} contains {num_present} classes, but MODEL.HSQG.TOP_K is only {max_classes}; set it to at "
                "least the largest number of classes in one image"
            )


def _check_instances(record: dict, size: tuple[int, int]) -> None:
    path = record.get("instances_file_name")
    if path is None:
        raise UserError(
            "MODEL.CRITERION.SEGMENTS is 'instances', but this dataset has no instance maps; use 'components' "
            "or 'class_regions'"
        )
    if image_size(path) != size:
        raise UserError(f"instance map {path} differs in size from {record['file_name']}; prepare the dataset again")


@cache
def _builtin_tables() -> tuple[DatasetTable, ...]:
    return tuple(DatasetTable.from_file(path) for path in sorted(TABLES.glob("*.yaml")))


def _custom_tables() -> list[DatasetTable]:
    return [DatasetTable.from_file(path) for path in sorted(Path(data_root()).glob(f"*/{OWN_TABLE}"))]


def _register(table: DatasetTable) -> None:
    for part in table.parts:
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop(part, None)
        DatasetCatalog.register(part, lambda part=part: dataset_index(part))
        MetadataCatalog.get(part).set(
            stuff_classes=list(table.classes),
            stuff_colors=[list(color) for color in table.colors],
            thing_classes=list(table.things),
            ignore_label=table.ignore_label,
            evaluator_type="sem_seg",
        )


def _register_all() -> None:
    for table in _builtin_tables():
        _register(table)
    try:
        for table in _custom_tables():
            _register(table)
    except UserError as error:  # table_of raises it again when a part is requested
        logging.getLogger(__name__).warning("%s", error)


_register_all()
