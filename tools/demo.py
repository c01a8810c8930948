"""Segment images with a trained network, in the manner of Detectron2's demo.

    python tools/demo.py --config-file configs/camvid_23.yaml --input photos/*.jpg --output out \
        --opts MODEL.WEIGHTS output/camvid_23/model_final.pth

For every image NAME, writes out/NAME.jpg (overlay with class names) and out/NAME_labels.png (the class index of
each pixel, 255 where the network is less sure than --confidence). Only images of the same name get longer ones: x.jpg
and x.png become x_jpg and x_png, a/x.jpg and b/x.jpg become a_x_jpg and b_x_jpg; what is still the same is numbered.

Never writes onto an image of --input, nor onto a file that it did not make (out/.hiervl-made lists those it made).
"""

import collections
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
from hiervl.ownership import OutputFolder
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
        self.network.protocol.selected_only = False
        if classes:
            self.network.set_classes(classes)
            # Fixed colors, far apart in hue, for classes that no table knows.
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
        drawing = Visualizer(
            image, self.metadata, scale=max(1.0, _READABLE / min(image.shape[:2])), instance_mode=ColorMode.IMAGE
        )
        known = label < len(self.metadata.stuff_classes)
        shown = np.where(known, label.astype(np.int64), len(self.metadata.stuff_classes))
        return drawing.draw_sem_seg(shown, area_threshold=image.shape[0] * image.shape[1] // 400, alpha=0.5).get_image()


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


def targets(files: list, folder: str) -> dict:
    """{file: (overlay, label map)}, what is written for each; a file that is named twice counts once."""
    files = list({os.path.abspath(path): path for path in files}.values())
    stems = {path: os.path.splitext(os.path.basename(path))[0] for path in files}
    for longer in (_with_extension, _with_folder):
        count = collections.Counter(stem.casefold() for stem in stems.values())
        stems = {path: longer(path, stem) if count[stem.casefold()] > 1 else stem for path, stem in stems.items()}
    taken, names = set(), {}
    for path, stem in stems.items():
        numbered, number = stem, 1
        while numbered.casefold() in taken:
            number += 1
            numbered = f"{stem}_{number}"
        taken.add(numbered.casefold())
        names[path] = os.path.join(folder, numbered)
    return {path: (f"{name}.jpg", f"{name}_labels.png") for path, name in names.items()}


def _with_extension(path: str, stem: str) -> str:
    return f"{stem}_{os.path.splitext(path)[1][1:]}"


def _with_folder(path: str, stem: str) -> str:
    return f"{os.path.basename(os.path.dirname(os.path.abspath(path)))}_{stem}"


def parse_args(argv=None):
    parser = trained.parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="image files or patterns")
    parser.add_argument("--output", default="output/demo", help="folder for the results (%(default)s)")
    parser.add_argument("--classes", default="", help="other classes: names separated by commas, or a file of them")
    parser.add_argument("--confidence", type=float, default=0.0, help="leave out pixels below it (%(default)s)")
    return parser.parse_args(argv)


def run(args):
    files = expand(args.input)
    made, folder = targets(files, args.output), OutputFolder(args.output, "--output")
    folder.check([path for pair in made.values() for path in pair], [*files, args.config_file, args.classes])
    cfg = trained.read_config(args.config_file, args.opts)
    segment = Segmenter(cfg, args.model, read_classes(args.classes) if args.classes else None)
    for path, (overlay, labels) in tqdm.tqdm(made.items(), disable=len(made) == 1):
        image, probability = segment(path)
        label = segment.labels(probability, args.confidence)
        folder.add((overlay, labels))
        write(labels, label)
        write(overlay, segment.overlay(image, label)[:, :, ::-1])
    print(f"{len(made)} overlays and label maps in {args.output}")


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
