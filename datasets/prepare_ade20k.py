#!/usr/bin/env python
"""Makes the masks of ADE20K's 150 classes (0 becomes 255, the others lose one), and the lists of images.

    ADEChallengeData2016/images/  annotations/                                           what is downloaded
    ADEChallengeData2016/annotations_detectron2/  train.txt  val.txt                     what is made

Resumable: what is there and right is kept. Exit status: 0 only if nothing is wrong.
"""

import sys
from hiervl.data.prepare import command
from hiervl.data.prepare.ade20k import make_plan


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "ADEChallengeData2016")
    return command.run(make_plan, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
