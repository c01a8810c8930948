"""Plot learning curves and ablations from result files.

    python -m tools.analysis.plot_results                                         # the figures of docs/RESULTS.md
    python -m tools.analysis.plot_results --runs output/a output/b --out curves.png

Without --runs, reads docs/results/*.json and writes learning_curves.png and ablation.png into docs/figures. With
--runs, reads metrics.json and results.json of training runs (Detectron2's JSON lines, with keys such as
camvid_val/teacher/mIoU) and draws one curve per run.
"""

import argparse
import io
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hiervl.checkpoint import atomic_write
from hiervl.errors import UserError, exit_status
from hiervl.ownership import OutputFolder

DOCS = Path(__file__).resolve().parents[2] / "docs"
SOFTWARE = "hiervl plot_results"  # stands in every PNG that this tool writes, so that it may overwrite its own
# Okabe and Ito's palette, which color-blind readers can tell apart.
GRAY, BLUE, VERMILION = "#595959", "#0072B2", "#D55E00"
PALETTE = BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", GRAY
MARKERS = "o", "s", "^", "D", "v", "P", "X"
STYLES = {"labeled only": (GRAY, "^"), "unimatch": (VERMILION, "s"), "hiervl": (BLUE, "o")}
SETS = {"shapes": ("shapes, 100 labels", BLUE), "camvid": ("CamVid, 23 labels", VERMILION)}


@dataclass
class Curve:
    """A metric over the iterations. values: one per iteration."""

    label: str
    iterations: list
    values: list
    color: str
    marker: str


def read_run(folder: str, metric: str = "mIoU", model: str = "teacher", dataset: str = "") -> tuple[str, dict]:
    """Read the evaluations of one run.

    Args:
        folder: the run's OUTPUT_DIR.
        dataset: which of DATASETS.TEST; empty: the first one in the log.

    Returns:
        The dataset's name, and {iteration: value}, where the iteration counts from 1. Where a resumed run logged an
        iteration twice, the later value stands.

    Raises:
        UserError: no metrics.json, or no such evaluation in it.
    """
    path = os.path.join(folder, "metrics.json")
    pattern = re.compile(rf"(.+)/{re.escape(model)}/{re.escape(metric)}")
    values, seen = {}, []
    for entry in _read_lines(path):
        for key, value in entry.items():
            if match := pattern.fullmatch(key):
                seen.append(match[1])
                values.setdefault(match[1], {})[entry["iteration"] + 1] = value
    name = dataset or (seen[0] if seen else "")
    if name not in values:
        wanted = f"{name or 'DATA_SET'}/{model}/{metric}"
        raise UserError(
            f"{path}: has no {wanted}; check --model, --metric and --dataset, or evaluate more often "
            "(TEST.EVAL_PERIOD)."
        )
    curve = values[name]
    if last := _last_result(folder, name, model, metric):
        curve = {i: value for i, value in curve.items() if i < last[0]} | dict([last])
    return name, dict(sorted(curve.items()))


def _read_lines(path):
    """The entries of a metrics.json that say their iteration; the last line of a running training may be half there."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name the folder of a run.") from None
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not JSON; name the folder of a run.") from None
            continue
        if isinstance(entry, dict) and isinstance(entry.get("iteration"), int):
            entries.append(entry)
    return entries


def _last_result(folder, dataset, model, metric):
    """(iteration, value) of the last evaluation in results.json, None without one."""
    try:
        with open(os.path.join(folder, "results.json"), encoding="utf-8") as file:
            last = json.load(file)["last"]
        return last["iteration"], last[dataset][model][metric]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_labels(folders: list) -> list:
    """The shortest endings of the folders' paths that tell them apart."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def spread(positions: list, gap: float) -> list:
    """Move positions apart until neighbors have at least this gap, each by as little as needed.

    Overlapping positions form a block that is centered on their mean.
    """
    order = np.argsort(positions, kind="stable")
    blocks = []  # [indices, center]
    for index in order:
        blocks.append([[index], positions[index]])
        while len(blocks) > 1 and _top(blocks[-2], gap) + gap > _bottom(blocks[-1], gap):
            above = blocks.pop()
            indices = blocks[-1][0] + above[0]
            blocks[-1] = [indices, float(np.mean([positions[i] for i in indices]))]
    result = [0.0] * len(positions)
    for block in blocks:
        for place, index in enumerate(block[0]):
            result[index] = _bottom(block, gap) + place * gap
    return result


