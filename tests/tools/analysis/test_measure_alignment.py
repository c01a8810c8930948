"""Map quality checked by hand, the parts that are switched off, and the command line."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from hiervl.data.shapes import generate
from hiervl.modeling.inference import Probabilities
from tests.test_train_net import TINY
from tools.analysis import measure_alignment as tool


def test_quality_of_perfect_and_shifted_maps():
    label = np.zeros((40, 40), np.uint8)
    label[:, 20:] = 1
    maps = torch.stack((torch.from_numpy(label == 0), torch.from_numpy(label == 1))).float()
    perfect, shifted = tool.Quality(2, 255), tool.Quality(2, 255)
    perfect.update(label, maps, "label.png")
    assert perfect.row("x") == {"x, mIoU": 100, "x, boundary mIoU": 100}
    shifted.update(label, maps.roll(1, 2), "label.png")  # one column to the right; the last column wraps around
    row = shifted.row("x")
    assert row["x, boundary mIoU"] < row["x, mIoU"] < 100


class Stub:
    """A network whose probabilities are correct, and whose pixel-text similarity is correct if upsampling is guided."""

    num_classes, device = 2, torch.device("cpu")

    def __init__(self, label, feature_exchange):
        self.truth = torch.nn.functional.one_hot(torch.from_numpy(label).long(), 2).permute(2, 0, 1)[None].float()
        self.alignment, self.calls = SimpleNamespace(guided_upsampling=True, feature_exchange=feature_exchange), []

    def predict(self, image):
        self.calls.append((self.alignment.guided_upsampling, self.alignment.feature_exchange))
        similarity = self.truth[..., ::4, ::4] if self.alignment.guided_upsampling else torch.zeros(1, 2, 8, 8)
        return Probabilities(self.truth, torch.tensor([[0, 1]]), 2, pixel_text=similarity)


@pytest.mark.parametrize("feature_exchange", [True, False])
def test_each_part_is_switched_off_and_restored(tmp_path, feature_exchange):
    label = np.zeros((32, 32), np.uint8)
    label[:16] = 1
    cv2.imwrite(str(tmp_path / "label.png"), label)
    network = Stub(label, feature_exchange)
    sample = {
        "image": torch.zeros(3, 32, 32),
        "sem_seg_file_name": str(tmp_path / "label.png"),
        "height": 32,
        "width": 32,
    }
    rows = tool.measure(network, [sample], 255)
    assert network.calls == [(True, feature_exchange), (False, feature_exchange), (True, False)]
    assert network.alignment == SimpleNamespace(guided_upsampling=True, feature_exchange=feature_exchange)
    assert [row["probabilities, mIoU"] for row in rows] == [100, 100, 100]
    assert [row["pixel-text similarity, mIoU"] for row in rows] == [100, 25, 100]


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate(str(tmp_path / "shapes"), num_train=5, num_val=2, size=72, seed=0, labeled=(4,))  # 72: with padding
    call = ["--config-file", "configs/shapes_supervised.yaml", "--output", str(tmp_path / "out"), "--opts", *TINY]
    cfg = tool.trained.read_config("configs/shapes_supervised.yaml", TINY)
    weights = str(tmp_path / "network.pth")
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    assert tool.main([*call, "MODEL.WEIGHTS", weights]) == 0
    assert "2 images of shapes_val" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out/alignment.json").read_text())["rows"]
    assert [row["network"] for row in rows] == list(tool.ROWS)
    assert tool.main([*call, "MODEL.WEIGHTS", weights, "MODEL.CMSAM.ENABLED", "False"]) == 2
    assert "MODEL.CMSAM.ENABLED must be True" in capsys.readouterr().err
