#!/usr/bin/env python
"""Converts the SegNet tutorial's copy of CamVid to HierVL's layout: 11 classes, void becomes 255.

    python datasets/prepare_camvid.py --download         download the copy (190 MB), prepare it, remove the download
    python datasets/prepare_camvid.py --source CamVid    prepare a copy that you have

    CamVid/{train,val,test}/*.png  {train,val,test}annot/*.png  {train,val,test}.txt     --source
    camvid/images/  masks/  train.txt  val.txt  test.txt                                 made by this script

Images are converted to JPEGs of quality 90, which the published lists of the CamVid splits name. With --png they are
copied instead, and prepare_splits.py makes lists with their names.

An interrupted run can be repeated; valid files are kept. The exit status is 0 only if there are no problems.
"""

import argparse
import sys

from hiervl.data.prepare import command
from hiervl.data.prepare.camvid import make_plan
from hiervl.data.prepare.camvid_archive import fetch_source, is_prepared, remove_fetched
from hiervl.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "camvid")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--source", help="folder CamVid of the SegNet tutorial")
    source.add_argument("--download", action="store_true", help="download that folder from GitHub")
    parser.add_argument("--png", action="store_true", help="copy the PNG images instead of converting them to JPEG")
    args = parser.parse_args(argv)
    if not args.download:
        return command.run(make_plan, args)
    if args.check:
        parser.error("--check cannot be used with --download, because it writes nothing; use it with --source")
    return download_and_prepare(args)


def download_and_prepare(args: argparse.Namespace) -> int:
    if is_prepared(args.root) and not args.png:
        print(f"{args.root}: CamVid is already prepared; nothing to download")
        return 0
    try:
        args.source = fetch_source(args.root, args.partial)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    status = command.run(make_plan, args)
    if status == 0:
        remove_fetched(args.root)
    return status


if __name__ == "__main__":
    sys.exit(main())
