"""How often a training step makes the host wait for the GPU, and where.

Every iteration with pseudo-labels is watched as a whole: data, teacher, filters, losses, update, hooks. The last one is
left out, because it writes the log.
"""

import collections
import contextlib
import statistics
import traceback
import warnings
from collections.abc import Iterator

import torch

from . import shapes_run
from .findings import ROOT, Findings, Settings
from .waits import Waits

_MESSAGE = "synchronizing CUDA operation"


class WatchedRun(shapes_run.ShortRun):
    """Keeps, of each iteration after burn-in but the last, the places at which the host waited.

    Attributes:
        waits: a list of places per iteration.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        self.waits, self._watch = [], contextlib.ExitStack()

    def before_step(self):
        if self.cfg.SEMI.BURN_IN <= self.iter < self.max_iter - 1:
            watch = gpu_waits() if self.student.device.type == "cuda" else cpu_waits()
            self.waits.append(self._watch.enter_context(watch))
        super().before_step()

    def after_step(self):
        super().after_step()
        self._watch.close()


def run(settings: Settings, findings: Findings) -> None:
    iterations = 6 if settings.tiny else 16
    with shapes_run.shapes_folder() as folder:
        pairs = shapes_run.overrides(settings, folder / "run", iterations, "SOLVER.LOG_PERIOD", 1000)
        trainer = shapes_run.make_trainer(pairs, WatchedRun)
        trainer.train()
    counts = [len(places) for places in trainer.waits]
    row = {"iterations": len(counts), "median": statistics.median(counts), "least": min(counts), "most": max(counts)}
    findings.row("Waits per iteration", row)
    places = collections.Counter(place for of_iteration in trainer.waits for place in of_iteration)
    for place, count in places.most_common():
        findings.row("Places", {"place": place, "times per iteration": count / len(counts)})
    if not settings.on_gpu:
        findings.note("On a CPU nothing waits: these are the operations that would make the host wait for a GPU.")


@contextlib.contextmanager
def gpu_waits() -> Iterator[list[str]]:
    """A list that gets the place of every synchronization within it."""
    places: list[str] = []

    def note(message, category, filename, line, *_):
        if _MESSAGE in str(message):
            places.append(our_place() or f"{filename}:{line}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def our_place() -> str:
    """The innermost line of hiervl or train code that led here; "" if there is none."""
    package = str(ROOT / "hiervl") + "/"
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(package)]
    return f"{frames[-1].filename.removeprefix(package)}:{frames[-1].lineno}, {frames[-1].name}" if frames else ""


@contextlib.contextmanager
def cpu_waits() -> Iterator[list[str]]:
    """The same for operations that would wait, as the tests count them."""

    with Waits() as waits:
        yield waits.places
