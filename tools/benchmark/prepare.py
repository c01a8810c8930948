"""Benchmark of the data preparation: COCO-sized masks per second, with one process and with all, and memory."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np

from hiervl.data.datasets import table_of

HEIGHT, WIDTH, OBJECTS, POINTS = 480, 640, 7, 25  # of COCO: usual size, objects per image, points per outline
SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "prepare_coco.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--masks", type=int, default=5000, help="masks of 640x480 to make")


def make_annotations(root: Path, images: int) -> None:
    """Photos of one gray and outlines of random objects, in COCO's layout; one image to validate on."""
    random = np.random.default_rng(0)
    categories = [{"id": i, "name": name} for i, name in enumerate(table_of("coco_train").classes[1:], 1)]
    for part, ids in (("train2017", range(images)), ("val2017", range(images, images + 1))):
        (root / part).mkdir(parents=True)
        photo = cv2.imencode(".jpg", np.full((HEIGHT, WIDTH, 3), 128, np.uint8))[1].tobytes()
        listed, annotations = [], []
        for i in ids:
            name = f"{i:012d}.jpg"
            (root / part / name).write_bytes(photo)
            listed.append({"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH})
            annotations += [_object(random, i, OBJECTS * i + n, len(categories)) for n in range(OBJECTS)]
        path = root / "annotations" / f"instances_{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories}))


def _object(random, image, number, categories):
    bearings = np.sort(random.uniform(0, 2 * np.pi, POINTS))
    radius = random.uniform(10, 150) * random.uniform(0.6, 1, POINTS)
    x = np.clip(random.uniform(0, WIDTH) + radius * np.cos(bearings), 0, WIDTH)
    y = np.clip(random.uniform(0, HEIGHT) + radius * np.sin(bearings), 0, HEIGHT)
    outline = np.stack((x, y), axis=1).round(2).ravel().tolist()
    return {
        "id": number + 1,
        "image_id": image,
        "category_id": int(random.integers(1, categories + 1)),
        "iscrowd": 0,
        "area": float(np.pi * np.mean(radius) ** 2),
        "segmentation": [outline],
    }


def prepare(root: Path, workers: int) -> dict:
    """Run the script as a user does; its own rate, and the resident memory of all its processes together."""
    command = [sys.executable, str(SCRIPT), "--root", str(root), "--partial", "--workers", str(workers)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = [0.0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{SCRIPT.name} failed:\n{output}")
    rate = re.search(r"coco_train: .*?(\d+) images/s", output)
    return {"processes": workers, "seconds": time.perf_counter() - start, "images/s": int(rate[1]), "peak MB": peak[0]}


def _watch(process, peak):
    """Keep the highest sum of the proportional memory of a process and its children, MB."""
    while process.poll() is None:
        family = [process.pid, *_children(process.pid)]
        peak[0] = max(peak[0], sum(_proportional(pid) for pid in family))
        time.sleep(0.2)


def _children(pid):
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [grandchild for child in map(int, text.split()) for grandchild in (child, *_children(child))]


def _proportional(pid):
    """Memory of a process in MB, of what is shared its part only."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return int(re.search(r"^Pss: +(\d+)", text, re.M)[1]) / 1024


def run(options: argparse.Namespace) -> tuple[dict, dict]:
    rows = []
    for workers in (1, os.cpu_count() or 1):
        with tempfile.TemporaryDirectory() as folder:
            make_annotations(Path(folder), options.masks)
            rows.append(prepare(Path(folder), workers))
    return {f"{options.masks} masks of {WIDTH}x{HEIGHT} with {OBJECTS} objects": rows}, {}
