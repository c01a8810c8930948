"""How time grows with the size of the image, the number of classes, of queries and of images."""

import argparse
import functools

from tools.benchmark import common
from tools.benchmark.models import Bench, stage_times
from tools.benchmark.roofline import roofline

ROUNDS = 2
KEEP_ROUNDS = 7  # of a comparison to 10 %
NAMES, KEEP = (48, 150, 1000), 48
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


def with_kept_classes(rounds: int) -> list[dict]:
    """HierVL's inference for more and more names, of which KEEP go on to the decoder."""
    overrides = ("MODEL.HSQG.TOP_K", KEEP, "MODEL.HSQG.MIN_RELEVANCE", 0.0)
    benches = {names: Bench("HierVL-R50", classes=names, overrides=overrides) for names in NAMES}
    decoder: dict[int, list[float]] = {names: [] for names in NAMES}

    def predict(names: int) -> None:
        parts: dict[str, float] = {}
        with stage_times(benches[names].model, parts):
            benches[names].predict()
        decoder[names].append(parts["decoder"])

    times = common.interleave({names: functools.partial(predict, names) for names in NAMES}, rounds)
    return [
        {
            "names": names,
            "kept": KEEP,
            "decoder ms": common.median_ms(decoder[names][1:]),
            "decoder / first row": common.median_ratio(decoder[names][1:], decoder[NAMES[0]][1:]),
            "inference ms": common.median_ms(times[names]),
            "inference / first row": common.median_ratio(times[names], times[NAMES[0]]),
        }
        for names in NAMES
    ]


def run(options: argparse.Namespace) -> tuple[dict[str, list[dict]], dict]:
    """Both tables, and the facts about the machine."""
    facts, rows = common.machine(), []
    for name, changes in CASES.items():
        rows.append({"case": name} | measure(changes, facts, options.rounds or ROUNDS))
    for row in rows:
        row["step / base"] = row["step ms"] / rows[0]["step ms"]
    kept = {"HierVL-R50, 512x512: names and kept classes": with_kept_classes(options.rounds or KEEP_ROUNDS)}
    return kept | {f"{NETWORK}: 512x512, 21 classes, 100 queries, 1 image, and one change each": rows}, facts
