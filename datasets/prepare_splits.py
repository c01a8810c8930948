#!/usr/bin/env python
"""Obtains the labeled and unlabeled lists of the benchmarks, or samples your own.

    python datasets/prepare_splits.py                          download or make all lists in datasets/splits, check them
    python datasets/prepare_splits.py --source DIR             the same from a local copy
    python datasets/prepare_splits.py --source DIR --check     only check the copy
    python datasets/prepare_splits.py --sample camvid_train --labeled 20 50 --seeds 0 1 [--balanced]

The published lists are downloaded from UniMatch's repository (MIT license); each must have the known SHA-256. The exit
status is 0 only if there are no problems.
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
    parser.add_argument(
        "--out", default=DEFAULT_SPLIT_ROOT, help="folder to write to, DATASETS.SPLIT_ROOT (%(default)s)"
    )
    parser.add_argument("--source", help="local copy of the lists (default: download them)")
    parser.add_argument("--check", action="store_true", help="only check the lists in --source, or else --out")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="restrict to the lists of these")
    sample = parser.add_argument_group("lists of your own")
    sample.add_argument("--sample", metavar="PART", help="registered part to sample from, such as folder_train")
    sample.add_argument("--labeled", type=int, nargs="+", help="numbers of labeled images; one split each, nested")
    sample.add_argument("--seeds", type=int, nargs="+", default=[0], help="random seeds; one set of splits each")
    sample.add_argument("--balanced", action="store_true", help="cover rare classes, instead of sampling uniformly")
    sample.add_argument("--draw", nargs="?", const="", help=argparse.SUPPRESS)  # the former name of --sample
    args = parser.parse_args(argv)
    if args.draw is not None:
        parser.error("--draw has been renamed; use --sample")
    if bool(args.sample) != bool(args.labeled):
        parser.error("--sample and --labeled must be given together")
    return args


def write_samples(args: argparse.Namespace) -> int:
    """Samples splits of a dataset and prints how to use them; returns the exit status."""
    kind = "balanced" if args.balanced else "uniform"
    folders = sample_splits(
        args.sample,
        args.labeled,
        args.seeds,
        os.path.join(args.out, args.sample, kind),
        balanced=args.balanced,
        workers=cores(),
    )
    for folder in folders:
        print(f"{folder}: DATASETS.SPLIT_ROOT {args.out} DATASETS.SPLIT {os.path.relpath(folder, args.out)}")
    return 0


def obtain_benchmark_lists(args: argparse.Namespace) -> int:
    """Writes the lists of the benchmarks (unless --check) and checks them; returns the exit status."""
    folder = args.source if args.check and args.source else args.out
    if not args.check:
        written = published.obtain(args.out, args.only, args.source)
        print(f"{len(written)} lists written to {args.out}")
    problems = published.check(folder, args.only)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    num_lists = sum(path.split("/")[0] in args.only for path in published.known_hashes())
    names = ", ".join(args.only)
    if problems:
        print(f"{folder}: {len(problems)} problems in the {num_lists} lists of {names}")
        return 1
    print(f"{folder}: all {num_lists} lists of {names} are as published")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return write_samples(args) if args.sample else obtain_benchmark_lists(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
