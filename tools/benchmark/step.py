"""Benchmark of a training step against the reference path: time, and peak memory of a process of its own."""

import argparse
import time

from tools.benchmark import common
import torch
from tools.benchmark.models import COMPARED, Bench, peak_memory, stage_times
from tools.benchmark.roofline import roofline

ROUNDS = 3


def against_reference(benches: dict[str, Bench], rounds: int) -> list[dict]:
    rows = []
    for name, bench in benches.items():
        calls = {"own": bench.step, "grid_sample": bench.grid_sample_step, "reference": bench.reference_step}
        rows.append(
            {"network": name, "images": f"{len(bench.inputs)} x {bench.size}x{bench.size}"}
            | common.compare(calls, rounds)
        )
    return rows


def memory() -> list[dict]:
    """Peak of two steps; the network itself (weights) is in "before"."""
    rows = []
    for name in COMPARED:
        own, reference = (common.in_new_process(peak_memory, name, call) for call in ("step", "reference_step"))
        rows.append(
            {
                "network": name,
                "before MB": own["before"],
                "peak MB": own["peak"],
                "reference peak MB": reference["peak"],
                "peak / reference": own["peak"] / reference["peak"],
                "increase / reference": common.increase(own) / common.increase(reference),
            }
        )
    return rows


def where_time_goes(benches: dict[str, Bench], rounds: int) -> list[dict]:
    """Forward by part of the network, then what follows it."""
    rows = []
    for name, bench in benches.items():
        totals: dict[str, list[float]] = {}
        for _ in range(rounds):
            for part, seconds in _one_step(bench).items():
                totals.setdefault(part, []).append(seconds)
        medians = {part: common.median_ms(seconds) for part, seconds in totals.items()}
        whole = sum(medians.values())
        rows += [{"network": name, "part": part, "ms": ms, "share %": 100 * ms / whole} for part, ms in medians.items()]
    return rows


def _one_step(bench: Bench) -> dict[str, float]:
    """Seconds of each part of `Bench.step`."""
    times: dict[str, float] = {}
    bench.model.train()
    bench.optimizer.zero_grad(set_to_none=True)
    marks = [time.perf_counter()]
    with stage_times(bench.model, times):
        total = bench.loss()
    marks.append(time.perf_counter())
    total.backward()
    marks.append(time.perf_counter())
    torch.nn.utils.clip_grad_norm_(bench.model.parameters(), bench.cfg.SOLVER.CLIP_NORM)
    bench.optimizer.step()
    marks.append(time.perf_counter())
    forward, backward, update = (b - a for a, b in zip(marks, marks[1:]))
    # The class scores are called by the criterion, within its time.
    parts = {f"forward: {part}": times[part] for part in ("backbone", "pixel_decoder", "decoder", "criterion")}
    return parts | {"forward: rest": forward - sum(parts.values()), "backward": backward, "clipping, AdamW": update}


def run(options: argparse.Namespace) -> tuple[dict[str, list[dict]], dict]:
    """All tables, and the facts about the machine."""
    rounds = options.rounds or ROUNDS
    tables = {"Peak memory (each in a process of its own)": memory()}
    facts = common.machine()
    benches = {name: Bench(name) for name in COMPARED}
    tables = {"Against the reference path": against_reference(benches, rounds)} | tables
    tables["Where the time goes"] = where_time_goes(benches, rounds)
    tables["Roofline"] = roofline({name: bench.step for name, bench in benches.items()}, facts, rounds)
    return tables, facts
