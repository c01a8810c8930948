#!/usr/bin/env python
"""Makes a dataset from your own images.

    python datasets/prepare_folder.py --images photos --masks masks --classes classes.txt [--palette palette.txt]
    python datasets/prepare_folder.py --images photos --coco annotations.json --classes classes.txt

classes.txt has one class name per line, in the order of the ids. A mask is a PNG with the name of its image. Its
8-bit values are class ids (255 is ignored) or, with --palette, its colors encode classes: palette.txt has lines
"R G B name", where the name is a class or "ignore". Images without a mask, and those in --unlabeled, are unlabeled.
Images are not copied. Input files, and files that this script did not make, are never overwritten.

    <root>/dataset.yaml  train.txt  val.txt  masks/  splits/all/{labeled,unlabeled}.txt   made by this script

An interrupted run can be repeated; valid files are kept. The exit status is 0 only if there are no problems.
"""

import argparse
import sys
from hiervl.data.prepare import command
from hiervl.data.prepare.folder import finish, make_plan


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.parser(__doc__, None)
    parser.add_argument(
        "--name", default="folder", help="name of the dataset; its parts are NAME_train and NAME_val (%(default)s)"
    )
    parser.add_argument("--images", required=True, help="folder of images, subfolders included")
    parser.add_argument("--classes", required=True, help="text file of class names")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--masks", help="folder of masks, with the same subfolders as --images")
    labels.add_argument("--coco", help="annotation file in COCO's format")
    parser.add_argument("--mask-suffix", default="", help="suffix of the masks' names, such as _mask")
    parser.add_argument("--palette", help="text file with the colors of the masks")
    parser.add_argument("--unlabeled", help="folder of images without masks")
    parser.add_argument("--val-images", help="folder of validation images (default: a share of the labeled images)")
    parser.add_argument("--val-masks", help="folder of masks of the validation images")
    parser.add_argument("--val-coco", help="annotation file of the validation images, in COCO's format")
    parser.add_argument(
        "--val-share", type=float, default=0.2, help="share of the labeled images to validate on (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed for choosing these images (%(default)s)")
    args = parser.parse_args(argv)
    if args.val_images:
        has_labels = args.val_masks or args.val_coco
        if not has_labels or bool(args.coco) != bool(args.val_coco):
            parser.error("--val-images needs --val-masks if you use --masks, and --val-coco if you use --coco")
    return args


def main(argv: list[str] | None = None) -> int:
    return command.run(make_plan, parse_args(argv), finish)


if __name__ == "__main__":
    sys.exit(main())
