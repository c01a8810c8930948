"""The tool counts the right pairs, counts a pixel lost to a distractor as an error, and changes no weight."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from hiervl.data.shapes import generate
from hiervl.errors import UserError
from hiervl.modeling.inference import Probabilities
from tests.networks import TEXT_DIM, make_network
from tests.test_train_net import TINY
from tools.analysis import measure_language as tool

NAMES = ["sky", "road"]


class FakeNetwork:
    """Predicts "sky" in the left half of an image, and "road", or "street" if it is among the names, in the right."""

    device = torch.device("cpu")

    def __init__(self):
        self.trained_names, self.query_generator = frozenset(NAMES), torch.nn.Identity()
        self.weights = {"weight": torch.ones(2)}

    def state_dict(self):
        return self.weights

    def set_classes(self, names):
        self.class_names, self.num_classes = names, len(names)

    def text(self):
        return torch.eye(8)[: len(self.class_names)]

    def predict(self, images):
        strength = {"sky": (0.8, 0.0), "road": (0.1, 0.5), "street": (0.0, 0.7)}
        relevance = torch.tensor([[0.9 if name in strength else 0.01 for name in self.class_names]])
        index = torch.tensor([[i for i, name in enumerate(self.class_names) if name in strength]])
        maps = torch.zeros(1, index.shape[1], *images.shape[2:])
        middle = images.shape[3] // 2
        for position, i in enumerate(index[0].tolist()):
            maps[0, position, :, :middle], maps[0, position, :, middle:] = strength[self.class_names[i]]
        return Probabilities(maps, index, self.num_classes, relevance)


@pytest.fixture
def samples(tmp_path):
    """Two images: sky and road, and sky alone with an ignored right half."""
    result = []
    for i, right in enumerate((1, 255)):
        label = np.zeros((6, 8), np.uint8)
        label[:, 4:] = right
        path = str(tmp_path / f"{i}.png")
        cv2.imwrite(path, label)
        result.append({"image": torch.zeros(3, 48, 64), "height": 6, "width": 8, "sem_seg_file_name": path})
    return result


def test_pixel_assigned_to_a_distractor_is_an_error(samples):
    measurement = tool.Measurement(FakeNetwork(), NAMES, samples, trained=["piano"], top_k=3)
    assert measurement.network.trained_names == {"sky", "road", "piano"}
    classes_only = measurement.evaluate(NAMES)
    assert classes_only.miou == 100 and classes_only.other_share == 0
    enlarged = measurement.evaluate(NAMES, ["piano", "street"])
    assert enlarged.iou == [100, 0] and enlarged.miou == 50
    assert enlarged.other_share == pytest.approx(
        100 * 24 / 72
    )  # the first image's right half, of 48 + 24 labeled pixels
    assert enlarged.selected.tolist() == [[True, True, False, True]] * 2
    assert enlarged.top_k.sum(1).tolist() == [3, 3] and enlarged.relevance[0, 2] == pytest.approx(0.01)


def test_synonyms_and_permuted_names(samples):
    measurement = tool.Measurement(FakeNetwork(), NAMES, samples)
    original = measurement.evaluate(NAMES)
    rows, word_rows = tool.renamed_classes(
        measurement, {"other": ["sky", "street"], "permuted": ["road", "sky"]}, original
    )
    assert [row["% of the original"] for row in rows] == [100, 0] and [row["changed"] for row in rows] == [1, 2]
    assert word_rows[0] == {
        "names": "other",
        "class": "road",
        "word": "street",
        "cosine": 1.0,
        "relevance where present": pytest.approx(0.9),
        "IoU": 100,
        "IoU of the original": 100,
    }


def test_chance_depends_on_class_frequencies_only():
    counts = [[30, 10, 0], [40, 20, 0], [0, 0, 0]]
    evaluation = tool.EvaluationResult({"confusion_matrix": counts}, None, None, None, None, 0)
    sky = 0.4 * 0.7 / (0.4 + 0.7 - 0.4 * 0.7)
    road = 0.6 * 0.3 / (0.6 + 0.3 - 0.6 * 0.3)
    assert evaluation.chance() == pytest.approx(100 * (sky + road) / 2)


def test_suppression_counts_image_word_pairs():
    present = np.array([[True, False], [True, True]])
    groups, present = tool.word_groups(present, num_seen=1, num_unseen=1)
    relevance = np.array([[0.9, 0.2, 0.01, 0.3], [0.8, 0.4, 0.06, 0.5]])
    evaluation = tool.EvaluationResult(
        {}, None, relevance, selected=relevance > 0.05, top_k=relevance > 0.25, seconds=0
    )
    rows = {row["words"]: row for row in tool.suppression(evaluation, groups, present, threshold=0.05)}
    assert [row["pairs"] for row in rows.values()] == [3, 1, 2, 2]
    seen, unseen = rows["distractors seen in training"], rows["distractors not seen"]
    assert rows["classes, present"]["kept"] == 100 and rows["classes, present"]["outranked by present"] is None
    assert seen["below MIN_RELEVANCE"] == 50 and seen["kept"] == 50 and seen["not among the top k"] == 100
    assert unseen["mean relevance"] == pytest.approx(0.4) and unseen["not among the top k"] == 0
    # Unseen: 0.9 > 0.3, 0.8 > 0.5, but not 0.4 > 0.5.
    assert unseen["outranked by present"] == pytest.approx(200 / 3) and seen["outranked by present"] == 100


def test_network_keeps_its_weights(samples):
    network = make_network(classes=2, kind="hiervl", embeddings=torch.randn(5, TEXT_DIM)).eval()
    words = [f"class {k}" for k in range(5)]
    measurement = tool.Measurement(network, words[:2], samples, trained=words[2:3])
    original = measurement.evaluate(words[:2])
    rows, evaluation = tool.vocabulary_sizes(measurement, words[2:], [1, 9], original)
    assert [row["words"] for row in rows] == [2, 3, 5]
    assert evaluation.selected.shape == (2, 5) and evaluation.text.shape == (5, TEXT_DIM)
    assert len(evaluation.result["classes"]) == 3
    network.decoder.query_feat.weight.data[0] += 1
    with pytest.raises(AssertionError, match="changed weights: .*query_feat"):
        measurement.evaluate(words[:2])


@pytest.mark.parametrize(
    "text, message",
    [
        ("first: {sky: heaven, rode: street}", "'rode' in list 'first' is not a class"),
        ("sky: heaven", "needs lists of the form"),
        ("{", "cannot read --synonyms"),
    ],
)
def test_invalid_synonyms_are_refused(tmp_path, text, message):
    path = tmp_path / "words.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        tool.read_synonyms(str(path), NAMES)


def test_camvid_synonyms_are_included():
    from detectron2.data import MetadataCatalog

    lists = tool.read_synonyms("datasets/synonyms_camvid.yaml", MetadataCatalog.get("camvid_val").stuff_classes)
    assert len(lists) == 3 and all(len(set(words)) == 11 for words in lists.values())


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate(str(tmp_path / "shapes"), num_train=5, num_val=2, size=64, seed=0, labeled=(4,))
    (tmp_path / "words.yaml").write_text("swapped: {red disc: red ring, red ring: red disc}")
    shared = {"output": str(tmp_path / "out"), "synonyms": str(tmp_path / "words.yaml")}
    call = [
        "--config-file",
        "configs/shapes_supervised.yaml",
        "--unseen",
        "",
        "--synonyms",
        shared["synonyms"],
        "--output",
        shared["output"],
        "--opts",
        *TINY,
    ]
    assert tool.main(call) == 2 and "MODEL.WEIGHTS is empty" in capsys.readouterr().err
    weights = str(tmp_path / "network.pth")
    args = tool.parse_args(call)
    torch.save({"model": build_model(tool.trained.read_config(args.config_file, args.opts)).state_dict()}, weights)
    assert tool.main([*call, "MODEL.WEIGHTS", weights, "TEST.MODE", "sliding"]) == 2
    assert "set TEST.MODE to whole" in capsys.readouterr().err
    assert tool.main([*call, "MODEL.WEIGHTS", weights]) == 0
    assert "bit-equal before and after K = 25, " in capsys.readouterr().out
    with open(tmp_path / "out" / "language.json") as file:
        result = json.load(file)
    names = [row["names"] for row in result["tables"]["Other words for the classes"]]
    assert result["images"] == 2 and names == ["swapped", "permuted"]
