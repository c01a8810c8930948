#!/usr/bin/env python
"""Checks HierVL on a GPU in at most 8 minutes: ``python -m tools.gpu_check``, or ``make gpu-check``.

Needs no network and no data. Each part runs in a process with a time limit; whatever happens to it, the others run.
After every part, gpu_check.md and gpu_check.json are written; what a part prints is in logs/. The exit status is 1 if
something failed. With --device cpu, tiny sizes exercise the check itself.
"""

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# As train_net.py does, before torch is loaded; the processes that are started inherit it.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

from . import report
from .findings import ROOT, Settings
from .parts import PARTS, Part
from .report import BAD, OUT_OF_TIME, Outcome
from .worker import Worker

MINUTES = 7.5  # and some seconds to start and to end
_LEAST_SHARE = 0.25  # a part that has less than this share of its time is not started


def run_parts(
    parts: Sequence[Part], settings: Settings, end: float, changed: Callable[[list[Outcome], Outcome], None]
) -> list[Outcome]:
    """Run parts until the time is over.

    Args:
        end: on the clock `time.monotonic`. changed: called with all outcomes and the latest, after every part.
    """
    outcomes = [Outcome(part.name, part.about) for part in parts]
    worker = None
    try:
        for part, outcome in zip(parts, outcomes):
            seconds = min(part.seconds, end - time.monotonic())
            if seconds < _LEAST_SHARE * part.seconds:
                outcome.status = OUT_OF_TIME
            else:
                worker = worker or Worker(settings)
                if not worker.run(part, seconds, outcome):
                    worker.close()
                    worker = None
            changed(outcomes, outcome)
    except KeyboardInterrupt:
        pass  # the parts that did not come to their end say so
    finally:
        if worker:
            worker.close()
    return outcomes


def choose(names: str, quick: bool) -> list[Part]:
    """The parts named, in their order; all if none is named, but for the benchmarks if it must be quick.

    The first one always runs: results without the card's name are worth little.
    """
    wanted = [name for name in names.split(",") if name]
    unknown = set(wanted) - {part.name for part in PARTS}
    if unknown:
        known = ", ".join(part.name for part in PARTS)
        raise SystemExit(f"error: --parts: there is no part {', '.join(sorted(unknown))}; there are {known}.")
    chosen = wanted or [part.name for part in PARTS if not (quick and part.benchmark)]
    return [part for part in PARTS if part.name in chosen or part is PARTS[0]]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without the benchmarks")
    parser.add_argument("--parts", default="", metavar="A,B", help=", ".join(part.name for part in PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu_check", help="folder of the reports")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts together (default: {MINUTES})")
    return parser


def check_for_gpu() -> None:
    """
    Raises:
        SystemExit: torch finds no GPU.
    """
    import torch  # not needed otherwise: the parts run in a process of their own

    if not torch.cuda.is_available():
        raise SystemExit(
            f"error: --device: torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU; "
            "see whether nvidia-smi does, or exercise the check itself with --device cpu."
        )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the parts and report. Returns the exit status."""
    end = time.monotonic()
    options = make_parser().parse_args(arguments)
    end += 60 * options.minutes
    parts = choose(options.parts, options.quick)
    if options.device == "cuda":
        check_for_gpu()
    settings = Settings(options.device, options.output.resolve())
    settings.output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "tools.gpu_check", *(sys.argv[1:] if arguments is None else arguments)])

    def changed(outcomes: list[Outcome], latest: Outcome) -> None:
        report.write(outcomes, command, settings.output)
        print(f"{latest.part:18}{latest.status:22}{latest.seconds:6.1f} s  {latest.headline}", flush=True)

    # A time limit around the command ends it as Ctrl-C does, so that no process is left behind.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcomes = run_parts(parts, settings, end, changed)
    finally:
        signal.signal(signal.SIGTERM, before)
    report.write(outcomes, command, settings.output)
    print(settings.output / f"{report.TITLE}.md")
    interrupted = any(outcome.status == report.INTERRUPTED for outcome in outcomes)
    return 130 if interrupted else int(any(outcome.status in BAD for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
