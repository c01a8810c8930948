#!/usr/bin/env python
"""Brings the SegNet tutorial's copy of CamVid into HierVL's layout: 11 classes, void becomes 255.

    CamVid/{train,val,test}/*.png  {train,val,test}annot/*.png  {train,val,test}.txt     --source
    camvid/images/  masks/  train.txt  val.txt  test.txt                                 what is made

Images become JPEG of quality 90, which is what the lists of the CamVid splits name; with --png they stay as they are,
and prepare_splits.py makes the lists anew.

Resumable: what is there and right is kept. Exit status: 0 only if nothing is wrong.
"""

import sys
from hiervl.data.prepare import command
from hiervl.data.prepare.camvid import make_plan


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "camvid")
    parser.add_argument("--source", required=True, help="folder CamVid of the SegNet tutorial")
    parser.add_argument("--png", action="store_true", help="copy the images instead of making JPEGs")
    return command.run(make_plan, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
