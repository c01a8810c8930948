"""Reads annotations in COCO's format through an index of the file, and paints masks from them.

The official training annotations are 450 MB of JSON, which takes several gigabytes as Python objects. Here the file
is scanned once in small pieces, and only the image id and byte range of each annotation are kept in memory.

Everything in the file is validated. If its structure is wrong, the whole file is refused; if an annotation is wrong,
only its image is refused.
"""

import array
import json
import re
import reprlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle

from ...errors import UserError
from .coco_geometry import box_region, is_box, is_empty, shape_region
from .json_stream import describe_item, top_level_items
from .masks import Job

_ID_LIMIT = 1 << 63  # ids must fit into int64
_PIXEL_LIMIT = 1 << 31  # pixels of an image must be fewer; pycocotools counts with 32 bits
_MAX_INSTANCES = 65535  # an instance map has 16 bits
_MAX_IDS_SHOWN = 10  # in a message
_ITEM_NAMES = {"images": "image", "categories": "category", "annotations": "annotation"}


class CocoFile:
    """Index of an annotation file.

    Attributes:
        path: of the annotation file.
        images: {image id: (file name, height, width)}.
        categories: {category id: name}.
        problems: one line for each kind of annotation that cannot be used.
        notes: one line for each kind of annotation that can only be used in part.

    Raises:
        UserError: the file cannot be read, is not JSON, or does not have the structure of COCO annotations.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.images: dict[int, tuple[str, int, int]] = {}
        self.categories: dict[int, str] = {}
        self._file_names: set[str] = set()
        self._box_only: list[tuple[int, object]] = []  # (image id, annotation id) of boxes without a segmentation
        image_ids, starts, ends = array.array("q"), array.array("q"), array.array("q")  # of the annotations
        add = {"images": self._add_image, "categories": self._add_category}
        try:
            for key, start, end, item in top_level_items(path, _ITEM_NAMES):
                try:
                    if not isinstance(item, dict):
                        raise ValueError(f"{reprlib.repr(item)} is not an object")
                    if key == "annotations":
                        image_ids.append(self._index_annotation(item))
                        starts.append(start)
                        ends.append(end)
                    else:
                        add[key](item)
                except ValueError as error:
                    raise ValueError(f"{describe_item(key, _ITEM_NAMES[key], start, item)}: {error}") from None
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror})") from None
        except RecursionError:
            raise UserError(
                f"{path} is not a COCO annotation file (lists or objects are nested too deeply); "
                "download or export it again"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{path} is not a COCO annotation file ({error}); correct it, or download or export it again"
            ) from None
        if not self.images or not self.categories:
            raise UserError(f"{path} has no images or no categories; is it a COCO annotation file?")
        order = np.argsort(np.array(image_ids), kind="stable")
        self._image_ids, self._starts, self._ends = (np.array(a, np.int64)[order] for a in (image_ids, starts, ends))
        self.problems, self.notes = self._find_strays(), self._find_box_only()

    def annotations(self, image_id: int) -> list[dict]:
        """Reads the annotations of an image, in the order of the file.

        Raises:
            UserError: the file cannot be read, or has changed since it was indexed.
        """
        first, last = (np.searchsorted(self._image_ids, image_id, side) for side in ("left", "right"))
        annotations = []
        try:
            with open(self.path, "rb") as file:
                for start, end in zip(self._starts[first:last], self._ends[first:last]):
                    file.seek(start)
                    annotations.append(json.loads(file.read(end - start).decode()))
                    if annotations[-1]["image_id"] != image_id:
                        raise ValueError
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({error.strerror})") from None
        except (KeyError, TypeError, ValueError, RecursionError):
            raise UserError(f"{self.path} was changed while it was in use; run again") from None
        return annotations

    def _add_image(self, item: dict) -> None:
        image_id, name = _integer(item, "id", -_ID_LIMIT), _single_line(item, "file_name")
        height, width = _integer(item, "height", 1, _PIXEL_LIMIT), _integer(item, "width", 1, _PIXEL_LIMIT)
        if height * width >= _PIXEL_LIMIT:
            raise ValueError(f"{width}x{height} pixels are too many")
        if image_id in self.images:
            raise ValueError("another image has the same id")
        if name in self._file_names:
            raise ValueError(f"another image has the file name {name!r}")
        self._file_names.add(name)
        self.images[image_id] = (name, height, width)

    def _add_category(self, item: dict) -> None:
        category_id, name = _integer(item, "id", -_ID_LIMIT), _single_line(item, "name")
        if category_id in self.categories:
            raise ValueError("another category has the same id")
        self.categories[category_id] = name

    def _index_annotation(self, item: dict) -> int:
        """Returns the image id of an annotation, and notes whether it has only a box."""
        image_id = _integer(item, "image_id", -_ID_LIMIT)
        if is_empty(item.get("segmentation")) and is_box(item.get("bbox")):
            self._box_only.append((image_id, item.get("id")))
        return image_id

    def _find_strays(self) -> list[str]:
        known = np.fromiter(self.images, np.int64, len(self.images))
        strays = self._image_ids[~np.isin(self._image_ids, known)]
        if not len(strays):
            return []
        return [
            f"{self.path}: {len(strays)} annotations refer to images that the file does not list (image ids "
            f"{_format_ids(np.unique(strays).tolist())}); add the images or remove the annotations"
        ]

    def _find_box_only(self) -> list[str]:
        ids = [annotation_id for image_id, annotation_id in self._box_only if image_id in self.images]
        if not ids:
            return []
        return [
            f"{self.path}: {len(ids)} annotations have a box but no segmentation (annotation ids {_format_ids(ids)}); "
            "the pixels of their boxes are ignored unless another object covers them"
        ]


class _Object(NamedTuple):
    """An annotation to paint.

    Attributes:
        single: whether it is a single object, which gets a number in the instance map; crowds and boxes are not.
        area: number of pixels.
        label: its class id, or the ignore label.
        region: its pixels as pycocotools' run-length encoding.
    """

    single: bool
    area: int
    label: int
    region: dict


class CocoMasks:
    """Maker of masks from annotations. The key of a job is (file number, image id).

    Where objects overlap, the one with fewer pixels is on top; if they are equal, the one that comes later in the
    file. Crowd regions, and boxes of annotations without a segmentation, get the ignore label where no single object
    covers them. All other pixels are background.

    Args:
        files: the annotation files.
        classes: class names in the order of their ids; categories are matched to classes by name.
        ignore_label: for crowds and boxes.
        background: for pixels without an object.

    Raises:
        UserError: a category is not in the class list.
    """

    def __init__(
        self, files: Sequence[CocoFile], classes: Sequence[str], ignore_label: int, background: int = 0
    ) -> None:
        self.files, self.ignore_label, self.background = list(files), ignore_label, background
        index = {name: i for i, name in enumerate(classes)}
        for file in files:
            unknown = next((name for name in file.categories.values() if name not in index), None)
            if unknown is not None:
                raise UserError(f"{file.path} has the category '{unknown}', which is not in the class list; add it")
        self._class_of = [{c: index[name] for c, name in file.categories.items()} for file in files]

    def __call__(self, job: Job, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        number, image_id = job.key
        file = self.files[number]
        annotated = file.images[image_id][1:]
        if tuple(annotated) != size:
            raise UserError(
                f"{job.image} is {size[1]}x{size[0]}, but {file.path} says {annotated[1]}x{annotated[0]}; "
                "use the image that was annotated"
            )
        # Column-major like the run lengths, which makes painting four times as fast.
        label = np.full(size, self.background, np.uint8, order="F")
        numbers = np.zeros(size, np.uint16, order="F") if job.instances else None
        annotations = file.annotations(image_id)
        if job.instances and len(annotations) > _MAX_INSTANCES:
            raise UserError(
                f"{file.path}: image {image_id} has {len(annotations)} annotations, but an instance map can "
                f"hold only {_MAX_INSTANCES} objects; remove some"
            )
        objects = [self._make_object(annotation, number, image_id, size) for annotation in annotations]
        # Stable sort in painting order: crowds and boxes at the bottom, then objects from large to small.
        objects.sort(key=lambda o: (o.single, -o.area))
        for i, item in enumerate(objects, start=1):
            covered = rle.decode(item.region).view(bool)
            np.copyto(label, item.label, where=covered)
            if numbers is not None:
                np.copyto(numbers, i if item.single else 0, where=covered)
        return np.ascontiguousarray(label), None if numbers is None else np.ascontiguousarray(numbers)

    def _make_object(self, annotation: dict, number: int, image_id: int, size: tuple[int, int]) -> _Object:
        """Validates an annotation and computes its pixels.

        Raises:
            UserError: the annotation is wrong. The message names file, annotation and image.
        """
        try:
            _integer(annotation, "id", -_ID_LIMIT)
            category = _integer(annotation, "category_id", -_ID_LIMIT)
            if category not in self._class_of[number]:
                raise ValueError(f"it has the category {category}, which the file does not define")
            crowd = "iscrowd" in annotation and _integer(annotation, "iscrowd", 0, 2)
            region, is_box_region = _region(annotation, size)
        except ValueError as error:
            raise UserError(
                f"{self.files[number].path}: annotation {reprlib.repr(annotation.get('id'))} of image "
                f"{image_id} cannot be used ({error}); correct or remove it"
            ) from None
        single = not crowd and not is_box_region
        label = self._class_of[number][category] if single else self.ignore_label
        return _Object(single, int(rle.area(region)), label, region)


def _region(annotation: dict, size: tuple[int, int]) -> tuple[dict, bool]:
    """Pixels of an annotation in an image of size (H, W).

    Returns:
        the run-length encoding of its segmentation, or of its box if it has no segmentation; whether it is the box's.
    """
    shape, box = annotation.get("segmentation"), annotation.get("bbox")
    if not is_empty(shape):
        return shape_region(shape, size), False
    if not is_box(box):
        raise ValueError(f"it has no 'segmentation', and its 'bbox' is {reprlib.repr(box)}, not x, y, width, height")
    return box_region(box, size), True


def _integer(item: dict, key: str, start: int, end: int = _ID_LIMIT) -> int:
    """The integer under a key. Raises ValueError if it is not an integer in [start, end)."""
    value = _get(item, key)
    if type(value) is not int or not start <= value < end:
        raise ValueError(f"its '{key}' is {reprlib.repr(value)}, which is not an integer from {start} to {end - 1}")
    return value


def _single_line(item: dict, key: str) -> str:
    """The text under a key. Raises ValueError if it is not one non-empty line that can be a file name."""
    value = _get(item, key)
    if type(value) is not str or value.splitlines() != [value] or re.search("[\0-\x1f\x7f\ud800-\udfff]", value):
        raise ValueError(f"its '{key}' is {reprlib.repr(value)}, which is not one line of text")
    return value


def _get(item: dict, key: str) -> object:
    if key not in item:
        raise ValueError(f"it has no '{key}'")
    return item[key]


def _format_ids(ids: Sequence) -> str:
    return ", ".join(map(reprlib.repr, ids[:_MAX_IDS_SHOWN])) + (", ..." if len(ids) > _MAX_IDS_SHOWN else "")
