"""Runs are read as the trainer writes them; labels do not overlap; no file of another hand is overwritten."""

import json

import pytest
from PIL import Image

from hiervl.errors import UserError
from tools.analysis import plot_results as tool


def make_run(folder, evaluations, last=None, dataset="camvid_val"):
    """A run's folder: `evaluations` as (iteration in the log, teacher's mIoU), with training lines between them."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"iteration": 19, "total_loss": 3.0})]
    for iteration, value in evaluations:
        lines.append(
            json.dumps(
                {
                    f"{dataset}/teacher/mIoU": value,
                    f"{dataset}/teacher/mIoU_all": 1.0,
                    f"{dataset}/student/mIoU": value - 1,
                    "iteration": iteration,
                }
            )
        )
    (folder / "metrics.json").write_text("\n".join(lines) + "\n")
    if last:
        entry = {"iteration": last[0], dataset: {"teacher": {"mIoU": last[1]}}}
        (folder / "results.json").write_text(json.dumps({"last": entry, "best": entry}))
    return str(folder)


def test_a_run_is_read(tmp_path):
    run = make_run(tmp_path / "a", [(499, 40.0), (999, 50.0)])
    assert tool.read_run(run) == ("camvid_val", {500: 40.0, 1000: 50.0})
    assert tool.read_run(run, model="student")[1] == {500: 39.0, 1000: 49.0}


def test_the_last_evaluation_is_that_of_results_json(tmp_path):
    run = make_run(tmp_path / "a", [(499, 40.0), (1000, 51.0)], last=(1000, 51.0))  # logged one iteration too late
    assert tool.read_run(run)[1] == {500: 40.0, 1000: 51.0}


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    run = make_run(tmp_path / "a", [(499, 40.0), (999, 50.0), (499, 41.0)])
    assert tool.read_run(run)[1] == {500: 41.0, 1000: 50.0}


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    run = make_run(tmp_path / "a", [(499, 40.0)])
    with open(tmp_path / "a/metrics.json", "a") as file:
        file.write('{"camvid_val/teacher/mI')
    assert tool.read_run(run)[1] == {500: 40.0}


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot be read"),
        ('{"iteration": 1}\n', "DATA_SET/teacher/mIoU"),
        ("not JSON\n{}\n", "line 1: not JSON"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, content, words):
    if content:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=words):
        tool.read_run(str(tmp_path))


@pytest.mark.parametrize(
    "positions, expected",
    [
        ([1.0, 5.0], [1.0, 5.0]),
        ([1.0, 1.0], [0.5, 1.5]),
        ([5.0, 1.0, 1.5], [5.0, 0.75, 1.75]),
        ([0.0, 0.9, 2.0], [-0.05, 0.95, 2.0]),
        ([2.0, 1.0, 1.0], [2.333, 0.333, 1.333]),
    ],
)
def test_labels_are_spread(positions, expected):
    assert tool.spread(positions, 1.0) == pytest.approx(expected, abs=0.01)


def test_runs_are_named_by_what_tells_them_apart():
    assert tool.run_labels(["output/a", "output/b/"]) == ["a", "b"]
    assert tool.run_labels(["x/run", "y/run"]) == ["x/run", "y/run"]


def test_own_runs(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", [(499, 40.0), (999, 50.0)]), make_run(tmp_path / "b", [(499, 42.0)])]
    out = tmp_path / "new/curves.png"
    for _ in range(2):  # its own picture may be overwritten
        assert tool.main(["--runs", *runs, "--out", str(out)]) == 0
    assert Image.open(out).format == "PNG"
    out.write_bytes(b"someone's own")
    assert tool.main(["--runs", *runs, "--out", str(out)]) == 2
    assert "was not made by this tool" in capsys.readouterr().err and out.read_bytes() == b"someone's own"
    runs.append(make_run(tmp_path / "c", [(499, 42.0)], dataset="shapes_val"))
    assert tool.main(["--runs", *runs, "--out", str(tmp_path / "d.png")]) == 2
    assert "different datasets (camvid_val, shapes_val)" in capsys.readouterr().err


def test_figures_of_the_documentation(tmp_path):
    assert tool.main(["--out", str(tmp_path)]) == 0
    for name in ("learning_curves.png", "ablation.png"):
        assert (tmp_path / name).stat().st_size < 100_000


def test_the_table_of_the_documentation_has_the_plotted_numbers():
    rows = json.loads((tool.DOCS / "results/ablation.json").read_text())["rows"]
    text = (tool.DOCS / "RESULTS.md").read_text()
    section = text.split("## Ablations")[1].split("\n## ")[0]
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines() if "|" in line]
    assert [[line[0], line[1].rstrip(" †"), *line[2:5]] for line in table[2:]] == [
        [
            row["set"],
            row["change"],
            " ".join(f"{value:.1f}" for value in row["baseline"]),
            " ".join(f"{value:.1f}" for value in row["changed"]),
            f"{tool.mean_difference(row):+.1f}".replace("-", "−"),
        ]
        for row in sorted(rows, key=tool.mean_difference)
    ]
