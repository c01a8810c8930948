#!/usr/bin/env python
"""Makes masks of Cityscapes' 19 classes from its *_labelIds.png, and the lists of images.

    cityscapes/leftImg8bit/  gtFine/                                                     downloaded by you
    cityscapes/gtFine/*/*/*_gtFine_labelTrainIds.png  train.txt  val.txt                 made by this script

An interrupted run can be repeated; valid files are kept. The exit status is 0 only if there are no problems.
"""

import sys
from hiervl.data.prepare import command
from hiervl.data.prepare.cityscapes import make_plan


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "cityscapes")
    return command.run(make_plan, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
