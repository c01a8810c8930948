"""The image list of a dataset, stored as packed bytes.

Unlabeled pools have up to 10^7 images. One Python object per image would cost
gigabytes, and in forked workers every reference-count update would copy a
memory page. Here the whole list is one ``bytes`` object and one offset array.
"""

import array
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError


@dataclass(frozen=True)
class MaskPaths:
    """Rules that turn the mask path given in a list into the actual paths of mask and instance map.

    Attributes:
        masks: (text in the listed path, its replacement), or () if the listed path is already correct.
        instances: (text in the mask's path, its replacement in the instance map's path), or () if the dataset has no
            instance maps.
    """

    masks: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()

    def mask(self, listed: str) -> str:
        """Path of the mask that a list gives as ``listed``."""
        return listed.replace(*self.masks, 1) if self.masks else listed

    def instance_map(self, listed: str) -> str | None:
        """Path of the instance map for the mask ``listed``; None if the dataset has no instance maps."""
        return self.mask(listed).replace(*self.instances, 1) if self.instances else None


class PackedIndex(Sequence):
    """A sequence of images with optional masks; each item is a Detectron2 record.

    ``index[i]`` is ``{"file_name", "sem_seg_file_name", "image_id"}`` with paths
    joined to ``root``. ``sem_seg_file_name`` is absent if the image has no mask,
    and ``image_id`` is the image's path as listed. If the dataset has instance
    maps, the record also has ``instances_file_name``. The index can be pickled,
    and forked workers share it without copying.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]], root: str, paths: MaskPaths | None = None) -> None:
        """
        Args:
            pairs: (image, mask) paths relative to ``root``; the mask is ``""`` for images without one.
            root: folder that the paths are relative to.
            paths: rules that locate masks and instance maps; None: masks are at the listed paths, and there are no
                instance maps.
        """
        self.root = os.fspath(root)
        self.paths = paths or MaskPaths()
        packed, offsets = bytearray(), array.array("q", [0])
        for image, mask in pairs:
            packed += f"{image}\t{mask}".encode()
            offsets.append(len(packed))
        self._packed = bytes(packed)
        self._offsets = np.frombuffer(offsets, dtype=np.int64)

    @classmethod
    def from_list_file(
        cls, path: str, root: str, need_mask: bool = False, paths: MaskPaths | None = None
    ) -> "PackedIndex":
        """Reads a list file with one ``image`` or ``image mask`` per line, relative to ``root``.

        Names that contain spaces are separated by a tab (``my image.jpg<TAB>``
        for one without a mask). Empty lines are skipped. No image is opened.

        Args:
            path: the list file.
            root: folder that its paths are relative to.
            need_mask: whether every image must have a mask.
            paths: see the constructor.

        Raises:
            UserError: the file is missing, empty or not UTF-8 text; a line has
                more than two names, repeats an earlier image, or (with
                ``need_mask``) has no mask.
        """
        line_numbers, hashes = array.array("q"), array.array("q")

        def pairs() -> Iterator[tuple[str, str]]:
            for number, image, mask in _read_lines(path):
                if need_mask and not mask:
                    raise UserError(
                        f"{path}, line {number}: labeled image '{image}' has no mask; "
                        "write 'image mask', or move the line to the unlabeled list"
                    )
                line_numbers.append(number)
                hashes.append(hash(image))
                yield image, mask

        index = cls(pairs(), root, paths)
        if not len(index):
            raise UserError(f"{path} is empty; it needs one 'image mask' or 'image' per line")
        index._check_unique(path, np.frombuffer(hashes, np.int64), line_numbers)
        return index

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> dict:
        image, mask = self.names(i)
        record = {"file_name": os.path.join(self.root, image), "image_id": image}
        if mask:
            record["sem_seg_file_name"] = os.path.join(self.root, self.paths.mask(mask))
            if (instances := self.paths.instance_map(mask)) is not None:
                record["instances_file_name"] = os.path.join(self.root, instances)
        return record

    def names(self, i: int) -> tuple[str, str]:
        """(image, mask) of entry i as listed; the mask is ``""`` for an image without one."""
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"entry {i} of an index of {n}")
        i %= n
        image, mask = self._packed[self._offsets[i] : self._offsets[i + 1]].decode().split("\t")
        return image, mask

    def all_names(self) -> Iterator[tuple[str, str]]:
        """(image, mask) of every entry, in order."""
        return map(self.names, range(len(self)))

    def without(self, other: "PackedIndex") -> "PackedIndex":
        """The entries whose image is not in ``other``, which should be the smaller of the two."""
        excluded = {image for image, _ in other.all_names()}
        return PackedIndex((pair for pair in self.all_names() if pair[0] not in excluded), self.root, self.paths)

    def __repr__(self) -> str:
        return f"PackedIndex({len(self)} images under {self.root})"

    def _check_unique(self, path: str, hashes: np.ndarray, line_numbers: Sequence[int]) -> None:
        """Raises UserError if an image is listed twice. ``hashes`` and ``line_numbers`` have one entry per image."""
        # Sorting 64-bit hashes takes a tenth of the memory of a set of names.
        # Only entries with equal hashes are then compared by name.
        order = np.argsort(hashes, kind="stable")
        for k in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]):
            first, second = int(order[k]), int(order[k + 1])
            if self.names(first)[0] == self.names(second)[0]:
                raise UserError(
                    f"{path}, line {line_numbers[second]}: '{self.names(second)[0]}' is already listed on "
                    f"line {line_numbers[first]}; remove one of the two lines"
                )


def _read_lines(path: str) -> Iterator[tuple[int, str, str]]:
    """Yields (line number, image, mask or "") for every non-empty line."""
    try:
        # utf-8-sig: some Windows editors write a byte order mark before the first name.
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, *_split_line(line.rstrip("\r\n"), f"{path}, line {number}")
    except OSError as error:
        raise UserError(
            f"cannot read the list {path} ({error.strerror}); see datasets/README.md for the lists of each dataset"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save the list as UTF-8") from None


def _split_line(line: str, location: str) -> tuple[str, str]:
    """Splits a line into (image, mask or ""). ``location`` names the line in error messages."""
    # Lines without a tab are split at whitespace, as in the published lists.
    words = [w.strip() for w in line.split("\t")] if "\t" in line else line.split()
    if len(words) > 2 or not words[0]:
        raise UserError(
            f"{location}: expected 'image mask' or 'image', found {len(words)} names; put a tab "
            "between image and mask where a name contains spaces"
        )
    return words[0], words[1] if len(words) == 2 else ""
