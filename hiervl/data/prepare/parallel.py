"""Applies a function to many items in several processes, with the results in order and a progress bar."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from ...errors import UserError

_CHUNK = 8  # items sent to a worker at a time
_work: Callable | None = None  # the function of this worker process


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(work: Callable, items: Sequence, workers: int, title: str) -> Iterator:
    """Yields ``work(item)`` for every item, in order.

    Args:
        work: picklable function; sent to each worker once.
        items: picklable, unless ``workers`` is 1.
        workers: number of processes; with 1, the work is done in this process.
        title: title of the progress bar, which is shown only on a terminal.

    Raises:
        UserError: a worker was killed. What ``work`` raises is passed on.
    """
    with tqdm(total=len(items), desc=title, unit="img", disable=None) as bar:
        for result in _results(work, items, min(workers, len(items))):
            bar.update()
            yield result


def _results(work, items, workers):
    if workers <= 1:
        yield from map(work, items)
        return
    # Forked workers share the memory of this process; on systems without fork, `work` is pickled.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(workers, multiprocessing.get_context(method), _set_work, (work,)) as pool:
        try:
            yield from pool.map(_do, items, chunksize=_CHUNK)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed; if memory ran out, run again with fewer --workers (finished files "
                "are kept)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _set_work(work):
    global _work
    _work = work


def _do(item):
    return _work(item)
