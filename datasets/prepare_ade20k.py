#!/usr/bin/env python
"""Makes masks of ADE20K's 150 classes (id 0 becomes 255, ids 1 to 150 become 0 to 149), and the lists of images.

    ADEChallengeData2016/images/  annotations/                                           downloaded by you
    ADEChallengeData2016/annotations_detectron2/  train.txt  val.txt                     made by this script

An interrupted run can be repeated; valid files are kept. The exit status is 0 only if there are no problems.
"""

import sys
from hiervl.data.prepare import command
from hiervl.data.prepare.ade20k import make_plan


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "ADEChallengeData2016")
    return command.run(make_plan, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
