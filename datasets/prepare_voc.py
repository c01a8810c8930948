#!/usr/bin/env python
"""Makes the augmented Pascal VOC: masks of VOC 2012 and SBD in one folder, and the lists of images.

    VOC2012/JPEGImages/  SegmentationClass/  ImageSets/Segmentation/{train,val}.txt      downloaded by you, and SBD
    VOC2012/SegmentationClassAug/*.png  train_aug.txt  val.txt                           made by this script

Images of VOC's val list are left out of the train list. If an image has a mask in both, VOC's is used.

An interrupted run can be repeated; valid files are kept. The exit status is 0 only if there are no problems.
"""

import sys
from hiervl.data.prepare import command
from hiervl.data.prepare.voc import make_plan


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "VOC2012")
    parser.add_argument("--sbd", help="folder benchmark_RELEASE of SBD, with dataset/cls/*.mat")
    parser.add_argument("--aug", help="folder of augmented PNGs (SegmentationClassAug), instead of --sbd")
    return command.run(make_plan, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
