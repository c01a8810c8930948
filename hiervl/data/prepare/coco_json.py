"""Annotations in COCO's format: an index of the file instead of its content, and masks painted from polygons.

The official training annotations are 450 MB of JSON, several gigabytes as Python objects. Here the file is read
once, piece by piece, and what is kept of an annotation is its image and its place in the file.
"""

import array
import json
from collections.abc import Iterator, Sequence

import numpy as np
from pycocotools import mask as rle

from ...errors import UserError
from .masks import Job

_READ = 1 << 20  # bytes


class CocoFile:
    """Index of an annotation file.

    Attributes:
        path: of the file.
        images: {image id: (file name, height, width)}.
        categories: {category id: name}.

    Raises:
        UserError: it cannot be read, is not JSON, or lacks a key.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.images: dict[int, tuple[str, int, int]] = {}
        self.categories: dict[int, str] = {}
        owners, starts, ends = array.array("q"), array.array("q"), array.array("q")
        try:
            for key, start, end, item in top_level_items(path, ("images", "categories", "annotations")):
                if key == "annotations":
                    owners.append(item["image_id"])
                    starts.append(start)
                    ends.append(end)
                elif key == "images":
                    self.images[item["id"]] = (item["file_name"], item["height"], item["width"])
                else:
                    self.categories[item["id"]] = item["name"]
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror})") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a COCO annotation file ({error!r}); download it again") from None
        if not self.images or not self.categories:
            raise UserError(f"{path} has no images or no categories; is it a COCO annotation file?")
        order = np.argsort(np.array(owners), kind="stable")
        self._owners, self._starts, self._ends = (np.array(a, np.int64)[order] for a in (owners, starts, ends))

    def annotations(self, image_id: int) -> list[dict]:
        """The annotations of an image, read from the file, in its order."""
        first, last = np.searchsorted(self._owners, [image_id, image_id + 1])
        with open(self.path, "rb") as file:
            found = []
            for start, end in zip(self._starts[first:last], self._ends[first:last]):
                file.seek(start)
                found.append(json.loads(file.read(end - start)))
        return found


class CocoMasks:
    """Maker of masks from annotations; a job's key is (file number, image id).

    Overlapping objects are resolved by one rule: the smaller one (in pixels) lies on top, of equals the later one.
    Crowd regions are ignored where no single object lies on them; pixels of neither are the background.

    Args:
        files: the annotation files.
        classes: the class names; a category's class is found by its name.
        ignore_label: of crowds.
        background: id of pixels without an object.
    """

    def __init__(self, files: Sequence[CocoFile], classes: Sequence[str], ignore_label: int,
                 background: int = 0) -> None:
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
        objects = [(a, *_region(a, size, file.path)) for a in file.annotations(image_id)]
        # Sorted stably: crowds first, so that they lie at the bottom, then from large to small.
        objects.sort(key=lambda o: (not o[0].get("iscrowd", 0), -o[1]))
        for i, (annotation, _, region) in enumerate(objects, start=1):
            crowd = annotation.get("iscrowd", 0)
            covered = rle.decode(region).view(bool)
            np.copyto(label, self.ignore_label if crowd else self._class(number, annotation), where=covered)
            if numbers is not None:
                np.copyto(numbers, 0 if crowd else i, where=covered)
        return np.ascontiguousarray(label), None if numbers is None else np.ascontiguousarray(numbers)

    def _class(self, number: int, annotation: dict) -> int:
        category = annotation["category_id"]
        if category not in self._class_of[number]:
            raise UserError(f"{self.files[number].path}: annotation {annotation.get('id')} has the category "
                            f"{category}, which the file does not define")
        return self._class_of[number][category]


def _region(annotation: dict, size: tuple[int, int], path: str) -> tuple[int, dict]:
    """(area in pixels, run lengths) of an annotation's polygons or run lengths."""
    shape = annotation.get("segmentation")
    try:
        if isinstance(shape, list):
            # Fewer than three points enclose nothing (and pycocotools takes four numbers for a box).
            polygons = [polygon for polygon in shape if len(polygon) >= 6]
            region = rle.merge(rle.frPyObjects(polygons, *size)) if polygons else rle.encode(_nothing(size))
        elif isinstance(shape["counts"], list):
            region = rle.frPyObjects(shape, *size)
        else:
            region = shape
        if tuple(region["size"]) != size:
            raise ValueError(f"its size is {region['size']}")
    except Exception as error:  # pycocotools raises bare Exception for what it does not know
        raise UserError(f"{path}: annotation {annotation.get('id')} has no usable segmentation ({error})") from None
    return int(rle.area(region)), region


def _nothing(size: tuple[int, int]) -> np.ndarray:
    return np.zeros(size, np.uint8, order="F")


def top_level_items(path: str, keys: Sequence[str]) -> Iterator[tuple[str, int, int, object]]:
    """Walks a JSON file whose top level is an object, in constant memory.

    Yields:
        (key, start, end, item) for every item of the arrays under ``keys``; the item's text is bytes [start, end).

    Raises:
        ValueError: not JSON. OSError: not readable.
    """
    with open(path, "rb") as file:
        window = _Window(file)
        window.skip("{")
        while window.peek() != "}":
            key, _, _ = window.value()
            window.skip(":")
            if key in keys and window.peek() == "[":
                window.skip("[")
                while window.peek() != "]":
                    item, start, end = window.value()
                    yield key, start, end, item
                    window.skip_comma("]")
                window.skip("]")
            else:
                window.value()
            window.skip_comma("}")


class _Window:
    """The part of a file that is being parsed. Latin-1 has one character per byte, so that point_coords are offsets."""

    _decoder = json.JSONDecoder()

    def __init__(self, file) -> None:
        self._file, self._text, self._at, self._base = file, "", 0, 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is not white space."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            self._more()

    def skip(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"'{character}' expected at byte {self._base + self._at}, found '{self.peek()}'")
        self._at += 1

    def skip_comma(self, closing: str) -> None:
        if self.peek() != closing:
            self.skip(",")

    def value(self) -> tuple[object, int, int]:
        """(value, start, end) of the JSON value that comes next."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number at the very end of the window may go on behind it.
                if end < len(self._text) or self._ended:
                    break
            except ValueError:
                if self._ended:
                    raise
            self._more()
        text = self._text[self._at : end]
        if not text.isascii():
            value = json.loads(text.encode("latin-1"))
        start, self._at = self._base + self._at, end
        return value, start, self._base + end

    def _more(self) -> None:
        """Reads on; what lies behind is forgotten. Long values make the steps longer."""
        if self._ended:
            raise ValueError("the file ends too early")
        rest = self._text[self._at :]
        content = self._file.read(max(_READ, len(rest)))
        self._ended = not content
        self._text, self._base, self._at = rest + content.decode("latin-1"), self._base + self._at, 0
