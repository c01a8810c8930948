"""Deformable attention: the kernel against its grid_sample path, and against what the GPU's L2 cache can deliver.

Of every sampled place, four rows of channels are read, which are in the L2 cache when they are read again; the backward
pass also adds four rows of gradients. The bound is the time in which the cache moves these bytes.
"""

import functools

import torch
import torch.nn.functional as F

from hiervl.ops.extension import has_kernel
from tools.benchmark import op

from . import timing
from .environment import l2_bytes
from .findings import Findings, Settings

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = ((512, 8), (1024, 8), (512, 1), (1024, 1))  # side of the image, images
_CASE_SECONDS = 4  # that a case may take; below it, no other one starts


def run(settings: Settings, findings: Findings) -> None:
    if not has_kernel(settings.device):
        findings.note("The kernel is not built: both times are those of the grid_sample path.")
    rates = cache_rates(settings)
    for work, rate in rates.items():
        findings.row("Rates", {"work": work, "GB/s": rate / 1e9})
    rate = max(rate for work, rate in rates.items() if work.startswith("L2"))
    for size, batch in ((64, 1),) if settings.tiny else CASES:
        for dtype in DTYPES:
            if findings.seconds_left < _CASE_SECONDS:
                findings.note(f"Not measured, out of time: {size} x {size}, {batch} images, {dtype}.")
            elif not timing.fits(functools.partial(compare, size, batch, dtype, rate, settings, findings)):
                findings.note(f"Not measured, out of memory: {size} x {size}, {batch} images, {dtype}.")
            timing.forget_peak(settings)


def compare(size: int, batch: int, dtype: torch.dtype, rate: float, settings: Settings, findings: Findings) -> None:
    """Rows of both passes of one case."""
    inputs = op.make_inputs(batch, size, dtype, settings.device)
    for name, function in op.PASSES.items():
        own = functools.partial(function, inputs)
        times = timing.medians(
            {"own": own, "grid_sample": functools.partial(op.on_reference, function, inputs)}, settings
        )
        bound = 1e3 * moved_bytes(inputs, backward=function is not op.forward) / rate
        row = {"image": size, "images": batch, "type": str(dtype)[6:], "pass": name, "kernel ms": times["own"]}
        row |= {"grid_sample ms": times["grid_sample"], "faster by": times["grid_sample"] / times["own"]}
        findings.row("Deformable attention", row | {"L2 bound ms": bound, "kernel / bound": times["own"] / bound})


def moved_bytes(inputs: dict, backward: bool) -> int:
    """Bytes between the L2 cache and the multiprocessors: rows of value, and of its gradient in float32."""
    channels = 4 * inputs["attention_weights"].numel() * (op.WIDTH // op.HEADS)
    item = inputs["value"].element_size()
    return channels * (item + (item + 4) * backward)


def cache_rates(settings: Settings) -> dict[str, float]:
    """Bytes per second: of copies and gathers within the L2 cache, and of a copy that does not fit into it."""
    cache = l2_bytes() if settings.on_gpu else 2**20
    options = {"device": settings.device, "dtype": torch.float32}
    source = torch.ones(cache // 3 // 4, **options)
    target = torch.empty_like(source)
    width = op.WIDTH // op.HEADS
    table = torch.ones(cache // 4 // (4 * width), width, **options)
    index = torch.randint(len(table), (1000 if settings.tiny else 200_000, 48), device=settings.device)
    large = torch.ones(8 * cache // 4, **options)
    large_target = torch.empty_like(large)
    work = {
        "L2: copy": (lambda: target.copy_(source), 2 * source.nbytes),
        "L2: gather of rows of 32 channels": (
            lambda: F.embedding_bag(index, table, mode="sum"),
            index.numel() * 4 * width,
        ),
        "memory: copy": (lambda: large_target.copy_(large), 2 * large.nbytes),
    }
    times = timing.medians({name: function for name, (function, _) in work.items()}, settings)
    return {name: moved / times[name] * 1e3 for name, (_, moved) in work.items()}
