"""Every figure of docs/how-it-works.md can be drawn for any network with the language modules."""

import cv2
import numpy as np
import torch
from detectron2.modeling import build_model
from matplotlib import pyplot as plt

from hiervl.data.shapes import generate
from tests.test_train_net import TINY
from tools.analysis import draw_method as tool


def test_all_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate(str(tmp_path / "shapes"), num_train=5, num_val=2, size=72, seed=0, labeled=(4,))  # 72: with padding
    weights, out = str(tmp_path / "network.pth"), tmp_path / "out"
    call = ["--config-file", "configs/shapes_supervised.yaml", "--output", str(out), "--opts", *TINY]
    args = tool.parse_args(call)
    torch.save({"model": build_model(tool.trained.read_config(args.config_file, args.opts)).state_dict()}, weights)
    call += ["MODEL.WEIGHTS", weights]
    assert tool.main(call) == 0
    for name in ("relevance", "alignment", "scores", "queries", "prediction"):
        picture = cv2.imread(str(out / f"method_{name}.jpg"))
        assert picture.shape[1] >= 8 * 86 and picture.std() > 10
    assert tool.main([*call, "MODEL.CMSAM.ENABLED", "False"]) == 2
    assert "MODEL.CMSAM.ENABLED" in capsys.readouterr().err
    assert tool.main(["--image", "2", *call]) == 2
    assert "shapes_val has images 0 to 1" in capsys.readouterr().err


def test_zoom_shows_the_largest_part_and_stays_inside_the_image():
    region = np.zeros((50, 100), bool)
    region[0, 0] = True
    region[40:, 90:] = True
    figure, axis = plt.subplots()
    tool.zoom(axis, region, factor=2.5)
    assert axis.get_xlim() == (59.5, 99.5) and axis.get_ylim() == (49.5, 29.5)
    plt.close(figure)


def test_best_query_of_each_class_comes_first():
    confidence, classes = torch.tensor([0.5, 0.9, 0.8, 0.99]), torch.tensor([1, 0, 0, 2])
    masks = torch.ones(4, 2, 2)
    masks[3] = 0.1  # an empty mask
    assert tool.most_confident_queries(confidence, classes, masks) == [1, 0, 2]
