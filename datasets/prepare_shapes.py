#!/usr/bin/env python
"""Generates the procedural dataset `shapes` under DETECTRON2_DATASETS, and checks it.

If the dataset exists with the same parameters, it is only checked. With --check, nothing is written: the files are
compared with those that were generated.
"""

import argparse
import os
import sys
import time
from hiervl.data import shapes
from hiervl.data.datasets import check_dataset, data_root, table_of
from hiervl.data.index import PackedIndex
from hiervl.errors import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.path.join(data_root(), "shapes"), help="folder to write (%(default)s)")
    parser.add_argument("--train", type=int, default=1000, help="training images (%(default)s)")
    parser.add_argument("--val", type=int, default=200, help="validation images (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="height and width, pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the images (%(default)s)")
    parser.add_argument("--labeled", type=int, nargs="+", default=[25, 50, 100, 200], help="labeled images per split")
    parser.add_argument("--split-seeds", type=int, nargs="+", default=[0], help="random seeds; one set of splits each")
    parser.add_argument("--check", action="store_true", help="only check existing files; write nothing")
    return parser.parse_args(argv)


def check(root: str) -> str:
    """Checks the dataset; returns a one-line summary.

    Raises:
        UserError: the dataset is missing, incomplete, changed since it was generated, or has a wrong mask.
    """
    manifest = shapes.read_manifest(root)
    if manifest is None or not manifest["digest"]:
        raise UserError(f"{root}: missing or incomplete dataset; run python datasets/prepare_shapes.py")
    if shapes.digest(root) != manifest["digest"]:
        raise UserError(f"{root} was changed since it was generated; remove it and run prepare_shapes.py again")
    table, counts = table_of("shapes_train"), {}
    for part in ("train", "val"):
        index = PackedIndex.from_list_file(os.path.join(root, f"{part}.txt"), root, need_mask=True)
        check_dataset(index, len(table.classes), table.ignore_label)
        counts[part] = len(index)
    return f"{root}: {counts['train']} training and {counts['val']} validation images, unchanged"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if not args.check:
            start = time.perf_counter()
            made = shapes.generate(
                args.root, args.train, args.val, args.size, args.seed, args.labeled, args.split_seeds
            )
            print(f"generated in {time.perf_counter() - start:.1f} s" if made else "already generated")
        print(check(args.root))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
