"""How time grows with the size of the image, the number of classes, of queries and of images."""

import argparse

import bench_common as common
from bench_models import Bench
from bench_roofline import roofline

ROUNDS = 3
NETWORK = "Mask2Former-R50"
# What is changed: name -> arguments of Bench. The base is 512x512, 21 classes, 100 queries, one image.
CASES = {
    "base": {},
    "image 256x256": {"size": 256},
    "image 768x768": {"size": 768},
    "81 classes": {"classes": 81},
    "150 classes": {"classes": 150},
    "1000 classes": {"classes": 1000},
    "50 queries": {"overrides": ("MODEL.DECODER.NUM_QUERIES", "50")},
    "200 queries": {"overrides": ("MODEL.DECODER.NUM_QUERIES", "200")},
    "2 images": {"batch": 2},
    "4 images": {"batch": 4},
}


def measure(changes: dict, facts: dict, rounds: int) -> dict:
    """Inference of one image and a training step of the batch."""
    bench = Bench(NETWORK, **changes)
    inference, step = roofline({"inference": bench.predict, "step": bench.step}, facts, rounds)
    return {
        "inference ms": inference["measured ms"],
        "inference GFLOP": inference["GFLOP"],
        "inference / roofline": inference["measured / roofline"],
        "step ms": step["measured ms"],
        "step GFLOP": step["GFLOP"],
        "step GB": step["GB"],
        "step / roofline": step["measured / roofline"],
    }


def run(options: argparse.Namespace) -> tuple[dict[str, list[dict]], dict]:
    """One table, and the facts about the machine."""
    facts, rows = common.machine(), []
    for name, changes in CASES.items():
        rows.append({"case": name} | measure(changes, facts, options.rounds or ROUNDS))
    for row in rows:
        row["step / base"] = row["step ms"] / rows[0]["step ms"]
    return {f"{NETWORK}: 512x512, 21 classes, 100 queries, 1 image, and one change each": rows}, facts
