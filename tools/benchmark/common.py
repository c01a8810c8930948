"""What the benchmarks share: interleaved timing, and what the machine can do."""

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

Times = dict[str, list[float]]  # name -> seconds of each round


def measure(functions: dict[str, Callable[[], object]], rounds: int) -> tuple[Times, Times]:
    """Seconds, and seconds of the processors (all threads together), of each function in each round, after one
    untimed call.

    All functions run once before any runs again: what else happens on the machine meets them alike,
    and the quotient of two times of one round is worth more than either time.
    """
    wall: Times = {name: [] for name in functions}
    processor: Times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            started, used = time.perf_counter(), time.process_time()
            function()
            wall[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - used)
    return wall, processor


def interleave(functions: dict[str, Callable[[], object]], rounds: int) -> Times:
    """The first of what `measure` returns."""
    return measure(functions, rounds)[0]


def compare(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, and the time of "own" as a share of each other's: by the clock and of the processors.

    The processors' time is the better one where other processes run too.
    """
    wall, processor = measure(functions, rounds)
    row = {f"{name} ms": median_ms(seconds) for name, seconds in wall.items()}
    for name in functions:
        if name != "own":
            row[f"own / {name}"] = median_ratio(wall["own"], wall[name])
            row[f"own / {name}, CPU time"] = median_ratio(processor["own"], processor[name])
    return row


def median_ms(seconds: list[float]) -> float:
    """Median in milliseconds."""
    return statistics.median(seconds) * 1e3


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the quotients round by round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use this many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_new_process(function: Callable, *arguments) -> object:
    """Run a function of a module in a fresh interpreter: what it allocates is not mixed with what was here."""
    # Unlike a Pool, which would wait for ever, it fails if the process is killed, for example for lack of memory.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def resident(key: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at most so far. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def increase(memory: dict[str, float]) -> float:
    """What the work itself needed, of a measurement {"before", "peak"}."""
    return memory["peak"] - memory["before"]


def matrix_product(size: int = 1024) -> Callable[[], object]:
    """A product of two square float32 matrices: 2 * size**3 operations."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    return lambda: torch.mm(a, b, out=out)


def copy_of(megabytes: int = 64) -> Callable[[], object]:
    """A copy between two arrays larger than the caches: it moves twice its size."""
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def machine(rounds: int = 15) -> dict:
    """Processor, versions, and the measured rates that a roofline needs."""
    times = interleave({"gemm": matrix_product(), "copy": copy_of()}, rounds)
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gemm_gflops": 2 * 1024**3 / statistics.median(times["gemm"]) / 1e9,
        "copy_gbytes": 2 * 64 * 2**20 / statistics.median(times["copy"]) / 1e9,
        "load_average": Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else None,
    }


def processor_name() -> str:
    """The processor's name, and the vector instructions torch uses on it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
