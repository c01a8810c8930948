#!/usr/bin/env python
"""Makes 81-class masks of COCO 2017 from its instance annotations, and the lists of images.

    coco/annotations/instances_{train,val}2017.json  train2017/*.jpg  val2017/*.jpg      what is downloaded
    coco/masks/*.png  train.txt  val.txt  [instances/*.png]                              what is made

Of overlapping objects the smaller one lies on top; crowds are ignored (255); background is 0, also in images without
an object. The masks that are passed around in this field come from an archive whose making is not published: with
--masks they are used instead, or put them into coco/masks.

Resumable: what is there and right is kept. Exit status: 0 only if nothing is wrong.
"""

import sys
from hiervl.data.prepare import command
from hiervl.data.prepare.coco import make_plan


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "coco")
    parser.add_argument("--masks", help="folder of the unpacked archive of ready-made masks")
    parser.add_argument("--instances", action="store_true", help="also write maps of single objects")
    return command.run(make_plan, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
