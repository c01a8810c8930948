#!/usr/bin/env python
"""Times the parts of the network: ``python -m tools.benchmark op``, or ``all`` of them (the default).

Each part is a module ``bench_<part>.py`` with ``run(options)``, which returns tables (name -> rows) and facts about
the machine, and, if it has options of its own, ``add_arguments(parser)``. To add one, add the module and its line
below.
"""

import argparse
import importlib
import os
import shlex
import sys
from pathlib import Path

# As train_net.py does, before torch is loaded.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import torch

from tools.benchmark import tables

ROOT = Path(__file__).resolve().parents[2]

PARTS = {
    "op": "multi-scale deformable attention against its grid_sample path",
    "step": "a training step against the reference path: time and memory",
    "memory": "peak of the largest semi-supervised step, and what lowers it",
    "inference": "inference against the reference path: time, memory, bfloat16",
    "matcher": "Hungarian matching against one transfer per image and layer",
    "evaluation": "counting, and where the evaluation's time goes",
    "scaling": "image size, classes, queries, batch",
    "prepare": "COCO-sized masks per second, and memory",
}


def make_parser() -> argparse.ArgumentParser:
    """The options of all parts; each part reads its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = "; ".join(f"{name}: {description}" for name, description in PARTS.items())
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all", help=parts)
    parser.add_argument("--threads", type=int, help="threads torch may use (default: its own choice)")
    parser.add_argument("--rounds", type=int, help="rounds of the interleaved measurements (default: the part's own)")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "benchmark", help="folder of the reports")
    for name in PARTS:
        module = importlib.import_module(f"tools.benchmark.{name}")
        if hasattr(module, "add_arguments"):
            module.add_arguments(parser.add_argument_group(name))
    return parser


def main() -> None:
    """Parse the command line, run the chosen parts and report."""
    options = make_parser().parse_args()
    torch.set_flush_denormal(True)  # as train_net.py does
    if options.threads:
        torch.set_num_threads(options.threads)
    command = shlex.join(["python", *sys.argv])
    for name in PARTS if options.part == "all" else [options.part]:
        results, facts = importlib.import_module(f"tools.benchmark.{name}").run(options)
        tables.report(name, command, results, facts, options.output)


if __name__ == "__main__":
    main()
