#!/usr/bin/env python
"""Makes masks of COCO 2017's 81 classes from its instance annotations, and the lists of images.

    coco/annotations/instances_{train,val}2017.json  train2017/*.jpg  val2017/*.jpg      downloaded by you
    coco/masks/*.png  train.txt  val.txt  [instances/*.png]                              made by this script

Where objects overlap, the smaller one is on top. Crowds are ignored (255). Background is 0, also in images without
objects. Earlier work on semi-supervised segmentation shares ready-made masks in an archive, but how they were made is
not published. To use them, name the archive with --masks or unpack it into coco/masks.

An interrupted run can be repeated; valid files are kept. The exit status is 0 only if there are no problems.
"""

import sys
from hiervl.data.prepare import command
from hiervl.data.prepare.coco import make_plan


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "coco")
    parser.add_argument("--masks", help="folder of the unpacked archive of ready-made masks")
    parser.add_argument("--instances", action="store_true", help="also make instance maps")
    return command.run(make_plan, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
