"""Text embeddings from files."""

import numpy as np
import pytest
import torch

from hiervl.modeling.classifier import TextClassifier
from hiervl.config import load_config
from hiervl.errors import UserError
from hiervl.modeling.text import ClassText, EmbeddingTable
from tests.conftest import shared_file


def write_embeddings(path, names, embeddings, **extra):
    np.savez(path, names=np.array(names), embeddings=np.asarray(embeddings, np.float16), **extra)
    return str(path)


def embed(path, names, **options):
    return EmbeddingTable(path, names, **options).embed(names, names)


def test_rows_are_in_the_order_of_the_class_list(tmp_path):
    path = write_embeddings(tmp_path / "e.npz", ["car", "road ", "sky"], np.eye(3))
    assert torch.equal(embed(path, ["sky", "road"]), torch.eye(3)[[2, 1]])


def test_names_precede_texts_and_the_main_file_precedes_extra_files(tmp_path):
    main = write_embeddings(tmp_path / "m.npz", ["car", "pavement"], np.eye(4)[:2], texts=np.array(["sky", "sidewalk"]))
    extra = write_embeddings(tmp_path / "x.npz", ["car", "sky", "rider"], np.eye(4)[[3, 2, 3]])
    names = ["car", "sidewalk", "pavement", "rider"]
    assert torch.equal(embed(main, names, extra=(extra,)), torch.eye(4)[[0, 1, 1, 3]])
    assert torch.equal(embed(main, ["sky"], extra=(extra,)), torch.eye(4)[[0]])


def test_class_logits_are_cosines_times_a_bounded_scale():
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
        (["car", "sky"], np.eye(3), "shape .3, 3., but 2 names need"),
        (["car", "sky"], np.ones(2), "shape .2,., but 2 names need"),
    ],
)
def test_invalid_embeddings_are_refused(tmp_path, names, rows, message):
    with pytest.raises(UserError, match=message):
        embed(write_embeddings(tmp_path / "e.npz", names, rows), ["car", "sky"])


def test_a_class_index_with_another_number_of_classes_is_refused(tmp_path):
    path = write_embeddings(tmp_path / "e.npz", ["a", "b"], np.eye(2), class_index=np.array([0, 1]))
    with pytest.raises(UserError, match="class_index refers to 2 classes, but the dataset has 3"):
        EmbeddingTable(path, ["a", "b", "c"])


def test_files_of_different_models_are_refused(tmp_path):
    main = write_embeddings(tmp_path / "m.npz", ["a"], np.eye(4)[:1], model=np.array("one"))
    wide = write_embeddings(tmp_path / "wide.npz", ["b"], np.eye(5)[:1])
    other = write_embeddings(tmp_path / "other.npz", ["b"], np.eye(4)[:1], model=np.array("two"))
    with pytest.raises(UserError, match="wide.npz: the embeddings have width 5, but those of .*m.npz have width 4"):
        EmbeddingTable(main, ["a"], extra=(wide,))
    with pytest.raises(UserError, match="other.npz: made by two, but .*m.npz was made by one"):
        EmbeddingTable(main, ["a"], extra=(other,))


def test_missing_files_and_other_file_types_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such embeddings file"):
        EmbeddingTable(str(tmp_path / "none.npz"), ["car"])
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="not an embeddings file"):
        EmbeddingTable(str(tmp_path / "text.npz"), ["car"])


def camvid_text(**changes):
    """ClassText of CamVid with the shared CLIP embeddings; `changes` are options of MODEL.TEXT."""
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
        lines = [line.strip() for line in open(f"datasets/distractors_camvid_{kind}.txt", encoding="utf-8")]
        assert lines == lists[kind]  # no class names, no duplicates
    assert not set(lists["train"]) & set(lists["unseen"])
    assert len(lists["train"]) > 90 and len(lists["unseen"]) > 35


def test_synonyms_of_camvids_classes():
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