def _bottom(block, gap):
    return block[1] - (len(block[0]) - 1) * gap / 2


def _top(block, gap):
    return block[1] + (len(block[0]) - 1) * gap / 2


def draw_curves(axes, curves: list, decimals: int = 1) -> None:
    """Draw curves and write each one's name and last value at its right end. Call it once the axes' limits are set."""
    for curve in curves:
        axes.plot(curve.iterations, curve.values, color=curve.color, marker=curve.marker, markersize=5, linewidth=2)
    low, high = axes.get_ylim()
    inches = axes.figure.get_figheight() * axes.get_position().height
    places = spread([curve.values[-1] for curve in curves], (high - low) * 0.19 / inches)
    for curve, place in zip(curves, places):
        axes.annotate(
            f"{curve.label} {curve.values[-1]:.{decimals}f}",
            (curve.iterations[-1], curve.values[-1]),
            xytext=(1.03, place),
            textcoords=axes.get_yaxis_transform(),
            color=curve.color,
            va="center",
            fontsize=10,
            annotation_clip=False,
        )


def _bare(axes):
    """Axes without a frame, with faint horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10)


def learning_curves(data: dict, model: str = "teacher") -> Figure:
    """One panel per seed; `data` is the content of docs/results/learning_curves.json."""
    seeds = sorted({curve["seed"] for curve in data["curves"]})
    figure = Figure(figsize=(10, 4))
    panels = np.atleast_1d(figure.subplots(1, len(seeds), sharey=True))
    figure.subplots_adjust(left=0.065, right=0.86, wspace=0.55, top=0.82, bottom=0.14)
    values = [value for curve in data["curves"] for value in curve[model]]
    for axes, seed in zip(panels, seeds):
        _bare(axes)
        axes.tick_params(labelleft=True)
        axes.set(xlim=(0, data["iterations"][-1] * 1.02), ylim=(min(values) - 1.5, max(values) + 1.5))
        axes.yaxis.set_major_locator(MultipleLocator(5))
        axes.set_xlabel("student iteration", fontsize=11)
        axes.set_title(f"seed {seed}", fontsize=11, loc="left")
        draw_curves(
            axes,
            [
                Curve(curve["method"], data["iterations"], curve[model], *STYLES[curve["method"]])
                for curve in data["curves"]
                if curve["seed"] == seed
            ],
        )
        start = data["pseudo_labels_from"]
        axes.axvline(start, color="#999999", linewidth=1, linestyle=":")
        axes.annotate(
            "pseudo-labels\nfrom here",
            (start, axes.get_ylim()[1]),
            xytext=(4, -2),
            textcoords="offset points",
            fontsize=9.5,
            color="#595959",
            va="top",
        )
    panels[0].set_ylabel(data["metric"], fontsize=11)
    figure.suptitle(data["title"], x=0.065, ha="left", fontsize=13, fontweight="bold")
    return figure


def ablation(data: dict) -> Figure:
    """Bars of the mean difference, a dot per seed; `data` is the content of docs/results/ablation.json."""
    rows = sorted(data["rows"], key=mean_difference)
    figure = Figure(figsize=(10, 0.42 * len(rows) + 1.5))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.3, right=0.97, top=0.87, bottom=0.15)
    _bare(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.axvspan(-data["spread"], data["spread"], color="#eeeeee", zorder=0)
    for place, row in enumerate(rows):
        each, mean, (_, color) = differences(row), mean_difference(row), SETS[row["set"]]
        axes.barh(place, mean, color=color, alpha=0.45, height=0.62)
        axes.plot(each, [place] * len(each), "o", color=color, markersize=6, markeredgecolor="white")
        count = f"{len(each)} seed{'s' if len(each) > 1 else ''}"
        axes.text(0.15, place, f"{mean:+.1f}  ({count})".replace("-", "\N{MINUS SIGN}"), va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), [row["change"] for row in rows], fontsize=10.5)
    for tick, row in zip(axes.get_yticklabels(), rows):
        tick.set_color(SETS[row["set"]][1])
    lowest = min(value for row in rows for value in differences(row))
    axes.set(xlim=(lowest - 0.6, data["spread"] + 0.4), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlabel("change in mIoU, points (dot: one seed; gray band: spread of single runs)", fontsize=11)
    figure.suptitle("What a change costs", x=0.02, ha="left", fontsize=13, fontweight="bold")
    for place, (name, color) in enumerate(SETS.values()):
        figure.text(0.3 + 0.24 * place, 0.9, name, color=color, fontsize=11, fontweight="bold")
    return figure


def differences(row: dict) -> list:
    """Changed minus baseline, per seed."""
    return [changed - baseline for changed, baseline in zip(row["changed"], row["baseline"], strict=True)]


def mean_difference(row: dict) -> float:
    """The row's own "mean", where unrounded results were at hand, else that of its differences."""
    return row.get("mean", float(np.mean(differences(row))))


