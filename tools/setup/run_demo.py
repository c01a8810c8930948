"""`make demo`: what unlabeled images are worth, in minutes and without a download.

Generates the dataset `shapes`, trains the same network twice at equal student iterations (labeled images only;
labeled and unlabeled), compares both on held-out images, and draws overlays. Writes output/demo/result.json.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from tabulate import tabulate

from hiervl import Predictor
from hiervl.checkpoint import atomic_write
from hiervl.data import shapes
from hiervl.data.datasets import data_root, table_of
from hiervl.data.images import read_label
from hiervl.errors import exit_status
from hiervl.ownership import OutputFolder
from hiervl.predictor import write_image
from tools.demo import ENDINGS, targets

ROOT = Path(__file__).resolve().parents[2]

RUNS = {"labeled only": "configs/shapes_supervised.yaml", "semi-supervised": "configs/shapes.yaml"}


class Run:
    """One training in a process of its own, on its share of the cores."""

    def __init__(self, title, config, output, threads, overrides):
        self.title, self.config, self.output = title, config, output
        os.makedirs(output, exist_ok=True)
        for old in ("metrics.json", "results.json"):  # of an earlier run; they would be read as this one's
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(output, old))
        self.log = open(os.path.join(output, "console.log"), "w")
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(ROOT / "train_net.py"),
            "--config-file",
            config,
            "OUTPUT_DIR",
            output,
            *overrides,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT, env=environment)
        self.start, self.seconds = time.time(), None

    def iteration(self):
        """The last iteration in metrics.json, 0 before the first line."""
        try:
            with open(os.path.join(self.output, "metrics.json")) as file:
                return json.loads(file.readlines()[-1])["iteration"] + 1
        except (OSError, IndexError, ValueError, KeyError):
            return 0

    def finished(self):
        """Whether it has ended. Raises SystemExit with the log's last lines if it failed."""
        code = self.process.poll()
        if code is None:
            return False
        if code:
            with open(self.log.name) as file:
                tail = "".join(file.readlines()[-12:])
            sys.exit(f"{tail}\nerror: the {self.title} run failed; its log is {self.log.name}")
        self.seconds = self.seconds or time.time() - self.start
        return True

    def last_result(self):
        with open(os.path.join(self.output, "results.json")) as file:
            last = json.load(file)["last"]
        return last["iteration"], last["shapes_val"]


def follow(runs, iterations, started):
    """Show progress and time left until all runs have ended."""
    while not all([run.finished() for run in runs]):
        slowest = min(run.iteration() for run in runs)
        elapsed = time.time() - started
        left = elapsed * (iterations - slowest) / slowest if slowest else None
        progress = "   ".join(f"{run.title} {min(run.iteration(), iterations)}/{iterations}" for run in runs)
        eta = "evaluating" if slowest >= iterations else f"about {left:.0f} s left" if left else "starting"
        print(f"[{elapsed:4.0f} s]  {progress}   {eta}", flush=True)
        time.sleep(10 if slowest else 3)


def report(runs, output):
    """Print the table; return the content of result.json."""
    rows, result = [], {}
    for run in runs:
        iteration, models = run.last_result()
        result[run.title] = {
            "command": f"python train_net.py --config-file {run.config} SOLVER.MAX_ITER {iteration}",
            "iterations": iteration,
            "seconds": round(run.seconds, 1),
            **{name: {k: round(m[k], 2) for k in ("mIoU", "pACC", "ECE")} for name, m in models.items()},
        }
        rows.append([run.title, iteration, round(run.seconds), models["student"]["mIoU"], models["teacher"]["mIoU"]])
    result["gain"] = round(rows[1][4] - rows[0][4], 2)
    print(
        "\n"
        + tabulate(
            rows, ["held-out images", "student iterations", "seconds", "mIoU student", "mIoU teacher"], floatfmt=".1f"
        )
    )
    print(f"\nUnlabeled images bring {result['gain']:+.1f} points of mIoU (teacher, last checkpoint).")
    with atomic_write(os.path.join(output, "result.json"), "w") as file:
        json.dump(result, file, indent=1)
    return result


def picture(runs, root, images, path):
    """One column per image of shapes_val: the image, its true classes, and the prediction of each run's network."""
    table = table_of("shapes_val")
    colors = np.array([*table.colors, *[(0, 0, 0)] * (256 - len(table.colors))], np.uint8)
    predictors = [Predictor.from_run(run.output) for run in runs]
    predictions = [predictor(images) for predictor in predictors]
    columns = []
    for i, image in enumerate(images):
        truth = read_label(os.path.join(root, "masks", "val", os.path.basename(image)))
        labels = [truth, *(of_network[i].labels for of_network in predictions)]
        column = [cv2.imread(image)[..., ::-1], *(colors[label] for label in labels)]
        columns.append(np.vstack([_framed(part) for part in column]))
    write_image(path, np.hstack(columns)[..., ::-1])


def _framed(part, scale=2.5, border=4):
    """(H, W, 3) enlarged, white at the right and below."""
    large = cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    return np.pad(large, ((0, border), (0, border), (0, 0)), constant_values=255)


def claim(output):
    """Make the files and folders of an earlier demo ours to overwrite. Raises UserError where others have that name."""
    folders = [os.path.join(output, _folder(config)) for config in RUNS.values()]
    # Only this tool makes a console.log, so a folder without a record and with one is of an earlier version.
    folder = OutputFolder(output, "--output", any(os.path.exists(f"{path}/console.log") for path in folders))
    paths = [*folders, *(os.path.join(output, name) for name in ("result.json", "comparison.png", "overlays"))]
    folder.check(paths)
    folder.add(paths)


def _folder(config):
    return os.path.splitext(os.path.basename(config))[0]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/demo", help="folder for everything (%(default)s)")
    parser.add_argument("--iterations", type=int, default=1200, help="student iterations of both runs (%(default)s)")
    return parser.parse_args(argv)


def run(args):
    os.chdir(ROOT)
    claim(args.output)
    started = time.time()
    root = os.path.join(data_root(), "shapes")
    print(f"Images: {root}")
    shapes.generate(root)
    threads = max(1, (os.cpu_count() or 2) // 2)
    runs = [
        Run(
            title,
            config,
            os.path.join(args.output, _folder(config)),
            threads,
            ["SOLVER.MAX_ITER", str(args.iterations)],
        )
        for title, config in RUNS.items()
    ]
    try:
        follow(runs, args.iterations, started)
    finally:
        for run in runs:
            run.process.terminate()
    report(runs, args.output)
    weights = os.path.join(runs[1].output, "model_final.pth")
    images = [os.path.join(root, "images", "val", f"{i:05d}.png") for i in range(8)]
    picture(runs, root, images, os.path.join(args.output, "comparison.png"))
    overlays = os.path.join(args.output, "overlays")
    written = [f"{stem}{end}" for stem in targets(images, overlays).values() for end in ENDINGS]
    OutputFolder(overlays, "--output").add(written)
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "tools/demo.py",
            "--config-file",
            runs[1].config,
            "--input",
            *images,
            "--output",
            overlays,
            "--opts",
            "MODEL.WEIGHTS",
            weights,
        ],
        check=True,
    )
    print(
        f"All in {time.time() - started:.0f} s. Result: {args.output}/result.json; pictures: {overlays} and\n"
        f"{args.output}/comparison.png (from the top: image, truth, {', '.join(run.title for run in runs)})\n"
        f"Go on: python train_net.py --config-file {runs[1].config} --resume OUTPUT_DIR {runs[1].output} "
        f"SOLVER.MAX_ITER {4 * args.iterations}"
    )


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
