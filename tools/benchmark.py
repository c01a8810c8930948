#!/usr/bin/env python
"""Times the parts of the network: ``python tools/benchmark.py op``.

Each part is a module ``bench_<part>.py`` with ``add_arguments(parser)`` and ``run(options)``, which
returns tables (name -> rows) and facts about the machine. To add one, add the module and its line below.
"""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the project is run from its checkout

import bench_common  # noqa: E402
import torch  # noqa: E402

PARTS = {
    "op": "multi-scale deformable attention against its grid_sample path",
}


def main() -> None:
    """Parse the command line, run the chosen part and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, description in PARTS.items():
        part = parts.add_parser(name, help=description, description=description)
        part.add_argument("--threads", type=int, help="threads torch may use (default: its own choice)")
        part.add_argument("--output", type=Path, default=ROOT / "output" / "benchmark", help="folder of the report")
        importlib.import_module(f"bench_{name}").add_arguments(part)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    tables, facts = importlib.import_module(f"bench_{options.part}").run(options)
    bench_common.report(options.part, shlex.join(["python", *sys.argv]), tables, facts, options.output)


if __name__ == "__main__":
    main()
