"""The tables show the content of the result files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hiervl.errors import UserError
from hiervl.evaluation import SegmentationEvaluator, load_result, per_class_table, reliability_table, summary_table


@pytest.fixture
def result(tmp_path):
    """Result of one image: class a is fully correct, b half correct, c absent."""
    path = str(tmp_path / "m.png")
    Image.fromarray(np.array([[0, 0, 1, 1]], np.uint8)).save(path)
    evaluator = SegmentationEvaluator(["a", "b", "c"])
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.7], [0.1, 0.2, 0.9, 0.3], [0, 0, 0, 0]]).view(3, 1, 4)
    evaluator.process([{"sem_seg_file_name": path}], [{"sem_seg": scores}])
    evaluator.evaluate()
    return evaluator.result


def test_per_class_table(result):
    rows = [line.split() for line in per_class_table(result).splitlines()]
    assert ["a", "66.67", "66.67", "100.00", "50.00"] in rows
    assert ["b", "50.00", "100.00", "50.00", "50.00"] in rows
    assert ["c", "-", "-", "-", "0.00"] in rows


def test_rows_are_sorted_by_gain_and_matched_by_name(result):
    previous = json.loads(json.dumps(result))
    previous["classes"] = ["b", "a", "c"]
    previous["per_class"]["iou"] = [10.0, 60.0, None]
    lines = per_class_table(result, previous).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["b", "a", "c"]
    assert lines[2].split()[-2:] == ["10.00", "40.00"]
    previous["classes"] = ["a", "b", "d"]
    with pytest.raises(UserError, match="other classes"):
        per_class_table(result, previous)


def test_reliability_table(result):
    table = reliability_table(result)
    assert f"{result['metrics']['ECE']:.2f}" in table
    assert ["0.90", "50.00", "100.00"] in [line.split() for line in table.splitlines()]
    assert "not measured" in reliability_table({**result, "reliability": None})


def test_summary_table_shows_last_and_best():
    entries = [
        {"iteration": i, "val": {"student": {"mIoU": s}, "teacher": {"mIoU": t}}}
        for i, s, t in [(20, 41.0, 42.0), (30, 39.0, 40.0)]
    ]
    rows = [line.split() for line in summary_table({"last": entries[1], "best": entries[0]}).splitlines()]
    assert ["val", "student", "39.00", "30", "41.00", "20"] in rows
    assert ["val", "teacher", "40.00", "30", "42.00", "20"] in rows


@pytest.mark.parametrize("content, words", [(None, "no such"), ("{", "JSON"), ("[]", "not a result file")])
def test_files_that_are_not_results_are_refused(tmp_path, content, words):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        load_result(str(path))
