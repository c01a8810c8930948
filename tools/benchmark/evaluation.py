"""Benchmark of the evaluation: where its time goes, counting against NumPy's, and memory over the images."""

import argparse
import contextlib
import functools
import tempfile
import time
from collections.abc import Iterator
from unittest import mock

from tools.benchmark import common
import cv2
import numpy as np
import torch
from PIL import Image

from hiervl.evaluation import Calibration, ConfusionMatrix, SegmentationEvaluator, evaluator

HEIGHT, WIDTH, CLASSES, IGNORE = 1024, 2048, 19, 255
DISTINCT = 8  # label maps, read again and again
ROUNDS = 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=500, help="images of 2048x1024 to evaluate")


def make_label(seed: int) -> np.ndarray:
    """Regions with ragged outlines, of all classes, and 5 % ignored: (H, W) uint8."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(CLASSES + 1, HEIGHT // 32, WIDTH // 32)).astype(np.float32)
    fine = random.normal(size=(CLASSES + 1, HEIGHT // 8, WIDTH // 8)).astype(np.float32)
    maps = [cv2.resize(a, (WIDTH, HEIGHT)) + 0.3 * cv2.resize(b, (WIDTH, HEIGHT)) for a, b in zip(noise, fine)]
    label = np.argmax(maps, axis=0).astype(np.uint8)
    label[label == CLASSES] = IGNORE
    return label


def make_scores(label: np.ndarray) -> torch.Tensor:
    """Probabilities that are mostly right: (K, H, W)."""
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(CLASSES, HEIGHT, WIDTH, generator=random)
    scores.scatter_add_(0, torch.from_numpy(label).long().clamp(max=CLASSES - 1)[None], torch.ones(1, HEIGHT, WIDTH))
    return scores.div_(scores.sum(0))


def bincount_int64(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The usual way: (K, K) counts."""
    valid = label != IGNORE
    cells = CLASSES * label[valid].astype(np.int64) + prediction[valid].astype(np.int64)
    return np.bincount(cells, minlength=CLASSES**2).reshape(CLASSES, CLASSES)


def counting(rounds: int) -> list[dict]:
    label = make_label(0)
    prediction = np.where(label == IGNORE, 0, label)
    prediction[::7] = 3
    matrix = ConfusionMatrix(CLASSES, IGNORE)
    calls = {
        "own": functools.partial(matrix.update, label, prediction),
        "numpy": functools.partial(bincount_int64, label, prediction),
    }
    wall, processor = common.measure(calls, rounds)
    return [
        {
            "pixels": label.size,
            "counting ms": common.median_ms(wall["own"]),
            "np.bincount on int64 ms": common.median_ms(wall["numpy"]),
            "faster by": common.median_ratio(wall["numpy"], wall["own"]),
            "faster by, CPU time": common.median_ratio(processor["numpy"], processor["own"]),
        }
    ]


def clocks() -> np.ndarray:
    """Seconds by the clock and of the processors (all threads together)."""
    return np.array([time.perf_counter(), time.process_time()])


@contextlib.contextmanager
def timed(times: dict[str, np.ndarray]) -> Iterator[None]:
    """Add up the seconds (`clocks`) of the evaluator's parts within the block."""

    def watch(name: str, function):
        def run(*arguments):
            started = clocks()
            result = function(*arguments)
            times[name] = times.get(name, 0.0) + clocks() - started
            return result

        return run

    parts = (
        ("decoding PNGs", evaluator, "read_label"),
        ("counting", ConfusionMatrix, "update"),
        ("reliability", Calibration, "update"),
    )
    with contextlib.ExitStack() as stack:
        for name, owner, attribute in parts:
            stack.enter_context(mock.patch.object(owner, attribute, watch(name, getattr(owner, attribute))))
        yield


def evaluate(images: int, device: str = "cpu", distinct: int = DISTINCT) -> dict:
    """Seconds of each part, and megabytes after a tenth of the images and after all. Linux only.

    Args:
        images: how many to evaluate, of `distinct` different ones. device: where the network leaves its scores.
    """
    times: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        labels = [make_label(seed) for seed in range(distinct)]
        paths = [f"{folder}/{seed}.png" for seed in range(distinct)]
        for label, path in zip(labels, paths):
            Image.fromarray(label).save(path)
        scores = [make_scores(label).to(device) for label in labels[:2]]
        scorer = SegmentationEvaluator([f"class {k}" for k in range(CLASSES)], ignore_label=IGNORE)
        resident, started = {}, clocks()
        with timed(times):
            for i in range(images):
                scorer.process([{"sem_seg_file_name": paths[i % distinct]}], [{"sem_seg": scores[i % len(scores)]}])
                if i + 1 in (max(images // 10, 1), images):
                    resident[i + 1] = common.resident("VmRSS")
        whole = clocks() - started
    return {"times": times | {"top class, checks": whole - sum(times.values())}, "whole": whole, "resident": resident}


def run(options: argparse.Namespace) -> tuple[dict[str, list[dict]], dict]:
    """All tables, and the facts about the machine."""
    facts = common.machine() | {"images": options.images, "size": f"{WIDTH}x{HEIGHT}", "classes": CLASSES}
    result = common.in_new_process(evaluate, options.images)
    parts = [
        {
            "part": part,
            "ms per image": 1e3 * seconds[0] / options.images,
            "share %": 100 * seconds[0] / result["whole"][0],
            "share of CPU time %": 100 * seconds[1] / result["whole"][1],
        }
        for part, seconds in result["times"].items()
    ]
    resident = [{"images": n, "resident MB": megabytes} for n, megabytes in result["resident"].items()]
    tables = {"Counting": counting(options.rounds or ROUNDS), "Where the time goes (without the network)": parts}
    return tables | {"Memory": resident}, facts
