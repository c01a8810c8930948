"""The report files of an evaluation, and the comparison with an earlier one."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from hiervl.config import load_config
from hiervl.data.shapes import generate
from hiervl.errors import UserError
from hiervl.evaluation import SegmentationEvaluator, load_result, write_report_files
from hiervl.evaluation.runner import Evaluation


@pytest.fixture
def result(tmp_path):
    """Result of one image with Boundary IoU: class a is fully correct, b half correct, c absent."""
    path = str(tmp_path / "m.png")
    Image.fromarray(np.array([[0, 0, 1, 1]], np.uint8)).save(path)
    evaluator = SegmentationEvaluator(["a", "b", "c"], boundary=True)
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.7], [0.1, 0.2, 0.9, 0.3], [0, 0, 0, 0]]).view(3, 1, 4)
    evaluator.process([{"sem_seg_file_name": path}], [{"sem_seg": scores}])
    evaluator.evaluate()
    return evaluator.result


def test_report_csv_and_picture(result, tmp_path):
    previous = json.loads(json.dumps(result))
    previous["per_class"]["iou"] = [60.0, 10.0, None]
    write_report_files(result, str(tmp_path), previous)
    rows = list(csv.reader(io.StringIO((tmp_path / "confusion.csv").read_text())))
    assert rows[0][1:] == ["a", "b", "c"] and rows[2] == ["b", "1", "1", "0"]
    with Image.open(tmp_path / "confusion.png") as picture:
        pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 10  # drawn, not blank
    lines = [line.split() for line in (tmp_path / "report.txt").read_text().splitlines()]
    classes = [line for line in lines if line and line[0] in ("a", "b")][:2]
    assert [line[0] for line in classes] == ["b", "a"] and classes[0][-1] == "40.00"  # sorted by gain
    assert any(line[:2] == ["boundary_mIoU", "58.33"] for line in lines)
    assert ["expected", "calibration", "error:"] in [line[:3] for line in lines]


def test_many_classes_are_drawn_without_names(tmp_path, result):
    k = 150
    wide = {**result, "classes": [f"class {i}" for i in range(k)], "confusion_matrix": np.eye(k, dtype=int).tolist()}
    wide["per_class"] = {key: [1.0] * k for key in result["per_class"]}
    write_report_files(wide, str(tmp_path))
    with Image.open(tmp_path / "confusion.png") as picture:
        assert max(picture.size) < 2000


class HalfImagePredictor(torch.nn.Module):
    """Predicts class 0 on the left and class 1 on the right, with confidence `p`."""

    def __init__(self, p):
        super().__init__()
        self.p, self.protocol = p, "whole image"

    def forward(self, inputs):
        height, width = inputs[0]["height"], inputs[0]["width"]
        scores = torch.zeros(25, height, width)
        scores[0, :, : width // 2] = scores[1, :, width // 2 :] = self.p
        return [{"sem_seg": scores}]


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    """Returns a function that makes an Evaluation of two models on `shapes`, with additional KEY, VALUE pairs."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate(str(tmp_path / "shapes"), num_train=4, num_val=3, size=32, labeled=(2,))

    def make(output, *overrides):
        cfg = load_config(
            "",
            [
                "DATASETS.TEST",
                "('shapes_val',)",
                "DATASETS.SPLIT_ROOT",
                "",
                "OUTPUT_DIR",
                str(tmp_path / output),
                "DATALOADER.NUM_WORKERS",
                0,
                *overrides,
            ],
        )
        (tmp_path / output).mkdir(exist_ok=True)
        return Evaluation(cfg, {"student": HalfImagePredictor(0.5), "teacher": HalfImagePredictor(0.9)})

    return make


def test_run_is_compared_with_another_run_or_result_file(evaluation, tmp_path):
    metrics = evaluation("first", "TEST.BOUNDARY_IOU", True).run(1, lambda: None)
    assert "boundary_mIoU" in metrics["shapes_val/teacher"]
    evaluation("second", "TEST.COMPARE", str(tmp_path / "first")).run(1, lambda: None)
    folder = tmp_path / "second/inference/shapes_val/student"
    assert {p.name for p in folder.iterdir()} == {"segmentation.json", "report.txt", "confusion.csv", "confusion.png"}
    report = (folder / "report.txt").read_text()
    assert "gain" in report and "images, whole image\n" in report
    assert "boundary_mIoU" not in load_result(str(folder / "segmentation.json"))["metrics"]
    file = tmp_path / "first/inference/shapes_val/teacher/segmentation.json"
    evaluation("third", "TEST.COMPARE", str(file)).run(1, lambda: None)
    with pytest.raises(UserError, match="nowhere.*no such result file"):
        evaluation("fourth", "TEST.COMPARE", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="shapes_val.*no such result file"):
        evaluation("fifth", "TEST.COMPARE", str(tmp_path / "second" / "inference"))
