"""Benchmark of inference against the reference path, in float32 and under bfloat16 autocast."""

import argparse
import contextlib
import logging

import bench_common as common
import torch
from bench_models import NETWORKS, ROOT, Bench, peak_memory, stage_times
from bench_roofline import roofline
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model

from hiervl.checkpoint import load_network
from hiervl.config import load_config
from hiervl.data.datasets import dataset_index
from hiervl.data.loaders import build_test_loader
from hiervl.evaluation import SegmentationEvaluator

ROUNDS = 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", help="a trained checkpoint: its mIoU in float32 and bfloat16 is measured too")
    parser.add_argument(
        "--config-file", default=str(ROOT / "configs" / "camvid_23_unimatch.yaml"), help="the config of --weights"
    )
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides of that config")


def against_reference(benches: dict[str, Bench], rounds: int) -> list[dict]:
    rows = []
    for name, bench in benches.items():
        calls = {"own": bench.predict, "bfloat16": bench.predict_bfloat16, "reference": bench.reference_predict}
        times = common.interleave(calls, rounds)
        rows.append(
            {
                "network": name,
                "image": f"{bench.size}x{bench.size}",
                "float32 ms": common.median_ms(times["own"]),
                "reference ms": common.median_ms(times["reference"]),
                "time / reference": common.median_ratio(times["own"], times["reference"]),
                "bfloat16 ms": common.median_ms(times["bfloat16"]),
                "bfloat16 / float32": common.median_ratio(times["bfloat16"], times["own"]),
            }
        )
    return rows


def memory() -> list[dict]:
    rows = []
    for name in NETWORKS:
        own, reference = (common.in_new_process(peak_memory, name, call) for call in ("predict", "reference_predict"))
        row = {"network": name, "increase MB": common.increase(own), "reference MB": common.increase(reference)}
        rows.append(row | {"increase / reference": common.increase(own) / common.increase(reference)})
    return rows


def where_time_goes(benches: dict[str, Bench], rounds: int) -> list[dict]:
    rows = []
    for name, bench in benches.items():
        times: dict[str, float] = {}
        with stage_times(bench.model, times):
            whole = sum(common.interleave({"whole": bench.predict}, rounds)["whole"])
        # The hooks also saw the one call that is not timed.
        share = {part: seconds * rounds / (rounds + 1) for part, seconds in times.items()}
        share["rest"] = whole - sum(share.values())
        rows += [
            {"network": name, "part": part, "ms": 1e3 * seconds / rounds, "share %": 100 * seconds / whole}
            for part, seconds in share.items()
        ]
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
    benches = {name: Bench(name) for name in NETWORKS}
    tables = {"Against the reference path": against_reference(benches, rounds)} | tables
    tables["Where the time goes"] = where_time_goes(benches, rounds)
    tables["Roofline"] = roofline({name: bench.predict for name, bench in benches.items()}, facts, rounds)
    if options.weights:
        tables["Accuracy"] = accuracy(options)
    return tables, facts
