"""From a record to tensors: decode, scale, crop, flip, and for unlabeled images the strong views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from detectron2.config import configurable

from ..errors import UserError
from .augmentation import strong_view
from .images import read_image, read_label

_TRIES = 10  # how often a crop is re-drawn for its content


@dataclass(frozen=True)
class Geometry:
    """Scale, crop and flip, drawn once and applied alike to image, label and views.

    The crop is cut in the source image and then resize_maps, so that the scaled image is never made.

    Attributes:
        window: (y, x, height, width) in the source image, pixels.
        size: (height, width) of the resize_maps window; smaller than the crop where the scaled image is.
        scale: the factor that was drawn.
        flip: mirror left and right.
    """

    window: tuple[int, int, int, int]
    size: tuple[int, int]
    scale: float
    flip: bool

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        source: tuple[int, int],
        crop: tuple[int, int],
        scale_range: tuple[float, float],
        flip_prob: float,
    ) -> "Geometry":
        """Args: ``source`` and ``crop`` are (height, width), pixels."""
        scale = rng.uniform(*scale_range)
        start, extent, size = [], [], []
        for full, wanted in zip(source, crop):
            needed = max(1, round(wanted / scale))
            taken = min(full, needed)
            extent.append(taken)
            start.append(int(rng.integers(full - taken + 1)))
            size.append(wanted if taken == needed else min(wanted, max(1, round(full * scale))))
        return cls((*start, *extent), tuple(size), scale, bool(rng.random() < flip_prob))

    def cut(self, array: np.ndarray) -> np.ndarray:
        """The window, neither resize_maps nor flipped; a view."""
        y, x, height, width = self.window
        return array[y : y + height, x : x + width]

    def apply(self, array: np.ndarray, nearest: bool = False) -> np.ndarray:
        """The crop before padding, (*size) or (*size, 3). Labels need ``nearest``."""
        result = resize(self.cut(array), self.size, nearest)
        return result[:, ::-1] if self.flip else result


def resize(array: np.ndarray, size: tuple[int, int], nearest: bool = False) -> np.ndarray:
    """Resizes (H, W) or (H, W, 3) to ``size`` = (height, width)."""
    if array.shape[:2] == tuple(size):
        return array
    if nearest:
        # INTER_NEAREST would sample pixel corners: labels would shift against the image by half a pixel.
        how = cv2.INTER_NEAREST_EXACT
    else:
        # Area averaging where the image shrinks, or fine texture turns into noise.
        how = cv2.INTER_AREA if size[0] < array.shape[0] else cv2.INTER_LINEAR
    return cv2.resize(array, (size[1], size[0]), interpolation=how)


class TrainMapper:
    """Makes training samples. Padding, at the right and below, is image value 0 and never valid."""

    @configurable
    def __init__(
        self,
        crop_size: tuple[int, int],
        scale_range: tuple[float, float] = (0.5, 2.0),
        flip_prob: float = 0.5,
        ignore_label: int = 255,
        cat_max_ratio: float = 1.0,
        jitter: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.25),
        gray_prob: float = 0.2,
        instances: bool = False,
        first_instance: int = 1,
    ) -> None:
        """
        Args:
            crop_size: (height, width) of every sample, pixels.
            scale_range: smallest and largest factor on the image's size.
            flip_prob: how often a sample is mirrored.
            ignore_label: label of pixels without a class, and of padding.
            jitter, gray_prob: strength of the strong views, see augmentation.strong_view.
            cat_max_ratio: a labeled crop of which one class covers more than this share is drawn again
                (up to 10 times); 1 is off.
            instances: labeled samples bring their map of instances.
            first_instance: smaller values of the maps' files are no single objects.
        """
        if min(crop_size) < 1 or not 0 < scale_range[0] <= scale_range[1] or not 0 < cat_max_ratio <= 1:
            raise UserError(
                f"INPUT: crop size {tuple(crop_size)}, scale range {tuple(scale_range)} and largest class share "
                f"{cat_max_ratio} do not go together; see configs/Base-HierVL.yaml"
            )
        self.crop_size = tuple(crop_size)
        self.scale_range = tuple(scale_range)
        self.flip_prob = flip_prob
        self.ignore_label = ignore_label
        self.cat_max_ratio = cat_max_ratio
        self.jitter, self.gray_prob = tuple(jitter), gray_prob
        self.instances, self.first_instance = instances, first_instance

    @classmethod
    def from_config(cls, cfg, ignore_label: int = 255, first_instance: int = 1) -> dict:
        return {
            "crop_size": cfg.INPUT.CROP_SIZE,
            "scale_range": cfg.INPUT.SCALE_RANGE,
            "flip_prob": cfg.INPUT.FLIP_PROB,
            "ignore_label": ignore_label,
            "cat_max_ratio": cfg.INPUT.CAT_MAX_RATIO,
            "jitter": cfg.INPUT.COLOR_JITTER,
            "gray_prob": cfg.INPUT.GRAYSCALE_PROB,
            "instances": cfg.MODEL.CRITERION.SEGMENTS == "instances",
            "first_instance": first_instance,
        }

    def labeled(self, record: dict, rng: np.random.Generator, want: tuple[int, int] | None = None) -> dict:
        """A labeled sample.

        Args:
            record: with ``file_name`` and ``sem_seg_file_name``, for instances also ``instances_file_name``.
            rng: draws the geometry.
            want: (class, pixels): draw the crop again until it holds so many pixels of the class.

        Returns:
            ``image`` uint8 (3, h, w) RGB, ``sem_seg`` int64 (h, w), ``valid`` bool (h, w), False on padding,
            and ``padded``, whether there is any; ``file_name``, ``image_id``. If asked for, ``instances`` int64 (h, w):
            a number > 0 for every single object, whose class is that of its pixels in ``sem_seg``; 0 elsewhere (stuff,
            groups, padding).
        """
        image, label = read_image(record["file_name"]), read_label(record["sem_seg_file_name"])
        _same_size(image, label, record["sem_seg_file_name"], record["file_name"])
        geometry = self._draw(rng, label.shape, lambda g: self._accepts(g, label, want))
        sample = {
            **_names(record),
            "image": self._to_tensor(geometry.apply(image)),
            "sem_seg": self._label_tensor(geometry.apply(label, nearest=True)),
            "valid": self._valid(geometry),
            "padded": geometry.size != self.crop_size,
        }
        if self.instances:
            numbers = read_label(record["instances_file_name"])
            _same_size(image, numbers, record["instances_file_name"], record["file_name"])
            numbers = geometry.apply(numbers.astype(np.uint16), nearest=True)  # OpenCV resizes no int32
            sample["instances"] = self._label_tensor(np.where(numbers < self.first_instance, 0, numbers), fill=0)
        return sample

    def unlabeled(
        self,
        record: dict,
        rng: np.random.Generator,
        strong_rngs: Sequence[np.random.Generator],
        with_truth: bool = False,
    ) -> dict:
        """An unlabeled sample; its mask file is opened only to ``with_truth``.

        Args:
            record: with ``file_name``.
            rng: draws the geometry, which all views share.
            strong_rngs: one generator per strong view.
            with_truth: add ``true_sem_seg`` int64 (h, w) where the record has a mask (for logging only).

        Returns:
            ``image`` uint8 (3, h, w), the weak view; ``strong``, a list of the same; ``valid`` bool (h, w),
            False on padding, and ``padded``, whether there is any; ``file_name``, ``image_id``.
        """
        image = read_image(record["file_name"])
        geometry = self._draw(rng, image.shape[:2])
        weak = geometry.apply(image)
        sample = {
            **_names(record),
            "image": self._to_tensor(weak),
            # Recolored before padding: padding stays 0 and does not bleed in through the blur.
            "strong": [
                self._to_tensor(strong_view(weak, r, self.jitter, gray_prob=self.gray_prob)) for r in strong_rngs
            ],
            "valid": self._valid(geometry),
            "padded": geometry.size != self.crop_size,
        }
        if with_truth and "sem_seg_file_name" in record:
            label = read_label(record["sem_seg_file_name"])
            _same_size(image, label, record["sem_seg_file_name"], record["file_name"])
            sample["true_sem_seg"] = self._label_tensor(geometry.apply(label, nearest=True))
        return sample

    def _draw(
        self,
        rng: np.random.Generator,
        source: tuple[int, int],
        accepts: Callable[[Geometry], bool] = lambda geometry: True,
    ) -> Geometry:
        for _ in range(_TRIES):
            geometry = Geometry.draw(rng, source, self.crop_size, self.scale_range, self.flip_prob)
            if accepts(geometry):
                break
        return geometry

    def _accepts(self, geometry: Geometry, label: np.ndarray, want: tuple[int, int] | None) -> bool:
        if want is None and self.cat_max_ratio == 1:
            return True
        label = geometry.cut(label)
        if want is not None:
            pixels = np.count_nonzero(label == want[0]) * geometry.scale**2  # as they will be in the crop
            if pixels < want[1]:
                return False
        counts = np.bincount(label[label != self.ignore_label])
        return not counts.any() or counts.max() <= self.cat_max_ratio * counts.sum()

    def _to_tensor(self, image: np.ndarray) -> torch.Tensor:
        """uint8 (h', w', 3) -> padded (3, h, w)."""
        padded = np.zeros((3, *self.crop_size), np.uint8)
        padded[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
        return torch.from_numpy(padded)

    def _label_tensor(self, label: np.ndarray, fill: int | None = None) -> torch.Tensor:
        """(h', w') -> int64 (h, w), padded with ``fill`` (None: the ignore label)."""
        padded = np.full(self.crop_size, self.ignore_label if fill is None else fill, np.int64)
        padded[: label.shape[0], : label.shape[1]] = label
        return torch.from_numpy(padded)

    def _valid(self, geometry: Geometry) -> torch.Tensor:
        valid = torch.zeros(self.crop_size, dtype=torch.bool)
        valid[: geometry.size[0], : geometry.size[1]] = True
        return valid


class TestMapper:
    """Makes evaluation samples: the whole image, optionally resize_maps; the label is left to the evaluator."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    @configurable
    def __init__(self, short_side: int = 0) -> None:
        """Args: ``short_side``: the image's shorter side is resize_maps to so many pixels; 0 keeps its size."""
        self.short_side = short_side

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {"short_side": cfg.INPUT.TEST_SHORT_SIDE}

    def __call__(self, record: dict) -> dict:
        """Returns ``image`` uint8 (3, H', W') RGB; ``height``, ``width`` of the file; the record's keys."""
        return {**record, **self.from_array(read_image(record["file_name"]))}

    def from_array(self, image: np.ndarray) -> dict:
        """The sample of an image that was read already, uint8 (H, W, 3) RGB."""
        height, width = image.shape[:2]
        if self.short_side:
            factor = self.short_side / min(height, width)
            image = resize(image, (round(height * factor), round(width * factor)))
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}


def _names(record: dict) -> dict:
    return {key: record[key] for key in ("file_name", "image_id") if key in record}


def _same_size(image: np.ndarray, label: np.ndarray, label_file: str, image_file: str) -> None:
    if image.shape[:2] != label.shape:
        raise UserError(
            f"{label_file} is {label.shape[1]}x{label.shape[0]}, its image "
            f"{image_file} is {image.shape[1]}x{image.shape[0]}; make the mask the size of the image"
        )
