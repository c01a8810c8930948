"""Times by CUDA events, and memory, of a GPU; by the clock on a CPU."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from .findings import Settings

_CALL_MS = 3.0  # work that is shorter is repeated for this long: an event has its own cost
_MOST_CALLS = 50


def mark(settings: Settings) -> object:
    """A point in time: of the work that was given to the GPU so far, or of the clock."""
    if not settings.on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def synchronize(settings: Settings) -> None:
    """Wait for the GPU; marks can be compared after that."""
    if settings.on_gpu:
        torch.cuda.synchronize()


def milliseconds(before, after) -> float:
    """Between two marks."""
    return (after - before) * 1e3 if isinstance(before, float) else before.elapsed_time(after)


def medians(functions: dict[str, Callable[[], object]], settings: Settings, rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of a call of each function. All run once before any runs again."""
    rounds = 1 if settings.tiny else rounds
    calls = {name: _calls(function, settings) for name, function in functions.items()}
    spans: dict[str, list[tuple]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            before = mark(settings)
            for _ in range(calls[name]):
                function()
            spans[name].append((before, mark(settings)))
    synchronize(settings)
    return {name: statistics.median(milliseconds(*s) for s in spans[name]) / calls[name] for name in functions}


def _calls(function: Callable[[], object], settings: Settings) -> int:
    """How many calls to time together, after some that are not timed."""
    function()
    if settings.tiny:
        return 1
    synchronize(settings)
    before = mark(settings)
    function()
    after = mark(settings)
    synchronize(settings)
    return max(1, min(_MOST_CALLS, int(_CALL_MS / max(milliseconds(before, after), 1e-6))))


def forget_peak(settings: Settings) -> None:
    """Free what is free, and count the peak of the memory from here."""
    gc.collect()
    if settings.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(settings: Settings) -> float | str:
    """The most memory that tensors had on the GPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if settings.on_gpu else ""


def fits(work: Callable[[], object]) -> bool:
    """Run the work; False if the GPU's memory is too small for it."""
    try:
        work()
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def formats(settings: Settings) -> dict[str, tuple[torch.dtype | None, bool]]:
    """Number formats to time: name -> (autocast to this type or None, products of float32 in TF32)."""
    found = {"bfloat16": (torch.bfloat16, True), "TF32": (None, True), "float32": (None, False)}
    if settings.on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        del found["bfloat16"]
    return found


@contextlib.contextmanager
def products_in_tf32(enabled: bool) -> Iterator[None]:
    """Within it, float32 is multiplied in TF32 (10 bits of mantissa), or is not."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = enabled
    try:
        yield
    finally:
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value


def kernel_times(work: Callable[[], object], settings: Settings) -> dict[str, float]:
    """Milliseconds of each kernel of the GPU in one call, of each operator on a CPU; the longest first."""
    kind = torch.profiler.ProfilerActivity.CUDA if settings.on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        work()
        synchronize(settings)
    attribute = "self_device_time_total" if settings.on_gpu else "self_cpu_time_total"
    # Annotations span kernels, and would count them twice.
    events = [event for event in profile.key_averages() if not getattr(event, "is_user_annotation", False)]
    times = {event.key: getattr(event, attribute) / 1e3 for event in events}
    return dict(sorted(((name, ms) for name, ms in times.items() if ms > 0), key=lambda item: -item[1]))
