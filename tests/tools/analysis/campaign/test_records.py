"""How far a training is, from files that it may be writing at the moment."""

import json
from pathlib import Path

import pytest

from tools.analysis.campaign.definition import read_campaign
from tools.analysis.campaign.records import drop_partial_line, is_finished, last_error, last_iteration


@pytest.fixture
def training(write):
    training = read_campaign(write()).trainings[0]
    Path(training.folder).mkdir(parents=True)
    return training


def test_a_training_is_finished_when_its_last_iteration_is_evaluated(training):
    assert not is_finished(training)
    for iteration, finished in ((3, False), (6, True)):
        (Path(training.folder) / "results.json").write_text(json.dumps({"last": {"iteration": iteration}}))
        assert is_finished(training) == finished


def test_the_last_iteration(training):
    metrics = Path(training.folder) / "metrics.json"
    assert last_iteration(training) == 0
    metrics.write_text('{"iteration": 0}\n{"iteration": 3}\n{"iterat')
    assert last_iteration(training) == 4
    start = metrics.stat().st_size
    assert last_iteration(training, start) == 0
    metrics.write_text(metrics.read_text() + '\n{"iteration": 1}\n')
    assert last_iteration(training, start) == 2
    metrics.write_text('{"iteration": 6}\n')  # the evaluation at the end is logged one further
    assert last_iteration(training) == 6


def test_a_long_log_is_not_read_from_the_beginning(training):
    lines = [json.dumps({"iteration": i % 5, "x": "y" * 1000}) for i in range(1000)]
    (Path(training.folder) / "metrics.json").write_text("\n".join(lines))
    assert last_iteration(training) == 5


@pytest.mark.parametrize("content, left", [("a\nb\nc", "a\nb\n"), ("a\n", "a\n"), ("half", ""), ("", "")])
def test_half_a_line_is_cut_off(tmp_path, content, left):
    path = tmp_path / "metrics.json"
    drop_partial_line(str(path))
    assert not path.exists()
    path.write_text(content)
    drop_partial_line(str(path))
    assert path.read_text() == left


@pytest.mark.parametrize(
    "log, line",
    [
        ("x\nTraceback (most recent call last):\n  f()\nValueError: no\n", "ValueError: no"),
        ("error: none.pth: no such file\n\n", "error: none.pth: no such file"),
        ("torch.OutOfMemoryError: CUDA out of memory.\nTried\n\n", "torch.OutOfMemoryError: CUDA out of memory."),
        ("one\ntwo\n", "two"),
        ("", "nothing was printed"),
    ],
)
def test_the_line_that_says_what_went_wrong(training, log, line):
    before = "RuntimeError: of an earlier attempt\n"
    Path(training.log).write_text(before + log)
    assert last_error(training, len(before)) == line
