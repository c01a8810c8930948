"""Benchmark of inference against the reference path, in float32 and under bfloat16 autocast."""

import argparse
import contextlib
import logging
import time

from tools.benchmark import common
import torch
from tools.benchmark.models import COMPARED, ROOT, Bench, peak_memory, stage_times
from tools.benchmark.roofline import roofline
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model

from hiervl.checkpoint import load_network
from hiervl.config import load_config
from hiervl.data.datasets import dataset_index
from hiervl.data.loaders import build_test_loader
from hiervl.evaluation import SegmentationEvaluator

ROUNDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", help="a trained checkpoint: its mIoU in float32 and bfloat16 is measured too")
    parser.add_argument(
        "--config-file", default=str(ROOT / "configs" / "camvid_23_unimatch.yaml"), help="the config of --weights"
    )
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides of that config")


def against_reference(benches: dict[str, Bench], rounds: int) -> list[dict]:
    rows = []
    for name, bench in benches.items():
        calls = {"own": bench.predict, "bfloat16": bench.predict_bfloat16}
        calls |= {"grid_sample": bench.grid_sample_predict, "reference": bench.reference_predict}
        rows.append({"network": name, "image": f"{bench.size}x{bench.size}"} | common.compare(calls, rounds))
    return rows


def memory() -> list[dict]:
    rows = []
    for name in COMPARED:
        own, reference = (common.in_new_process(peak_memory, name, call) for call in ("predict", "reference_predict"))
        row = {"network": name, "increase MB": common.increase(own), "reference MB": common.increase(reference)}
        rows.append(row | {"increase / reference": common.increase(own) / common.increase(reference)})
    return rows


def where_time_goes(benches: dict[str, Bench], rounds: int) -> list[dict]:
    rows = []
    for name, bench in benches.items():
        found = []
        for _ in range(rounds):
            times: dict[str, float] = {}
            started = time.perf_counter()
            with stage_times(bench.model, times):
                bench.predict()
            times["rest"] = time.perf_counter() - started - sum(times.values())
            found.append(times)
        medians = {part: common.median_ms([times[part] for times in found]) for part in found[0]}
        whole = sum(medians.values())
        rows += [{"network": name, "part": part, "ms": ms, "share %": 100 * ms / whole} for part, ms in medians.items()]
    return rows


def accuracy(options: argparse.Namespace) -> list[dict]:
    """mIoU of a checkpoint on the first test set of its config, in both types."""
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", options.weights, "DATALOADER.NUM_WORKERS", "0"]
    cfg = load_config(options.config_file, [*overrides, *options.opts])
    name = cfg.DATASETS.TEST[0]
    model = build_model(cfg).eval()
    load_network(model, options.weights)
    found = {}
    for dtype, context in (
        ("float32", contextlib.nullcontext),
        ("bfloat16", lambda: torch.autocast("cpu", torch.bfloat16)),
    ):
        logging.getLogger("detectron2").setLevel(logging.WARNING)
        evaluator = SegmentationEvaluator(name, num_images=len(dataset_index(name, cfg.DATASETS.SPLIT_ROOT)))
        with context():
            found[dtype] = inference_on_dataset(model, build_test_loader(cfg, name), evaluator)["sem_seg"]
    return [
        {
            "data set": name,
            "mIoU float32": found["float32"]["mIoU"],
            "mIoU bfloat16": found["bfloat16"]["mIoU"],
            "difference": found["bfloat16"]["mIoU"] - found["float32"]["mIoU"],
        }
    ]


def run(options: argparse.Namespace) -> tuple[dict[str, list[dict]], dict]:
    """All tables, and the facts about the machine."""
    rounds = options.rounds or ROUNDS
    tables = {"Peak memory of inference (each in a process of its own)": memory()}
    facts = common.machine()
    benches = {name: Bench(name) for name in COMPARED}
    tables = {"Against the reference path": against_reference(benches, rounds)} | tables
    tables["Where the time goes"] = where_time_goes(benches, rounds)
    tables["Roofline"] = roofline({name: bench.predict for name, bench in benches.items()}, facts, rounds)
    if options.weights:
        tables["Accuracy"] = accuracy(options)
    return tables, facts
