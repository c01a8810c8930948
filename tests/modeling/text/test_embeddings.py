"""Embeddings looked up in files."""

import numpy as np
import pytest
import torch

from hiervl.modeling.classifier import TextClassifier
from hiervl.config import load_config
from hiervl.errors import UserError
from hiervl.modeling.text import ClassText, EmbeddingTable
from tests.conftest import shared_file


def write(path, names, embeddings, **extra):
    np.savez(path, names=np.array(names), embeddings=np.asarray(embeddings, np.float16), **extra)
    return str(path)


def embed(path, names, **options):
    return EmbeddingTable(path, names, **options).embed(names, names)


def test_rows_follow_the_class_list(tmp_path):
    path = write(tmp_path / "e.npz", ["car", "road ", "sky"], np.eye(3))
    assert torch.equal(embed(path, ["sky", "road"]), torch.eye(3)[[2, 1]])


def test_names_go_before_texts_and_the_own_file_before_extra_ones(tmp_path):
    main = write(tmp_path / "m.npz", ["car", "pavement"], np.eye(4)[:2], texts=np.array(["sky", "sidewalk"]))
    extra = write(tmp_path / "x.npz", ["car", "sky", "rider"], np.eye(4)[[3, 2, 3]])
    names = ["car", "sidewalk", "pavement", "rider"]
    assert torch.equal(embed(main, names, extra=(extra,)), torch.eye(4)[[0, 1, 1, 3]])
    assert torch.equal(embed(main, ["sky"], extra=(extra,)), torch.eye(4)[[0]])


def test_scores_are_cosines_times_a_bounded_scale():
    classifier = TextClassifier(4, 8)
    with torch.no_grad():
        classifier.log_scale.fill_(50)
    logits = classifier(torch.randn(2, 3, 4), torch.nn.functional.normalize(torch.randn(5, 8), dim=1))
    assert logits.shape == (2, 3, 6) and logits.abs().max() <= 100.001


@pytest.mark.parametrize(
    "names, rows, message",
    [
        (["car"], np.eye(1), "no text embedding for 'sky'"),
        (["car", "sky"], np.zeros((2, 4)), "embedding of 'car' is zero or not finite"),
        (["car", "sky"], [[1, 0], [np.nan, 1]], "embedding of 'sky' is zero or not finite"),
        (["car", "sky"], np.eye(3), "shape .3, 3., 2 names need"),
        (["car", "sky"], np.ones(2), "shape .2,., 2 names need"),
    ],
)
def test_files_that_do_not_fit(tmp_path, names, rows, message):
    with pytest.raises(UserError, match=message):
        embed(write(tmp_path / "e.npz", names, rows), ["car", "sky"])


def test_a_class_index_that_does_not_fit(tmp_path):
    path = write(tmp_path / "e.npz", ["a", "b"], np.eye(2), class_index=np.array([0, 1]))
    with pytest.raises(UserError, match="class_index names 2 classes, the data set has 3"):
        EmbeddingTable(path, ["a", "b", "c"])


def test_files_of_different_spaces(tmp_path):
    main = write(tmp_path / "m.npz", ["a"], np.eye(4)[:1], model=np.array("one"))
    wide = write(tmp_path / "wide.npz", ["b"], np.eye(5)[:1])
    other = write(tmp_path / "other.npz", ["b"], np.eye(4)[:1], model=np.array("two"))
    with pytest.raises(UserError, match="wide.npz: its embeddings have 5 numbers, those of .*m.npz 4"):
        EmbeddingTable(main, ["a"], extra=(wide,))
    with pytest.raises(UserError, match="other.npz: made by two, .*m.npz by one"):
        EmbeddingTable(main, ["a"], extra=(other,))


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="no such embeddings file"):
        EmbeddingTable(str(tmp_path / "none.npz"), ["car"])
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="not an embeddings file"):
        EmbeddingTable(str(tmp_path / "text.npz"), ["car"])


def camvid_text(**changes):
    folder = shared_file("clip_text/camvid11.npz").removesuffix("camvid11.npz")
    extra = tuple(
        f"{folder}{name}.npz"
        for name in ("ade150", "coco81", "voc21", "cityscapes19", "cityscapes19_definitions", "voc21_definitions")
    )
    options = {"EMBEDDINGS": f"{folder}camvid11.npz", "EXTRA_EMBEDDINGS": extra, **changes}
    cfg = load_config("", [x for name, value in options.items() for x in (f"MODEL.TEXT.{name}", value)])
    return ClassText(
        cfg,
        [
            "sky",
            "building",
            "pole",
            "road",
            "pavement",
            "tree",
            "sign symbol",
            "fence",
            "car",
            "pedestrian",
            "bicyclist",
        ],
    )


def test_real_clip_embeddings_after_centering():
    text = camvid_text()
    off = ~torch.eye(11, dtype=torch.bool)
    assert (text.raw @ text.raw.t())[off].mean() > 0.7
    assert (text() @ text().t())[off].abs().mean() < 0.3


def test_distractors_of_camvid():
    lists = {}
    for kind in ("train", "unseen"):
        text = camvid_text(DISTRACTORS=f"datasets/distractors_camvid_{kind}.txt")
        lists[kind], vectors = text.distractors()
        assert vectors.shape == (len(lists[kind]), 512)
        assert lists[kind] == sorted(lists[kind])
        written = [line.strip() for line in open(f"datasets/distractors_camvid_{kind}.txt", encoding="utf-8")]
        assert written == lists[kind]  # none of them is a class, none is there twice
    assert not set(lists["train"]) & set(lists["unseen"])
    assert len(lists["train"]) > 90 and len(lists["unseen"]) > 35


def test_other_words_for_camvids_classes():
    text = camvid_text()
    text.set_classes(
        [
            "sky",
            "house",
            "sign pole",
            "street",
            "sidewalk",
            "vegetation",
            "parking sign",
            "hole in fence",
            "SUV",
            "people",
            "cyclist",
        ]
    )
    assert text().shape == (11, 512)
    assert ((text.anchors() @ camvid_text().anchors().t()).argmax(1) == torch.arange(11)).sum() >= 8
