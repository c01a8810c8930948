#!/usr/bin/env python
"""Makes a dataset of your own images.

    python datasets/prepare_folder.py --images photos --masks masks --classes classes.txt [--palette palette.txt]
    python datasets/prepare_folder.py --images photos --coco annotations.json --classes classes.txt

classes.txt has one class name per line, in the order of the ids. A mask is a PNG with its image's name: 8 bits per
pixel whose values are class ids (255 is ignored), or, with --palette, colors; palette.txt has lines "R G B name",
where the name is a class or "ignore". Images without a mask, and those of --unlabeled, are unlabeled. Images stay
where they are. Nothing is written onto a file to read, nor onto one that this tool did not make.

    <root>/dataset.yaml  train.txt  val.txt  masks/  splits/all/{labeled,unlabeled}.txt   what is made

Resumable: what is there and right is kept. Exit status: 0 only if nothing is wrong.
"""

import argparse
import sys
from hiervl.data.prepare import command
from hiervl.data.prepare.folder import finish, make_plan


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.parser(__doc__, None)
    parser.add_argument("--name", default="folder", help="its parts are NAME_train and NAME_val (%(default)s)")
    parser.add_argument("--images", required=True, help="folder of images, subfolders included")
    parser.add_argument("--classes", required=True, help="text file of class names")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--masks", help="folder of masks, with the subfolders of --images")
    labels.add_argument("--coco", help="annotations in COCO's format")
    parser.add_argument("--mask-suffix", default="", help="of the masks' names, such as _mask")
    parser.add_argument("--palette", help="text file of the masks' colors")
    parser.add_argument("--unlabeled", help="folder of images without masks")
    parser.add_argument("--val-images", help="folder of images to validate on (default: a share of the labeled ones)")
    parser.add_argument("--val-masks", help="folder of their masks")
    parser.add_argument("--val-coco", help="their annotations in COCO's format")
    parser.add_argument("--val-share", type=float, default=0.2, help="of the labeled images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    args = parser.parse_args(argv)
    if (
        args.val_images
        and bool(args.coco) != bool(args.val_coco)
        or args.val_images
        and not (args.val_masks or args.val_coco)
    ):
        parser.error("--val-images goes with --val-masks or --val-coco, like --images with --masks or --coco")
    return args


def main(argv: list[str] | None = None) -> int:
    return command.run(make_plan, parse_args(argv), finish)


if __name__ == "__main__":
    sys.exit(main())
