"""Used queries, duplicates and found objects counted by hand; and the command on a dataset with instances."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from hiervl.data.shapes import generate
from tests.test_train_net import TINY
from tools.analysis import measure_queries as tool


def boxes(*corners):
    """Masks (N, 8 * 8): True from (top, left) to (bottom, right), exclusive."""
    masks = torch.zeros(len(corners), 8, 8, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(masks, corners):
        mask[top:bottom, left:right] = True
    return masks.flatten(1)


def test_used_duplicate_and_finding_queries_are_counted():
    masks = boxes((0, 0, 4, 4), (0, 0, 4, 4), (0, 0, 4, 4), (4, 4, 8, 8), (0, 0, 0, 0), (0, 4, 4, 8))
    classes = torch.tensor([0, 0, 1, 1, 0, 1])
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.9, 0.2])  # the fifth has an empty mask, the sixth is "no object"
    objects = [(0, boxes((0, 0, 4, 3))[0]), (2, boxes((4, 4, 8, 8))[0]), (1, boxes((0, 4, 2, 8))[0])]
    counts = tool.Counts(np.zeros(6, np.int64))
    tool.count(counts, classes, confidence, masks, objects, overlap=0.7)
    table = counts.table()
    assert table["used per image"] == 4 and table["% of them never used"] == pytest.approx(100 * 2 / 6)
    assert table["% of the used that are duplicates"] == 25  # the second; the third has a different class
    assert table["% of objects found, class right"] == pytest.approx(100 / 3)
    assert table["% of objects found, any class"] == pytest.approx(200 / 3)
    assert table["mean best IoU, %"] == pytest.approx(100 * (0.75 + 1 + 0) / 3)


def test_image_without_used_queries():
    counts = tool.Counts(np.zeros(2, np.int64))
    tool.count(
        counts,
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2),
        boxes((0, 0, 4, 4), (0, 0, 4, 4)),
        [(0, boxes((0, 0, 4, 4))[0])],
        overlap=0.7,
    )
    table = counts.table()
    assert table["% of them never used"] == 100
    assert table["% of objects found, any class"] == table["mean best IoU, %"] == 0
    assert table["% of the used that are duplicates"] is None


def test_objects_are_instances_or_class_regions_without_instance_map(tmp_path):
    label, instance = np.zeros((4, 6), np.uint8), np.zeros((4, 6), np.uint8)
    label[:, :4], label[0, 5] = 1, 255
    instance[:, :2], instance[:, 2:4] = 1, 2
    sample = {"sem_seg_file_name": str(tmp_path / "label.png")}
    cv2.imwrite(sample["sem_seg_file_name"], label)
    assert [(k, int(mask.sum())) for k, mask in tool.true_objects(sample, 2, 1)[1]] == [(0, 7), (1, 16)]
    assert int(tool.true_objects(sample, 2, 1)[0].sum()) == 23  # one pixel is ignored
    sample["instances_file_name"] = str(tmp_path / "instances.png")
    cv2.imwrite(sample["instances_file_name"], instance)
    assert [(k, int(mask.sum())) for k, mask in tool.true_objects(sample, 2, 1)[1]] == [(1, 8), (1, 8)]
    assert [(k, int(mask.sum())) for k, mask in tool.true_objects(sample, 2, 2)[1]] == [(1, 8)]


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate(str(tmp_path / "shapes"), num_train=5, num_val=2, size=72, seed=0, labeled=(4,))  # 72: with padding
    weights = str(tmp_path / "network.pth")
    for semantic in ("True", "False"):
        call = [
            "--config-file",
            "configs/shapes_supervised.yaml",
            "--output",
            str(tmp_path / "out"),
            "--opts",
            *TINY,
            "MODEL.DECODER.SEMANTIC",
            semantic,
            "MODEL.CRITERION.SEMANTIC_MATCHING",
            "fixed",
        ]
        args = tool.parse_args(call)
        cfg = tool.trained.read_config(args.config_file, args.opts)
        torch.save({"model": build_model(cfg).state_dict()}, weights)
        assert tool.main([*call, "MODEL.WEIGHTS", weights]) == 0
        assert "2 images of shapes_val" in capsys.readouterr().out
        assert json.loads((tmp_path / "out/queries.json").read_text())["instance queries"] > 0
    assert tool.main(call) == 2 and "MODEL.WEIGHTS is empty" in capsys.readouterr().err
