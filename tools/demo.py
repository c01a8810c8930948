"""Segment images with a trained network, in the manner of Detectron2's demo.

    python tools/demo.py --config-file configs/camvid_23.yaml --input photos/*.jpg --output out \
        --opts MODEL.WEIGHTS output/camvid_23/model_final.pth

For every image NAME, writes out/NAME.jpg (overlay with class names) and out/NAME_labels.png (the class index of
each pixel, 255 where the network is less sure than --confidence).
"""
import colorsys
import glob
import os
import sys

import cv2
import numpy as np
import torch
import tqdm
from detectron2.data import Metadata, MetadataCatalog
from detectron2.utils.visualizer import ColorMode, Visualizer
from hiervl.data.images import read_image
from hiervl.data.mapper import TestMapper
from hiervl.errors import UserError, exit_status
from hiervl.modeling.text.word_lists import read_classes
from tools.analysis import trained

UNSURE = 255
_READABLE = 360  # pixels on the shorter side of an overlay, at least


class Segmenter:
    """A trained network, ready for single images.

    Args:
        cfg: config with MODEL.WEIGHTS. model: "teacher" or "student" of the checkpoint.
        classes: other classes than those of the data set; their texts must be at hand (a text tower, or the
            embeddings files).
    """

    def __init__(self, cfg, model: str = "teacher", classes: list[str] | None = None):
        self.metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        self.network = trained.load(cfg, model)
        self.mapper = TestMapper(cfg)
        self.network.protocol.kept_only = False
        if classes:
            self.network.set_classes(classes)
            # Fixed colours, far apart in hue, for classes that no table knows.
            colors = [[int(255 * c) for c in colorsys.hsv_to_rgb(0.618 * k % 1, 0.8, 0.9)] for k in range(len(classes))]
            self.metadata = Metadata(stuff_classes=classes, stuff_colors=colors)

    def __call__(self, path: str):
        """Read an image; return it (H, W, 3) uint8 RGB and the class probabilities (K, H, W)."""
        sample = self.mapper({"file_name": path, "image_id": path})
        return read_image(path), self.network([sample])[0]["sem_seg"].cpu()

    def labels(self, probability: torch.Tensor, confidence: float = 0.0) -> np.ndarray:
        """(K, H, W) -> (H, W) uint8 or uint16; pixels below `confidence` get 255 (65535 for 256 classes or more)."""
        best, label = probability.max(0)
        wide = len(probability) >= UNSURE
        label = label.numpy().astype(np.uint16 if wide else np.uint8)
        label[(best < confidence).numpy()] = np.iinfo(label.dtype).max if wide else UNSURE
        return label

    def overlay(self, image: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Draw regions and class names over an RGB image; returns RGB, a small image enlarged so that its names fit."""
        drawing = Visualizer(image, self.metadata, scale=max(1.0, _READABLE / min(image.shape[:2])),
                             instance_mode=ColorMode.IMAGE)
        known = label < len(self.metadata.stuff_classes)
        shown = np.where(known, label.astype(np.int64), len(self.metadata.stuff_classes))
        return drawing.draw_sem_seg(shown, area_threshold=image.shape[0] * image.shape[1] // 400,
                                    alpha=0.5).get_image()


def write(path: str, image: np.ndarray) -> None:
    if not cv2.imwrite(path, image):
        raise UserError(f"{path}: could not be written; is there room, and may you write there?")


def expand(patterns: list) -> list:
    """File names and patterns -> files, in order. Raises UserError for one that matches nothing."""
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(os.path.expanduser(pattern))) or [pattern]
        if not os.path.exists(found[0]):
            raise UserError(f"{pattern}: no such image (--input).")
        files += found
    return files


def parse_args(argv=None):
    parser = trained.parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="image files or patterns")
    parser.add_argument("--output", default="output/demo", help="folder for the results (%(default)s)")
    parser.add_argument("--classes", default="", help="other classes: names separated by commas, or a file of them")
    parser.add_argument("--confidence", type=float, default=0.0, help="leave out pixels below it (%(default)s)")
    return parser.parse_args(argv)


def run(args):
    cfg = trained.read_config(args.config_file, args.opts)
    files = expand(args.input)
    segment = Segmenter(cfg, args.model, read_classes(args.classes) if args.classes else None)
    os.makedirs(args.output, exist_ok=True)
    for path in tqdm.tqdm(files, disable=len(files) == 1):
        image, probability = segment(path)
        label = segment.labels(probability, args.confidence)
        stem = os.path.join(args.output, os.path.splitext(os.path.basename(path))[0])
        write(f"{stem}_labels.png", label)
        write(f"{stem}.jpg", segment.overlay(image, label)[:, :, ::-1])
    print(f"{len(files)} overlays and label maps in {args.output}")


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
