"""Maps records to tensors: decode, scale, crop, flip and, for unlabeled images, add the strong views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from detectron2.config import configurable

from ..errors import UserError
from .augmentation import strong_view
from .images import read_image, read_label

_MAX_TRIES = 10  # draws of a crop before an unsuitable one is accepted


@dataclass(frozen=True)
class Geometry:
    """Scale, crop and flip, drawn once and applied identically to image, label and views.

    The window is cut from the source image and then resized, so the full scaled image is never computed.

    Attributes:
        window: (y, x, height, width) in the source image, pixels.
        size: (height, width) of the resized window; smaller than the crop if the scaled image is smaller.
        scale: the scale factor that was drawn.
        flip: whether to flip horizontally.
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
        """Draws a geometry.

        Args:
            rng: source of all draws.
            source: (height, width) of the source image, pixels.
            crop: (height, width) of the crop, pixels.
            scale_range: smallest and largest scale factor.
            flip_prob: probability of a horizontal flip.
        """
        scale = rng.uniform(*scale_range)
        start, extent, size = [], [], []
        for source_length, crop_length in zip(source, crop):
            needed = max(1, round(crop_length / scale))
            length = min(source_length, needed)
            extent.append(length)
            start.append(int(rng.integers(source_length - length + 1)))
            if length == needed:
                size.append(crop_length)
            else:
                size.append(min(crop_length, max(1, round(source_length * scale))))
        return cls((*start, *extent), tuple(size), scale, bool(rng.random() < flip_prob))

    def cut(self, array: np.ndarray) -> np.ndarray:
        """Returns the window as a view, neither resized nor flipped."""
        y, x, height, width = self.window
        return array[y : y + height, x : x + width]

    def apply(self, array: np.ndarray, nearest: bool = False) -> np.ndarray:
        """Returns the crop before padding, (*size) or (*size, 3). Labels must be resized with ``nearest``."""
        result = resize(self.cut(array), self.size, nearest)
        return result[:, ::-1] if self.flip else result


def resize(array: np.ndarray, size: tuple[int, int], nearest: bool = False) -> np.ndarray:
    """Resizes (H, W) or (H, W, 3) to ``size`` = (height, width)."""
    if array.shape[:2] == tuple(size):
        return array
    if nearest:
        # INTER_NEAREST samples at pixel corners, which would shift labels by half a pixel relative to the image.
        interpolation = cv2.INTER_NEAREST_EXACT
    else:
        # Average over areas when shrinking; otherwise fine texture aliases into noise.
        interpolation = cv2.INTER_AREA if size[0] < array.shape[0] else cv2.INTER_LINEAR
    return cv2.resize(array, (size[1], size[0]), interpolation=interpolation)


