"""Benchmark of multi-scale deformable attention against its grid_sample path."""

import argparse
import functools
import math
from collections.abc import Callable

from tools.benchmark import common
import torch

from hiervl.ops import ms_deform_attn
from hiervl.ops.extension import BUILD_COMMAND, has_kernel
from hiervl.ops.function import reference_path

HEADS, POINTS, WIDTH, STRIDES = 8, 4, 256, (32, 16, 8)
ROUNDS = 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=512, help="side of the image; levels have strides 32, 16 and 8")


def make_inputs(batch: int, size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
    """What an encoder layer hands over: one query for each pixel of each level, looking around itself.

    The numbers do not depend on the device.
    """
    random = torch.Generator().manual_seed(0)
    shapes = [(math.ceil(size / stride),) * 2 for stride in STRIDES]
    grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
    centers = torch.cat(grids).flip(1)  # (S, 2) as (x, y)
    rows = len(centers)
    angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
    offsets = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None] * (1 + torch.arange(POINTS))[:, None]
    # Where training starts (1 to 4 pixels in the head's direction), and some spread: (1, Q, H, L, P, 2)
    offsets = offsets + torch.randn(batch, rows, HEADS, len(shapes), POINTS, 2, generator=random)
    locations = centers[None, :, None, None, None] + offsets / torch.tensor([[w, h] for h, w in shapes])[:, None]
    weights = torch.randn(batch, rows, HEADS, len(shapes) * POINTS, generator=random).softmax(-1)
    value = torch.randn(batch, rows, HEADS, WIDTH // HEADS, generator=random).to(dtype)
    weights = weights.view(batch, rows, HEADS, len(shapes), POINTS)
    return {
        "value": value.to(device).requires_grad_(),
        "spatial_shapes": shapes,
        "level_start": [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))],
        "sampling_locations": locations.to(device).requires_grad_(),
        "attention_weights": weights.to(device).requires_grad_(),
        "grad_output": torch.randn(batch, rows, WIDTH, generator=random).to(device, dtype),
    }


def leaves(inputs: dict) -> list[torch.Tensor]:
    """The inputs that have a gradient."""
    return [inputs[name] for name in ("value", "sampling_locations", "attention_weights")]


def forward(inputs: dict) -> None:
    with torch.no_grad():
        ms_deform_attn(**{name: item for name, item in inputs.items() if name != "grad_output"})


def forward_backward(inputs: dict) -> None:
    output = ms_deform_attn(**{name: item for name, item in inputs.items() if name != "grad_output"})
    torch.autograd.grad(output, leaves(inputs), inputs["grad_output"])


PASSES: dict[str, Callable[[dict], None]] = {"forward": forward, "forward + backward": forward_backward}


def on_reference(function: Callable, inputs: dict) -> None:
    with reference_path():
        function(inputs)


def against_grid_sample(options: argparse.Namespace) -> list[dict]:
    rows = []
    for batch in (1, 2):
        inputs = make_inputs(batch, options.size)
        for name, function in PASSES.items():
            pair = {
                "kernel": functools.partial(function, inputs),
                "grid_sample": functools.partial(on_reference, function, inputs),
            }
            times = common.interleave(pair, options.rounds or ROUNDS)
            rows.append(
                {
                    "B": batch,
                    "pass": name,
                    "kernel ms": common.median_ms(times["kernel"]),
                    "grid_sample ms": common.median_ms(times["grid_sample"]),
                    "faster by": common.median_ratio(times["grid_sample"], times["kernel"]),
                }
            )
    return rows


def types(options: argparse.Namespace) -> list[dict]:
    """Under autocast value has 16 bits while locations and weights keep float32."""
    rows = []
    for name, function in PASSES.items():
        names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        calls = {n: functools.partial(function, make_inputs(1, options.size, dtype)) for n, dtype in names.items()}
        times = common.interleave(calls, options.rounds or ROUNDS)
        rows.append({"pass": name} | {f"{n} ms": common.median_ms(seconds) for n, seconds in times.items()})
    return rows


def on_threads(number: int, function: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with common.threads(number):
            function()

    return run


def thread_gain(options: argparse.Namespace) -> list[dict]:
    """From 1 thread to all, beside the gain of a large matrix product in the same rounds."""
    most, inputs = torch.get_num_threads(), make_inputs(1, options.size)
    work = {name: functools.partial(function, inputs) for name, function in PASSES.items()}
    work |= {"GEMM 2048": common.matrix_product(2048)}
    calls = {(name, n): on_threads(n, function) for name, function in work.items() for n in (1, most)}
    times = common.interleave(calls, options.rounds or ROUNDS)
    gains = {name: common.median_ratio(times[name, 1], times[name, most]) for name in work}
    return [
        {
            "work": name,
            "1 thread ms": common.median_ms(times[name, 1]),
            f"{most} threads ms": common.median_ms(times[name, most]),
            "gain": gain,
            "of GEMM's gain": gain / gains["GEMM 2048"],
        }
        for name, gain in gains.items()
    ]


def roofline(options: argparse.Namespace, facts: dict) -> list[dict]:
    """Each array moved once at the speed of a copy, or all operations at the speed of a matrix product."""
    rows = []
    for batch in (1, 2):
        inputs = make_inputs(batch, options.size)
        place_bytes = inputs["sampling_locations"].nbytes + inputs["attention_weights"].nbytes
        value_bytes, output_bytes = inputs["value"].nbytes, inputs["grad_output"].nbytes
        samples = inputs["attention_weights"].numel() * (WIDTH // HEADS)  # each of one channel: 4 corners
        # Forward: a multiplication and an addition for each corner. Backward adds the same for the
        # dot products and for the sums into value's gradient.
        cases = {
            "forward": (value_bytes + place_bytes + output_bytes, 8 * samples),
            "forward + backward": (3 * value_bytes + 3 * place_bytes + 2 * output_bytes, 24 * samples),
        }
        times = common.interleave({n: functools.partial(PASSES[n], inputs) for n in cases}, options.rounds or ROUNDS)
        for name, (moved, operations) in cases.items():
            memory_ms = moved / facts["copy_gbytes"] / 1e6
            compute_ms = operations / facts["gemm_gflops"] / 1e6
            measured = common.median_ms(times[name])
            row = {"B": batch, "pass": name, "MB": moved / 1e6, "MFLOP": operations / 1e6, "memory ms": memory_ms}
            row |= {"compute ms": compute_ms, "measured ms": measured}
            rows.append(row | {"measured / roofline": measured / max(memory_ms, compute_ms)})
    return rows


def run(options: argparse.Namespace) -> tuple[dict[str, list[dict]], dict]:
    """All tables, and the facts about the machine."""
    if not has_kernel("cpu"):
        raise SystemExit(f"the CPU kernel is not built: {BUILD_COMMAND}")
    facts = common.machine() | {"kernel": torch.ops.hiervl.cpu_instruction_set(), "image": options.size}
    tables = {
        "Against the grid_sample path": against_grid_sample(options),
        "Threads": thread_gain(options),
        "Roofline": roofline(options, facts),
        "Types (locations and weights in float32)": types(options),
    }
    return tables, facts
