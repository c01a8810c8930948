#!/usr/bin/env python
"""The labeled/unlabeled lists of the benchmarks, and lists of your own.

    python datasets/prepare_splits.py                          fetch or make all lists in datasets/splits, check them
    python datasets/prepare_splits.py --source DIR             the same from a local copy
    python datasets/prepare_splits.py --source DIR --check     check the copy, write nothing
    python datasets/prepare_splits.py --draw camvid_train --labeled 20 50 --seeds 0 1 [--balanced]

The published lists come from UniMatch's repository (MIT license); each must have the SHA-256 that is known. Exit
status: 0 only if everything holds.
"""

import argparse
import os
import sys
from hiervl.data.datasets import DEFAULT_SPLIT_ROOT
from hiervl.data.prepare import published
from hiervl.data.prepare.sample_splits import sample_splits
from hiervl.data.prepare.parallel import cores
from hiervl.errors import UserError

GROUPS = sorted(published.TRAIN_PARTS)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=DEFAULT_SPLIT_ROOT, help="folder to write, DATASETS.SPLIT_ROOT (%(default)s)")
    parser.add_argument("--source", help="local copy of the lists (default: the network)")
    parser.add_argument("--check", action="store_true", help="write nothing; check --source, or else --out")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="these data sets only")
    draw = parser.add_argument_group("lists of your own")
    draw.add_argument("--draw", metavar="PART", help="draw labeled images of a registered part, such as folder_train")
    draw.add_argument("--labeled", type=int, nargs="+", help="how many; one split for each, nested")
    draw.add_argument("--seeds", type=int, nargs="+", default=[0], help="one set of splits for each")
    draw.add_argument("--balanced", action="store_true", help="take turns at the classes instead of drawing uniformly")
    args = parser.parse_args(argv)
    if bool(args.draw) != bool(args.labeled):
        parser.error("--draw and --labeled go together")
    return args


def draw(args: argparse.Namespace) -> int:
    kind = "balanced" if args.balanced else "uniform"
    folders = sample_splits(
        args.draw,
        args.labeled,
        args.seeds,
        os.path.join(args.out, args.draw, kind),
        balanced=args.balanced,
        workers=cores(),
    )
    for folder in folders:
        print(f"{folder}: DATASETS.SPLIT_ROOT {args.out} DATASETS.SPLIT {os.path.relpath(folder, args.out)}")
    return 0


def benchmarks(args: argparse.Namespace) -> int:
    folder = args.source if args.check and args.source else args.out
    if not args.check:
        written = published.obtain(args.out, args.only, args.source)
        print(f"{len(written)} lists written to {args.out}")
    problems = published.check(folder, args.only)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    lists = sum(path.split("/")[0] in args.only for path in published.known_hashes())
    print(
        f"{folder}: {len(problems)} problems in the {lists} lists of {', '.join(args.only)}"
        if problems
        else f"{folder}: all {lists} lists of {', '.join(args.only)} are as published"
    )
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return draw(args) if args.draw else benchmarks(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