class TrainMapper:
    """Makes training samples. Small crops are padded at the right and bottom, with image value 0 and valid False."""

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
            scale_range: smallest and largest scale factor.
            flip_prob: probability of a horizontal flip.
            ignore_label: label of pixels without a class, and of padding.
            cat_max_ratio: a labeled crop in which one class covers more than this fraction of the labeled pixels is
                redrawn (at most 10 draws); 1 disables this.
            jitter, gray_prob: parameters of the strong views, see :func:`augmentation.strong_view`.
            instances: add the instance map to labeled samples.
            first_instance: smallest value in an instance map file that denotes a single object.

        Raises:
            UserError: crop size, scale range or cat_max_ratio is out of range.
        """
        if min(crop_size) < 1 or not 0 < scale_range[0] <= scale_range[1] or not 0 < cat_max_ratio <= 1:
            raise UserError(
                f"INPUT: invalid CROP_SIZE {tuple(crop_size)}, SCALE_RANGE {tuple(scale_range)} or CAT_MAX_RATIO "
                f"{cat_max_ratio}; see configs/Base-HierVL.yaml"
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
        """Makes a labeled sample.

        Args:
            record: has ``file_name`` and ``sem_seg_file_name`` and, for instances, ``instances_file_name``.
            rng: generator for the geometry.
            want: (class, pixels): redraw the crop (at most 10 draws) until it has this many pixels of the class.

        Returns:
            A dict with ``image`` uint8 (3, h, w) RGB, ``sem_seg`` int64 (h, w), ``valid`` bool (h, w), which is False
            on padding, ``padded``, whether the crop has padding, ``file_name`` and ``image_id``. If the mapper was
            built with ``instances``, also ``instances`` int64 (h, w): a distinct number > 0 for each single object,
            whose class is given by its pixels in ``sem_seg``, and 0 elsewhere (stuff, groups, padding).

        Raises:
            UserError: a file is missing or broken, or a map differs in size from the image.
        """
        image, label = read_image(record["file_name"]), read_label(record["sem_seg_file_name"])
        _check_same_size(image, label, record["sem_seg_file_name"], record["file_name"])
        geometry = self._draw(rng, label.shape, lambda g: self._accepts(g, label, want))
        sample = {
            **_names(record),
            "image": self._to_tensor(geometry.apply(image)),
            "sem_seg": self._label_tensor(geometry.apply(label, nearest=True)),
            "valid": self._valid(geometry),
            "padded": geometry.size != self.crop_size,
        }
        if self.instances:
            instance_ids = read_label(record["instances_file_name"])
            _check_same_size(image, instance_ids, record["instances_file_name"], record["file_name"])
            instance_ids = geometry.apply(instance_ids.astype(np.uint16), nearest=True)  # OpenCV cannot resize int32
            instance_ids = np.where(instance_ids < self.first_instance, 0, instance_ids)
            sample["instances"] = self._label_tensor(instance_ids, fill=0)
        return sample

    def unlabeled(
        self,
        record: dict,
        rng: np.random.Generator,
        strong_rngs: Sequence[np.random.Generator],
        with_truth: bool = False,
    ) -> dict:
        """Makes an unlabeled sample. Its mask file is opened only if ``with_truth`` is set.

        Args:
            record: has ``file_name``.
            rng: generator for the geometry, which all views share.
            strong_rngs: one generator per strong view.
            with_truth: add ``true_sem_seg`` int64 (h, w) if the record has a mask (for logging only).

        Returns:
            A dict with ``image`` uint8 (3, h, w), the weak view, ``strong``, a list of strong views of the same shape,
            ``valid`` bool (h, w), which is False on padding, ``padded``, whether the crop has padding, ``file_name``
            and ``image_id``.

        Raises:
            UserError: a file is missing or broken, or the mask differs in size from the image.
        """
        image = read_image(record["file_name"])
        geometry = self._draw(rng, image.shape[:2])
        weak = geometry.apply(image)
        sample = {
            **_names(record),
            "image": self._to_tensor(weak),
            # Augmented before padding, so that padding stays 0 and does not bleed in through the blur.
            "strong": [
                self._to_tensor(strong_view(weak, r, self.jitter, gray_prob=self.gray_prob)) for r in strong_rngs
            ],
            "valid": self._valid(geometry),
            "padded": geometry.size != self.crop_size,
        }
        if with_truth and "sem_seg_file_name" in record:
            label = read_label(record["sem_seg_file_name"])
            _check_same_size(image, label, record["sem_seg_file_name"], record["file_name"])
            sample["true_sem_seg"] = self._label_tensor(geometry.apply(label, nearest=True))
        return sample

    def _draw(
        self,
        rng: np.random.Generator,
        source: tuple[int, int],
        accepts: Callable[[Geometry], bool] = lambda geometry: True,
    ) -> Geometry:
        """Draws geometries until one is accepted; returns the last one if none is."""
        for _ in range(_MAX_TRIES):
            geometry = Geometry.draw(rng, source, self.crop_size, self.scale_range, self.flip_prob)
            if accepts(geometry):
                break
        return geometry

    def _accepts(self, geometry: Geometry, label: np.ndarray, want: tuple[int, int] | None) -> bool:
        """Whether a crop of ``label`` (H, W) has enough pixels of the class in ``want`` and no class dominates it."""
        if want is None and self.cat_max_ratio == 1:
            return True
        label = geometry.cut(label)
        if want is not None:
            class_id, min_pixels = want
            pixels = np.count_nonzero(label == class_id) * geometry.scale**2  # after scaling
            if pixels < min_pixels:
                return False
        counts = np.bincount(label[label != self.ignore_label])
        return not counts.any() or counts.max() <= self.cat_max_ratio * counts.sum()

    def _to_tensor(self, image: np.ndarray) -> torch.Tensor:
        """uint8 (h', w', 3) -> uint8 (3, h, w), padded with 0."""
        padded = np.zeros((3, *self.crop_size), np.uint8)
        padded[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
        return torch.from_numpy(padded)

    def _label_tensor(self, label: np.ndarray, fill: int | None = None) -> torch.Tensor:
        """(h', w') -> int64 (h, w), padded with ``fill`` (default: the ignore label)."""
        padded = np.full(self.crop_size, self.ignore_label if fill is None else fill, np.int64)
        padded[: label.shape[0], : label.shape[1]] = label
        return torch.from_numpy(padded)

    def _valid(self, geometry: Geometry) -> torch.Tensor:
        """Valid mask, bool (h, w): True on the image, False on padding."""
        valid = torch.zeros(self.crop_size, dtype=torch.bool)
        valid[: geometry.size[0], : geometry.size[1]] = True
        return valid


class TestMapper:
    """Makes evaluation samples: the whole image, optionally resized. The evaluator reads the label itself."""

    __test__ = False  # keeps pytest from collecting this class because of its name

    @configurable
    def __init__(self, short_side: int = 0) -> None:
        """
        Args:
            short_side: length in pixels that the image's shorter side is resized to; 0 keeps the original size.
        """
        self.short_side = short_side

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {"short_side": cfg.INPUT.TEST_SHORT_SIDE}

    def __call__(self, record: dict) -> dict:
        """Adds ``image`` uint8 (3, H', W') RGB and the ``height`` and ``width`` of the file to the record's keys."""
        return {**record, **self.from_array(read_image(record["file_name"]))}

    def from_array(self, image: np.ndarray) -> dict:
        """Makes ``image``, ``height`` and ``width`` of a sample from an image in memory, uint8 (H, W, 3) RGB."""
        height, width = image.shape[:2]
        if self.short_side:
            factor = self.short_side / min(height, width)
            image = resize(image, (round(height * factor), round(width * factor)))
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}


def _names(record: dict) -> dict:
    """The keys that identify the image, if present."""
    return {key: record[key] for key in ("file_name", "image_id") if key in record}


def _check_same_size(image: np.ndarray, label: np.ndarray, label_file: str, image_file: str) -> None:
    if image.shape[:2] != label.shape:
        raise UserError(
            f"{label_file} is {label.shape[1]}x{label.shape[0]}, its image "
            f"{image_file} is {image.shape[1]}x{image.shape[0]}; make the mask the size of the image"
        )
