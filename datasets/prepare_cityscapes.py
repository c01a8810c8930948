#!/usr/bin/env python
"""Makes Cityscapes' masks of 19 classes from its *_labelIds.png, and the lists of images.

    cityscapes/leftImg8bit/  gtFine/                                                     what is downloaded
    cityscapes/gtFine/*/*/*_gtFine_labelTrainIds.png  train.txt  val.txt                 what is made

Resumable: what is there and right is kept. Exit status: 0 only if nothing is wrong.
"""

import sys
from hiervl.data.prepare import command
from hiervl.data.prepare.cityscapes import make_plan


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "cityscapes")
    return command.run(make_plan, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
