"""A process that runs parts one after the other, and can be stopped without harm to the rest.

An error on a GPU may leave a process unable to use it, and a hang has no exception: parts run in a process of their
own, which is replaced after an error. Parts that go well share one, since loading torch takes seconds. The process that
was started first does not load it at all.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback

from .findings import ROOT, Findings, Settings, Skipped
from .parts import Part
from .report import ERROR, SKIPPED, STOPPED, TIMED_OUT, Outcome

_START_SECONDS = 60


def serve(connection, settings: Settings) -> None:
    """Run the parts that are named through the connection, until it is closed."""
    os.setsid()  # so that this process is stopped together with those that it starts
    os.chdir(ROOT)
    connection.send(("ready",))
    while True:
        try:
            module, seconds, log = connection.recv()
        except EOFError:
            return
        with _printing_to(log):
            try:
                part = importlib.import_module(module)
                if "torch" in sys.modules:
                    _reset(settings)
                part.run(settings, Findings(connection.send, seconds))
                last = ("done",)
            except Skipped as reason:
                last = (SKIPPED, str(reason))
            except (Exception, SystemExit):
                traceback.print_exc()
                last = (ERROR, traceback.format_exc(limit=-8))
        connection.send(last)


@contextlib.contextmanager
def _printing_to(path: str):
    """Send what this process and its children print to a file."""
    kept = [os.dup(stream) for stream in (1, 2)]
    with open(path, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in zip((1, 2), kept):
                os.dup2(copy, stream)
                os.close(copy)


def _reset(settings: Settings) -> None:
    """Nothing of the part before changes what this one finds."""
    import torch

    gc.collect()
    random.seed(0)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # as train_net.py does
    if settings.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


class Worker:
    """The process, seen from the one that started it."""

    def __init__(self, settings: Settings):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, settings))
        self._process.start()
        theirs.close()
        self._settings, self._ready = settings, False

    def run(self, part: Part, seconds: float, outcome: Outcome) -> bool:
        """Run a part for at most `seconds`, and write what it finds into `outcome`.

        Returns:
            whether this process can run more parts.
        """
        folder = self._settings.output / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        outcome.log = str(folder / f"{part.name}.log")
        if not self._ready and not self._wait_for_start(min(seconds, _START_SECONDS), outcome):
            return False
        started = time.monotonic()
        try:
            self._connection.send((part.module, seconds, outcome.log))
            return self._listen(started + seconds, part, outcome)
        except (EOFError, ConnectionError):
            self._process.join(5)
            outcome.status, outcome.message = ERROR, f"the process ended: {_describe(self._process.exitcode)}"
            return False
        finally:
            outcome.seconds = time.monotonic() - started

    def _wait_for_start(self, seconds: float, outcome: Outcome) -> bool:
        with contextlib.suppress(EOFError, ConnectionError):
            if self._connection.poll(seconds):
                self._connection.recv()
                self._ready = True
                return True
        outcome.status, outcome.message = ERROR, "the process that runs the parts did not start"
        return False

    def _listen(self, end: float, part: Part, outcome: Outcome) -> bool:
        while self._connection.poll(max(0.0, end - time.monotonic())):
            kind, *_ = event = self._connection.recv()
            if kind == "done":
                outcome.conclude()
                return True
            if kind in (SKIPPED, ERROR):
                outcome.status, outcome.message = event
                return kind == SKIPPED
            outcome.take(event)
        outcome.status = STOPPED if part.benchmark and outcome.tables else TIMED_OUT
        outcome.message = "stopped at the end of its time"
        return False

    def close(self) -> None:
        """Stop the process and all that it has started."""
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # it may not have become the head of a group yet
        self._process.join()


def _describe(exit_code: int | None) -> str:
    """Exit status in words: a negative one is a signal."""
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit status {exit_code}"
