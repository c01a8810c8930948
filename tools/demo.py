"""Segment images with a trained network, in the manner of Detectron2's demo.

    python tools/demo.py --config-file configs/camvid_23.yaml --input photos/*.jpg --output out \
        --opts MODEL.WEIGHTS output/camvid_23/model_final.pth

For every image NAME, this writes out/NAME.jpg (overlay with class names) and out/NAME_labels.png (class index of each
pixel, 255 where the confidence is below --confidence). Images with the same name get longer ones: x.jpg and x.png
become x_jpg and x_png, a/x.jpg and b/x.jpg become a_x_jpg and b_x_jpg, and remaining duplicates are numbered.

It never overwrites an input image, nor a file that it did not create (out/.hiervl-made lists those it did).
"""

import argparse
import collections
import glob
import os
import sys

import tqdm

from hiervl import Predictor
from hiervl.config import load_config
from hiervl.errors import UserError, exit_status
from hiervl.modeling.text.word_lists import read_classes
from hiervl.ownership import OutputFolder


ENDINGS = (".jpg", "_labels.png")  # of Prediction.save


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
    """{file: path without ending} of what is written for each; a file that is named twice counts once."""
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
    return names


def _with_extension(path: str, stem: str) -> str:
    return f"{stem}_{os.path.splitext(path)[1][1:]}"


def _with_folder(path: str, stem: str) -> str:
    return f"{os.path.basename(os.path.dirname(os.path.abspath(path)))}_{stem}"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="the config that the network was trained with")
    parser.add_argument("--model", choices=("teacher", "student"), default="teacher")
    parser.add_argument("--input", nargs="+", required=True, help="image files or patterns")
    parser.add_argument("--output", default="output/demo", help="folder for the results (%(default)s)")
    parser.add_argument("--classes", default="", help="other classes: names separated by commas, or a file of them")
    parser.add_argument("--confidence", type=float, default=0.0, help="leave out pixels below it (%(default)s)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def run(args):
    files = expand(args.input)
    outputs, folder = targets(files, args.output), OutputFolder(args.output, "--output")
    folder.check(
        [f"{stem}{end}" for stem in outputs.values() for end in ENDINGS], [*files, args.config_file, args.classes]
    )
    classes = read_classes(args.classes) if args.classes else None
    predictor = Predictor(load_config(args.config_file, args.opts), model=args.model, classes=classes)
    for path, stem in tqdm.tqdm(outputs.items(), disable=len(outputs) == 1):
        prediction = predictor(path)
        folder.add([f"{stem}{end}" for end in ENDINGS])
        prediction.save(stem, args.confidence)
    print(f"{len(outputs)} overlays and label maps in {args.output}")


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
