"""Benchmark of the matcher against one cost matrix and one transfer per image and decoder layer."""

import argparse
import functools

from tools.benchmark import common
import torch
from tools.benchmark.models import PerImageMatcher

from hiervl.losses.matcher import HungarianMatcher

ROUNDS = 9
LAYERS, QUERIES, CLASSES, POINTS = 10, 100, 21, 12544
CASES = ((1, 8), (4, 8), (1, 40))  # images, segments of each


def make_arguments(images: int, segments: int, points: int = POINTS) -> tuple:
    """What the criterion hands to the matcher: (class logits, mask logits, segments, weight, labels)."""
    random = torch.Generator().manual_seed(0)
    class_logits = torch.randn(LAYERS, images, QUERIES, CLASSES + 1, generator=random)
    mask_logits = torch.randn(LAYERS, images, QUERIES, points, generator=random)
    at_points = torch.randint(-1, segments, (images, points), generator=random)
    labels = [torch.randint(0, CLASSES, (segments,), generator=random) for _ in range(images)]
    return class_logits, mask_logits, at_points, (at_points >= 0).float(), labels


def run(options: argparse.Namespace) -> tuple[dict[str, list[dict]], dict]:
    """One table, and the facts about the machine."""
    facts, rows = common.machine(), []
    own = HungarianMatcher(2.0, 5.0, 5.0)
    for images, segments in CASES:
        arguments = make_arguments(images, segments)
        calls = {"own": functools.partial(own, *arguments)}
        calls["reference"] = functools.partial(PerImageMatcher(own), *arguments)
        times = common.interleave(calls, options.rounds or ROUNDS)
        rows.append(
            {
                "images": images,
                "segments": segments,
                "ms": common.median_ms(times["own"]),
                "per image and layer ms": common.median_ms(times["reference"]),
                "faster by": common.median_ratio(times["reference"], times["own"]),
                "transfers": 1,
                "transfers per image and layer": images * LAYERS,
            }
        )
    return {f"{LAYERS} predictions, {QUERIES} queries, {POINTS} points": rows}, facts
