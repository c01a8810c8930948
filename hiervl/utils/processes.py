"""What the processes of one distributed run do together: load files in turn, and end."""

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist
from detectron2.utils import comm

from ..errors import UserError

_POLL = 0.5  # seconds between looks at what other processes have reported
LINGER = 2.0  # seconds that process 0 stays after a mistake, because it serves the store in which the others look


@contextlib.contextmanager
def main_process_first():
    """Run the body on the first process of each machine, and only then on the others, which find its files cached.

    If the body fails on one of the first processes, all processes raise, so that nobody waits for the one that failed.

    Raises:
        UserError: the mistake that a first process ended with, on every process.
        RuntimeError: a first process failed in another way; it raises the error itself.
    """
    if comm.get_local_rank() > 0:
        _exchange(None)
        yield
        return
    try:
        yield
    except Exception as error:
        with contextlib.suppress(UserError, RuntimeError):
            _exchange(error)
        raise
    _exchange(None)


def _exchange(error):
    """Wait for the first process of every machine and raise what one of them failed with."""
    mistake = isinstance(error, UserError)
    failures = comm.all_gather(error and (mistake, str(error) if mistake else repr(error)))
    for rank, failure in enumerate(failures):
        if failure is not None:
            mistake, message = failure
            raise UserError(message) if mistake else RuntimeError(f"process {rank} failed: {message}")


def end_together(run: Callable, args):
    """Return run(args). After a user's mistake on any process, all of them end with status 2.

    Each mistake is reported in one line, once however many processes find it. Every process watches for mistakes of the
    others: in a collective, it would wait for a process that has ended until the timeout.
    """
    if comm.get_world_size() == 1:
        try:
            return run(args)
        except UserError as error:
            report(str(error))
            sys.exit(2)
    watch = _Watch()
    try:
        result = run(args)
        watch.stop()
        comm.synchronize()  # process 0 ends last
        return result
    except UserError as error:
        watch.stop()
        _report_once(str(error))
        _leave()
    except Exception:
        # A process that ended with a mistake breaks the connections of the others.
        with contextlib.suppress(dist.DistError):
            if _was_reported():
                _leave()
        raise
    finally:
        watch.stop()


def report(problem: str) -> None:
    print(f"error: {problem}", file=sys.stderr, flush=True)


class _Watch:
    """Ends this process when another one has reported a mistake."""

    def __init__(self):
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self):
        """Also waits for the thread: the interpreter must not end while it talks to the store."""
        self._stopped.set()
        self._thread.join()

    def _look(self):
        with contextlib.suppress(dist.DistError):  # process 0 has ended, and the launcher says why
            while not self._stopped.wait(_POLL):
                if _was_reported():
                    _leave()


def _report_once(problem):
    """Report a mistake unless another process has, and tell the others that the run ends."""
    digest = hashlib.sha256(problem.encode()).hexdigest()
    try:
        if _store().add(f"hiervl/mistake/{digest}", 1) == 1:
            report(problem)
        _store().add("hiervl/mistakes", 1)
    except dist.DistError:  # nobody left to look at the store
        report(problem)


def _was_reported():
    return _store().add("hiervl/mistakes", 0) > 0


def _leave():
    if comm.get_rank() == 0:
        time.sleep(LINGER)
    os._exit(2)  # sys.exit would wait for the other processes and for data workers


def _store():
    """What the process group was initialized with. Unlike a collective, it needs no answer from other processes."""
    return dist.distributed_c10d._get_default_store()
