"""Writes the results of a campaign: tables in Markdown and JSON, and the learning curves."""

import json
import os

import numpy as np
from matplotlib.figure import Figure

from hiervl.checkpoint import atomic_write
from tools.analysis.plot_results import MARKERS, PALETTE, Curve, read_run, run_panel, save

from .collecting import ENOUGH, METRIC, MODELS, collect
from .definition import Campaign
from .records import is_finished

TABLES, FACTS, CURVES = "comparison.md", "comparison.json", "curves.png"
REMARK = "fewer than three seeds: not a result"
COLUMNS = [(model, entry) for entry in ("last", "best") for model in MODELS]


def files(campaign: Campaign) -> list[str]:
    """Paths of the files that `write` writes."""
    return [os.path.join(campaign.output, name) for name in (TABLES, FACTS, CURVES)]


def write(campaign: Campaign) -> None:
    """Collect, write the tables and the figure, and print the tables."""
    facts = collect(campaign)
    tables, path, picture = tables_of(facts), *files(campaign)[1:]
    with atomic_write(files(campaign)[0], "w") as file:
        file.write(tables)
    with atomic_write(path, "w") as file:
        json.dump(facts, file, indent=1)
    print(f"\n{tables}")
    print(f"{files(campaign)[0]} (these tables), {path}")
    if figure := learning_curves(campaign):
        save(figure, picture)


def tables_of(facts: dict) -> str:
    """The content of comparison.md."""
    parts = [f"# {facts['campaign']}", _summary(facts)]
    if facts["differences"]:
        parts += [_differences(facts), *(_per_class(facts, run) for run in facts["differences"])]
    return "\n\n".join(parts) + "\n"


def _summary(facts):
    rows = []
    for name, run in facts["runs"].items():
        cells = [_spread(run["summary"][model][entry]) for model, entry in COLUMNS]
        count = len(run["seeds"])
        rows.append([name, str(count), *cells, REMARK if count < ENOUGH else ""])
    notes = [
        f"{METRIC} in percent on {facts['dataset']}: mean over seeds (min to max). The best evaluation was chosen on "
        "the images that it is measured on, so compare runs by the last one."
    ]
    if facts["unfinished"]:
        waiting = ", ".join(f"{t['run']} seed {t['seed']} ({t['iteration']}/{t['of']})" for t in facts["unfinished"])
        notes.append(f"Not finished, so not counted: {waiting}.")
    table = _table(["run", "seeds", *(f"{model}, {entry}" for model, entry in COLUMNS), "remark"], rows)
    return "\n\n".join([*notes, table])


def _differences(facts):
    rows, notes = [], []
    for name, difference in facts["differences"].items():
        for model in MODELS:
            found = difference[model]["last"]
            each = found["seeds"] if found else {}
            count = len(each)
            rows.append(
                [
                    f"{name}, {model}",
                    *(_signed(each.get(seed)) for seed in facts["seeds"]),
                    _signed(found and found["mean"]),
                    f"{_signed(found['min'])} to {_signed(found['max'])}" if found else "–",
                    f"{found['positive']} of {count}" if found else "–",
                    REMARK if count < ENOUGH else "",
                ]
            )
        if difference["unpaired"]:
            seeds = ", ".join(map(str, difference["unpaired"]))
            notes.append(f"{name}: only one side has seed {seeds}, which is left out here.")
    headers = ["run, model", *(f"seed {seed}" for seed in facts["seeds"]), "mean", "min to max", "positive", "remark"]
    intro = f"Points of {METRIC}, last evaluation, paired by seed."
    return "\n\n".join([f"## Difference from {facts['baseline']}", intro, _table(headers, rows), *notes])


def _per_class(facts, name):
    difference = facts["differences"][name]
    rows = [
        [
            row["class"],
            f"{row['baseline']:.2f}",
            f"{row['run']:.2f}",
            _signed(row["difference"]),
            f"{_signed(row['min'])} to {_signed(row['max'])}",
            str(row["count"]),
        ]
        for row in difference["per_class"]
    ]
    found = difference[MODELS[0]]["last"]
    count = found["count"] if found else 0
    intro = f"{MODELS[0].capitalize()}, last IoU: means over the {count} paired seeds, sorted by the difference."
    if count < ENOUGH:
        intro += f" {REMARK.capitalize()}."
    headers = ["class", facts["baseline"], name, "difference", "min to max", "seeds"]
    return "\n\n".join(
        [f"## {name} and {facts['baseline']} by class", intro, *([_table(headers, rows)] if rows else [])]
    )


def _spread(found):
    if not found:
        return "–"
    spread = f" ({found['min']:.2f} to {found['max']:.2f})" if found["count"] > 1 else ""
    return f"{found['mean']:.2f}{spread}"


def _signed(value):
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def _table(headers, rows):
    """A Markdown table whose columns are aligned in a terminal, too."""
    widths = [max(map(len, column)) for column in zip(headers, *rows)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in lines)


def learning_curves(campaign: Campaign) -> Figure | None:
    """The teacher's mean over the finished seeds of each run, and a band from min to max; None if none is finished."""
    curves, bands = [], []
    for place, run in enumerate(campaign.runs):
        runs = [
            read_run(training.folder, METRIC, MODELS[0], campaign.dataset)[1]
            for training in campaign.of_run(run)
            if is_finished(training)
        ]
        if not runs:
            continue
        iterations = sorted(set.intersection(*map(set, runs)))
        values = np.array([[points[iteration] for iteration in iterations] for points in runs])  # (seeds, evaluations)
        count = f" ({len(runs)} of {len(campaign.seeds)} seeds)" if len(runs) < len(campaign.seeds) else ""
        color, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
        curves.append(Curve(run + count, iterations, values.mean(0).tolist(), color, marker))
        bands.append((values.min(0), values.max(0)))
    if not curves:
        return None
    title = f"{campaign.dataset}, {MODELS[0]}: mean and range of {len(campaign.seeds)} seeds"
    figure = run_panel(curves, METRIC, title, values=np.concatenate([edge for band in bands for edge in band]))
    axes = figure.axes[0]
    axes.set_xlim(0, max(curve.iterations[-1] for curve in curves) * 1.02)
    for curve, (low, high) in zip(curves, bands):
        axes.fill_between(curve.iterations, low, high, color=curve.color, alpha=0.15, linewidth=0)
        axes.vlines(curve.iterations, low, high, color=curve.color, linewidth=1)
    return figure
