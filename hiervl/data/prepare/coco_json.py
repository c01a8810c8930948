"""Annotations in COCO's format: an index of the file instead of its content, and masks painted from polygons.

The official training annotations are 450 MB of JSON, several gigabytes as Python objects. Here the file is read
once, piece by piece, and what is kept of an annotation is its image and its place in the file.

Nothing in the file is taken on trust. What is wrong with its structure refuses the file; what is wrong with an
annotation refuses its image.
"""

import array
import json
import re
import reprlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle

from ...errors import UserError
from .coco_geometry import box_region, is_box, is_empty, shape_region
from .masks import Job

_READ = 1 << 20  # bytes
_LONGEST = 1 << 28  # bytes of one value
_ID = 1 << 63  # ids are below
_PIXELS = 1 << 31  # of an image; pycocotools counts with 32 bits
_INSTANCES = 65535  # an instance map has 16 bits
_SHOWN = 10  # ids in a message
_LISTS = {"images": "image", "categories": "category", "annotations": "annotation"}


class CocoFile:
    """Index of an annotation file.

    Attributes:
        path: of the file.
        images: {image id: (file name, height, width)}.
        categories: {category id: name}.
        problems, notes: lines on annotations that cannot be used, and on those that are used in part.

    Raises:
        UserError: it cannot be read, is not JSON, or lacks a key.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.images: dict[int, tuple[str, int, int]] = {}
        self.categories: dict[int, str] = {}
        self._files: set[str] = set()
        self._boxes: list[tuple[int, object]] = []  # (image id, annotation id) of annotations with nothing but a box
        owners, starts, ends = array.array("q"), array.array("q"), array.array("q")
        add = {"images": self._add_image, "categories": self._add_category}
        try:
            for key, start, end, item in top_level_items(path, tuple(_LISTS)):
                try:
                    if not isinstance(item, dict):
                        raise ValueError(f"{reprlib.repr(item)} is not an object")
                    if key == "annotations":
                        owners.append(self._owner(item))
                        starts.append(start)
                        ends.append(end)
                    else:
                        add[key](item)
                except ValueError as error:
                    raise ValueError(f"{_place(key, start, item)}: {error}") from None
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
        order = np.argsort(np.array(owners), kind="stable")
        self._owners, self._starts, self._ends = (np.array(a, np.int64)[order] for a in (owners, starts, ends))
        self.problems, self.notes = self._strays(), self._only_boxes()

    def annotations(self, image_id: int) -> list[dict]:
        """The annotations of an image, read from the file, in its order."""
        first, last = (np.searchsorted(self._owners, image_id, side) for side in ("left", "right"))
        found = []
        try:
            with open(self.path, "rb") as file:
                for start, end in zip(self._starts[first:last], self._ends[first:last]):
                    file.seek(start)
                    found.append(json.loads(file.read(end - start).decode()))
                    if found[-1]["image_id"] != image_id:
                        raise ValueError
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({error.strerror})") from None
        except (KeyError, TypeError, ValueError, RecursionError):
            raise UserError(f"{self.path} was changed while it was in use; run again") from None
        return found

    def _add_image(self, item: dict) -> None:
        image_id, name = _integer(item, "id", -_ID), _line(item, "file_name")
        height, width = _integer(item, "height", 1, _PIXELS), _integer(item, "width", 1, _PIXELS)
        if height * width >= _PIXELS:
            raise ValueError(f"{width}x{height} pixels are too many")
        if image_id in self.images:
            raise ValueError("another image has the same id")
        if name in self._files:
            raise ValueError(f"another image has the file name {name!r}")
        self._files.add(name)
        self.images[image_id] = (name, height, width)

    def _add_category(self, item: dict) -> None:
        category_id, name = _integer(item, "id", -_ID), _line(item, "name")
        if category_id in self.categories:
            raise ValueError("another category has the same id")
        self.categories[category_id] = name

    def _owner(self, item: dict) -> int:
        image_id = _integer(item, "image_id", -_ID)
        if is_empty(item.get("segmentation")) and is_box(item.get("bbox")):
            self._boxes.append((image_id, item.get("id")))
        return image_id

    def _strays(self) -> list[str]:
        known = np.fromiter(self.images, np.int64, len(self.images))
        strays = self._owners[~np.isin(self._owners, known)]
        if not len(strays):
            return []
        return [
            f"{self.path}: {len(strays)} annotations are of images that it does not list (image ids "
            f"{_some(np.unique(strays).tolist())}); add the images or remove the annotations"
        ]

    def _only_boxes(self) -> list[str]:
        ids = [annotation_id for image_id, annotation_id in self._boxes if image_id in self.images]
        if not ids:
            return []
        return [
            f"{self.path}: {len(ids)} annotations have a box and no outline (annotation ids {_some(ids)}); their "
            "boxes are ignored where no other object lies on them"
        ]


class _Object(NamedTuple):
    """What is painted of an annotation; ``label``: its class id or the ignore label; ``single``: it has a number."""

    single: bool
    area: int
    label: int
    region: dict


class CocoMasks:
    """Maker of masks from annotations; a job's key is (file number, image id).

    Overlapping objects are resolved by one rule: the smaller one (in pixels) lies on top, of equals the later one.
    Crowd regions, and the boxes of annotations without an outline, are ignored where no single object lies on them;
    pixels of neither are the background.

    Args:
        files: the annotation files.
        classes: the class names; a category's class is found by its name.
        ignore_label: of crowds and boxes.
        background: id of pixels without an object.
    """

    def __init__(
        self, files: Sequence[CocoFile], classes: Sequence[str], ignore_label: int, background: int = 0
    ) -> None:
        self.files, self.ignore_label, self.background = list(files), ignore_label, background
        index = {name: i for i, name in enumerate(classes)}
        for file in files:
            strange = next((name for name in file.categories.values() if name not in index), None)
            if strange is not None:
                raise UserError(f"{file.path} has the category '{strange}', which is not in the class list; add it")
        self._class_of = [{c: index[name] for c, name in file.categories.items()} for file in files]

    def __call__(self, job: Job, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        number, image_id = job.key
        file = self.files[number]
        annotated = file.images[image_id][1:]
        if tuple(annotated) != size:
            raise UserError(
                f"{job.image} is {size[1]}x{size[0]}, {file.path} says {annotated[1]}x{annotated[0]}; "
                "use the image that was annotated"
            )
        # In the order of run lengths, down the columns: painting is then four times as fast.
        label = np.full(size, self.background, np.uint8, order="F")
        numbers = np.zeros(size, np.uint16, order="F") if job.instances else None
        annotations = file.annotations(image_id)
        if job.instances and len(annotations) > _INSTANCES:
            raise UserError(
                f"{file.path}: image {image_id} has {len(annotations)} annotations, an instance map can "
                f"number {_INSTANCES}; remove some"
            )
        objects = [self._object(annotation, number, image_id, size) for annotation in annotations]
        # Sorted stably: crowds and boxes first, so that they lie at the bottom, then from large to small.
        objects.sort(key=lambda o: (o.single, -o.area))
        for i, item in enumerate(objects, start=1):
            covered = rle.decode(item.region).view(bool)
            np.copyto(label, item.label, where=covered)
            if numbers is not None:
                np.copyto(numbers, i if item.single else 0, where=covered)
        return np.ascontiguousarray(label), None if numbers is None else np.ascontiguousarray(numbers)

    def _object(self, annotation: dict, number: int, image_id: int, size: tuple[int, int]) -> _Object:
        """An annotation, checked and painted.

        Raises:
            UserError: naming file, annotation and image.
        """
        try:
            _integer(annotation, "id", -_ID)
            category = _integer(annotation, "category_id", -_ID)
            if category not in self._class_of[number]:
                raise ValueError(f"it has the category {category}, which the file does not define")
            crowd = "iscrowd" in annotation and _integer(annotation, "iscrowd", 0, 2)
            region, boxed = _region(annotation, size)
        except ValueError as error:
            raise UserError(
                f"{self.files[number].path}: annotation {reprlib.repr(annotation.get('id'))} of image "
                f"{image_id} cannot be used ({error}); correct or remove it"
            ) from None
        single = not crowd and not boxed
        label = self._class_of[number][category] if single else self.ignore_label
        return _Object(single, int(rle.area(region)), label, region)


def _region(annotation: dict, size: tuple[int, int]) -> tuple[dict, bool]:
    """(run lengths of an annotation in an image (H, W), whether they are those of its box for want of an outline)."""
    shape, box = annotation.get("segmentation"), annotation.get("bbox")
    if not is_empty(shape):
        return shape_region(shape, size), False
    if not is_box(box):
        raise ValueError(f"it has no 'segmentation', and its 'bbox' is {reprlib.repr(box)}, not x, y, width, height")
    return box_region(box, size), True


def _integer(item: dict, key: str, least: int, end: int = _ID) -> int:
    """The integer of [least, end) under a key."""
    value = _value(item, key)
    if type(value) is not int or not least <= value < end:
        raise ValueError(f"its '{key}' is {reprlib.repr(value)}, which is not an integer from {least} to {end - 1}")
    return value


def _line(item: dict, key: str) -> str:
    """The text under a key: one line that is not empty and can be a file name."""
    value = _value(item, key)
    if type(value) is not str or value.splitlines() != [value] or re.search("[\0-\x1f\x7f\ud800-\udfff]", value):
        raise ValueError(f"its '{key}' is {reprlib.repr(value)}, which is not one line of text")
    return value


def _value(item: dict, key: str) -> object:
    if key not in item:
        raise ValueError(f"it has no '{key}'")
    return item[key]


def _place(key: str, start: int, item: object) -> str:
    """Names an item of a list for a message: by its id, or else by its place in the file."""
    if isinstance(item, dict) and "id" in item:
        return f"{_LISTS[key]} {reprlib.repr(item['id'])}"
    return f"the item of '{key}' at byte {start}"


def _some(ids: Sequence) -> str:
    return ", ".join(map(reprlib.repr, ids[:_SHOWN])) + (", ..." if len(ids) > _SHOWN else "")


def top_level_items(path: str, keys: Sequence[str]) -> Iterator[tuple[str, int, int, object]]:
    """Walks a JSON file whose top level is an object, in constant memory.

    Yields:
        (key, start, end, item) for every item of the arrays under ``keys``; the item's text is bytes [start, end).

    Raises:
        ValueError: not JSON, or not each of ``keys`` once, with an array. OSError: not readable.
        RecursionError: nested too deeply.
    """
    missing = list(keys)
    with open(path, "rb") as file:
        window = _Window(file)
        window.skip("{")
        while window.peek() != "}":
            key, start, _ = window.value()
            if not isinstance(key, str):
                raise ValueError(f"a key is expected at byte {start}")
            window.skip(":")
            if key in keys:
                if key not in missing:
                    raise ValueError(f"'{key}' appears twice")
                missing.remove(key)
                yield from ((key, *item) for item in _array_items(window, key))
            else:
                window.value()
                window.refuse_literal(f"the value of {reprlib.repr(key)}")
            window.skip_comma("}")
        window.skip("}")
        window.expect_end()
    if missing:
        raise ValueError(f"it has no '{missing[0]}'")


def _array_items(window: "_Window", key: str) -> Iterator[tuple[int, int, object]]:
    """(start, end, item) of the array that comes next."""
    if window.peek() != "[":
        raise ValueError(f"'{key}' is not a list")
    window.skip("[")
    while window.peek() != "]":
        item, start, end = window.value()
        window.refuse_literal(_place(key, start, item))
        yield start, end, item
        window.skip_comma("]")
    window.skip("]")


class _Window:
    """The part of a file that is being parsed. Latin-1 has one character per byte, so that point_coords are offsets."""

    def __init__(self, file) -> None:
        self._file, self._text, self._at, self._base = file, "", 0, 0
        self._ended = False
        self._literals: list[str] = []  # NaN and the like in the last value
        self._decoder = json.JSONDecoder(parse_constant=self._literals.append)

    def peek(self) -> str:
        """The next character that is not white space."""
        while not self._skip_space():
            if self._ended:
                raise ValueError("the file ends too early")
            self._more()
        return self._text[self._at]

    def expect_end(self) -> None:
        while not self._skip_space():
            if self._ended:
                return
            self._more()
        raise ValueError(f"the end of the file is expected at byte {self._base + self._at}")

    def skip(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"'{character}' expected at byte {self._base + self._at}, found {self.peek()!r}")
        self._at += 1

    def skip_comma(self, closing: str) -> None:
        if self.peek() != closing:
            self.skip(",")
            if self.peek() == closing:
                raise ValueError(f"a comma stands before the '{closing}' at byte {self._base + self._at}")

    def value(self) -> tuple[object, int, int]:
        """(value, start, end) of the JSON value that comes next."""
        self.peek()
        while True:
            self._literals.clear()
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number at the very end of the window may go on behind it.
                if end < len(self._text) or self._ended:
                    break
            except json.JSONDecodeError as error:
                if self._ended or len(self._text) - self._at > _LONGEST:
                    raise ValueError(f"{error.msg} at byte {self._base + error.pos}") from None
            self._more()
        text = self._text[self._at : end]
        start, self._at = self._base + self._at, end
        if not text.isascii():
            try:
                value = self._decoder.decode(text.encode("latin-1").decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"byte {start + error.start} is not UTF-8") from None
        return value, start, self._base + end

    def refuse_literal(self, place: str) -> None:
        """Raises ValueError if the last value holds a number that is none; ``place`` says where that is."""
        if self._literals:
            raise ValueError(f"{place}: {self._literals[0]} is not a number that JSON knows")

    def _skip_space(self) -> bool:
        """Goes to what is not white space; whether the window has it."""
        while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
            self._at += 1
        return self._at < len(self._text)

    def _more(self) -> None:
        """Reads on; what lies behind is forgotten. Long values make the steps longer."""
        rest = self._text[self._at :]
        content = self._file.read(max(_READ, len(rest)))
        self._ended = not content
        self._text, self._base, self._at = rest + content.decode("latin-1"), self._base + self._at, 0