def run_curves(folders: list, metric: str, model: str, dataset: str) -> Figure:
    """One curve per run.

    Raises:
        UserError: a run has no such evaluation, or was evaluated on another dataset than the first.
    """
    curves, names = [], []
    for place, (folder, label) in enumerate(zip(folders, run_labels(folders))):
        name, points = read_run(folder, metric, model, dataset)
        names.append(name)
        curves.append(
            Curve(
                label, list(points), list(points.values()), PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
            )
        )
    if len(set(names)) > 1:
        raise UserError(
            f"--runs: evaluated on different datasets ({', '.join(dict.fromkeys(names))}); choose one with --dataset."
        )
    return run_panel(curves, metric, f"{names[0]}, {model}", [value for curve in curves for value in curve.values])


def run_panel(curves: list, metric: str, title: str, values: list) -> Figure:
    """One panel with the names of the curves at its right; the vertical axis covers `values`."""
    margin = 0.6 + 0.08 * max(len(curve.label) + 5 for curve in curves)  # inches for the names at the right
    width, height = 6 + margin, max(4, 0.2 * len(curves) + 1.5)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.8 / width, 0.6 / height, 1 - (0.8 + margin) / width, 1 - 1.1 / height))
    _bare(axes)
    border = 0.06 * (max(values) - min(values)) or 1
    axes.set(ylim=(min(values) - border, max(values) + border))
    axes.set_xlabel("student iteration", fontsize=11)
    axes.set_ylabel(metric, fontsize=11)
    axes.set_title(title, fontsize=13, loc="left", fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    draw_curves(axes, curves, 1 if border > 0.1 else 2)
    return figure


def save(figure: Figure, path: str) -> None:
    """Write a PNG with few colors: sharp, and small enough for a repository."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120, facecolor="white")
    text = PngInfo()
    text.add_text("Software", SOFTWARE)
    image = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(packed, "PNG", optimize=True, pnginfo=text)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place with --out.") from None
    with atomic_write(path) as file:
        file.write(packed.getvalue())
    print(f"{path}: {os.path.getsize(path) / 1e3:.0f} kB")


def check(paths: list, sources: list) -> None:
    """Raises UserError where a file to write is one that is read, or exists and was not made by this tool."""
    for path in paths:
        OutputFolder(os.path.dirname(path) or ".", "--out", ours=is_ours(path)).check([path], sources)


def is_ours(path: str) -> bool:
    """Whether a PNG says that this tool wrote it."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError):
        return False


def run(args):
    if args.runs:
        path = args.out or "curves.png"
        if not path.lower().endswith(".png"):
            raise UserError(f"--out {path}: must end in .png.")
        figures = {path: run_curves(args.runs, args.metric, args.model, args.dataset)}
        sources = [os.path.join(folder, name) for folder in args.runs for name in ("metrics.json", "results.json")]
    else:
        sources = [DOCS / "results" / "learning_curves.json", DOCS / "results" / "ablation.json"]
        curves, rows = (json.loads(path.read_text(encoding="utf-8")) for path in sources)
        folder = args.out or str(DOCS / "figures")
        figures = {
            os.path.join(folder, "learning_curves.png"): learning_curves(curves),
            os.path.join(folder, "ablation.png"): ablation(rows),
        }
    check(list(figures), sources)
    for path, figure in figures.items():
        save(figure, path)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", metavar="FOLDER", help="folders of training runs (OUTPUT_DIR)")
    parser.add_argument("--out", help="with --runs: the PNG to write (curves.png); else a folder (docs/figures)")
    parser.add_argument("--model", choices=("teacher", "student"), default="teacher", help="%(default)s")
    parser.add_argument("--metric", default="mIoU", help="such as mIoU, ECE or IoU-car (%(default)s)")
    parser.add_argument("--dataset", default="", help="such as camvid_val (the first one in the log)")
    parser.add_argument("--data-set", dest="dataset", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # former name
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
