"""Segment images with a trained network, in a few lines of Python:

    from hiervl import Predictor

    predictor = Predictor.from_run("output/camvid_23_hiervl")
    prediction = predictor("street.jpg")
    prediction.save("street_segmented")    # street_segmented.jpg and street_segmented_labels.png

The network, its config, and its class names come from the run's folder.
"""

import colorsys
import os
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image

from .checkpoint import load_network
from .config import load_config, use_cpu_without_gpu
from .data.images import read_image, upright_rgb
from .data.mapper import TestMapper
from .errors import UserError

UNSURE = 255
_MIN_OVERLAY_SIDE = 360  # pixels on the shorter side of an overlay, so that class names are readable


@dataclass
class Prediction:
    """The segmentation of one image.

    Attributes:
        image: uint8 (H, W, 3), RGB. labels: (H, W) uint8 or uint16, class indices.
        confidence: float32 (H, W), probability of that class.
        class_names, colors: K names, and uint8 (K, 3) RGB.
        probabilities: float32 (K, H, W), if they were asked for. They sum to less than 1 where evidence is thin.
    """

    image: np.ndarray
    labels: np.ndarray
    confidence: np.ndarray
    class_names: list
    colors: np.ndarray
    probabilities: np.ndarray | None = None

    def confident_labels(self, min_confidence: float) -> np.ndarray:
        """The labels, with 255 (65535 for 255 classes or more) where the confidence is lower."""
        unsure = np.iinfo(self.labels.dtype).max
        return np.where(self.confidence < min_confidence, self.labels.dtype.type(unsure), self.labels)

    def overlay(self, min_confidence: float = 0.0) -> np.ndarray:
        """The image with regions and class names drawn over it, uint8 RGB; a small image is enlarged."""
        metadata = Metadata(stuff_classes=list(self.class_names), stuff_colors=self.colors.tolist())
        height, width = self.image.shape[:2]
        scale = max(1.0, _MIN_OVERLAY_SIDE / min(height, width))
        drawing = Visualizer(self.image, metadata, scale=scale, instance_mode=ColorMode.IMAGE)
        labels = self.confident_labels(min_confidence).astype(np.int64)
        labels = np.minimum(labels, len(self.class_names))  # what is no class is not drawn
        return drawing.draw_sem_seg(labels, area_threshold=height * width // 400, alpha=0.5).get_image()

    def save(self, stem: str, min_confidence: float = 0.0) -> tuple[str, str]:
        """Write STEM.jpg (overlay) and STEM_labels.png (class indices); returns the two paths.

        Raises:
            UserError: a file cannot be written.
        """
        paths = f"{stem}.jpg", f"{stem}_labels.png"
        write_image(paths[0], self.overlay(min_confidence)[:, :, ::-1])
        write_image(paths[1], self.confident_labels(min_confidence))
        return paths


class Predictor:
    """A trained network with its config.

    Args:
        config: path of a config file, or a config.
        weights: checkpoint; "" for the config's MODEL.WEIGHTS.
        device: "cuda" or "cpu"; None for the config's, on a CPU where there is no GPU.
        classes: other class names than those it was trained with; their texts must be available.
        model: "teacher" or "student" of the checkpoint.
    Raises:
        UserError: a missing or unsuitable file, or a class without a text.
    """

    def __init__(self, config, weights: str = "", device: str | None = None, classes=None, model: str = "teacher"):
        cfg = load_config(config, []) if isinstance(config, str | os.PathLike) else config.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = weights or cfg.MODEL.WEIGHTS
        cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
        use_cpu_without_gpu(cfg)
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty; name a checkpoint, such as output/camvid_23/model_final.pth.")
        self.cfg = cfg
        self.network = build_model(cfg).eval()
        load_network(self.network, cfg.MODEL.WEIGHTS, model)
        self.network.protocol.selected_only = False
        self.mapper = TestMapper(cfg)
        self.colors = np.array(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).stuff_colors, np.uint8)
        if classes is not None:
            self.network.set_classes(classes)
            self.colors = distinct_colors(len(classes))

    @classmethod
    def from_run(cls, folder: str, checkpoint: str = "", **options) -> "Predictor":
        """The network of a training run.

        Args:
            folder: the run's OUTPUT_DIR, with config.yaml.
            checkpoint: file in it; "" for model_final.pth, or, in an unfinished run, the last checkpoint.
            options: device, classes, model: see Predictor.
        """
        config = os.path.join(folder, "config.yaml")
        if not os.path.isfile(config):
            raise UserError(f"{folder}: is no folder of a training run, since it has no config.yaml.")
        return cls(config, os.path.join(folder, checkpoint or _newest_checkpoint(folder)), **options)

    @property
    def class_names(self) -> list:
        return self.network.class_names

    def __call__(self, images, probabilities: bool = False):
        """Segment one image or a list of images; those of one size go through the network together.

        Args:
            images: path, PIL image, or uint8 (H, W, 3) RGB array; or a list of them.
            probabilities: also return the probabilities of all classes.
        Returns:
            a Prediction, or a list of them.
        Raises:
            UserError: an image that cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self([images], probabilities)[0]
        arrays = [_to_array(image) for image in images]
        return [
            self._prediction(array, output["sem_seg"].float().cpu(), probabilities)
            for array, output in zip(arrays, self._forward(arrays))
        ]

    def _forward(self, arrays: Sequence[np.ndarray]) -> list:
        with torch.no_grad():
            return self.network([self.mapper.from_array(array) for array in arrays])

    def _prediction(self, image, scores, with_probabilities) -> Prediction:
        confidence, labels = scores.max(0)  # (K, H, W) -> (H, W)
        dtype = np.uint8 if len(scores) <= UNSURE else np.uint16
        return Prediction(
            image,
            labels.numpy().astype(dtype),
            confidence.numpy(),
            list(self.class_names),
            self.colors,
            scores.numpy() if with_probabilities else None,
        )


def distinct_colors(count: int) -> np.ndarray:
    """uint8 (count, 3) RGB, far apart in hue and always the same."""
    hues = [0.618 * k % 1 for k in range(count)]
    return np.array([[int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.8, 0.9)] for hue in hues], np.uint8)


def write_image(path: str, image: np.ndarray) -> None:
    """Write a BGR or grayscale image. Raises UserError where that fails."""
    if not cv2.imwrite(path, image):
        raise UserError(f"{path}: could not be written; is there room, and may you write there?")


def _newest_checkpoint(folder: str) -> str:
    if os.path.isfile(os.path.join(folder, "model_final.pth")):
        return "model_final.pth"
    try:
        with open(os.path.join(folder, "last_checkpoint"), encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        raise UserError(f"{folder}: holds no checkpoint (neither model_final.pth nor last_checkpoint).") from None


def _to_array(image) -> np.ndarray:
    """A path, PIL image, or array -> uint8 (H, W, 3) RGB."""
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image))
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"an image array must be uint8 (H, W, 3), RGB; this one is {array.dtype} {array.shape}.")
    return array
