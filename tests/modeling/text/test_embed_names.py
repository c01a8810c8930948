"""datasets/embed_names.py writes what MODEL.TEXT.EMBEDDINGS reads."""

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from hiervl.modeling.text import EmbeddingTable, TextTower


@pytest.fixture
def tool(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = importlib.util.spec_from_file_location("embed_names", "datasets/embed_names.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def names(tmp_path):
    (tmp_path / "names.txt").write_text("pavement\tsidewalk\ncar\n", encoding="utf-8")
    return str(tmp_path / "names.txt")


def test_with_a_tower(tool, names, tower_model, tmp_path):
    out, templates = str(tmp_path / "out.npz"), ("a {}", "the {}")
    tool.main(["--tower", tower_model, "--names", names, "--out", out, "--template", "a {}", "--template", "the {}"])
    expected = TextTower(tower_model, "", templates).embed(["sidewalk", "car"], ["sidewalk", "car"])
    own = EmbeddingTable(out, ["pavement", "car"])
    torch.testing.assert_close(own.embed(["pavement", "car"], ["pavement", "car"]), expected, atol=1e-3, rtol=0)
    assert own.words("pavement") == "sidewalk"


def test_with_a_sentence_model(tool, names, tmp_path, monkeypatch):
    class Encoder:
        max_seq_length = 6

        def __init__(self, model, device):
            self.tokenizer = lambda sentences, truncation: {"input_ids": [s.split() for s in sentences]}

        def encode(self, sentences, **options):
            return np.stack([np.eye(4)[len(s) % 4] for s in sentences])

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Encoder))
    out = str(tmp_path / "out.npz")
    tool.main(["--model", "folder/mini", "--names", names, "--out", out])
    with np.load(out) as data:
        assert data["names"].tolist() == ["pavement", "car"] and data["texts"].tolist() == ["sidewalk", "car"]
        assert str(data["model"]) == "mini" and str(data["template"]) == "a photo of a {}"
        assert data["embeddings"].dtype == np.float16
        lengths = [len("a photo of a sidewalk"), len("a photo of a car")]
        assert np.array_equal(data["embeddings"], np.eye(4)[[length % 4 for length in lengths]])
    with pytest.raises(SystemExit, match="has 8 tokens, the model reads 6"):
        long = "a very very very long sentence with {}"
        tool.main(["--model", "m", "--names", names, "--out", out, "--template", long])


def test_neither_the_names_nor_a_file_of_another_hand_is_overwritten(tool, tmp_path):
    source, other = tmp_path / "names.npz", tmp_path / "mine.npz"
    source.write_text("car\n")
    np.savez(other, mine=np.zeros(3))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for out, words in (
        (source, "one of the files to read"),
        (tmp_path / "names", "one of the files to read"),
        (other, "is already there"),
        (tmp_path / "mine", "is already there"),
    ):
        with pytest.raises(SystemExit, match=f"{out.name}.* {words}.* --out"):
            tool.main(["--tower", "none", "--names", str(source), "--out", str(out)])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    np.savez(other, **dict.fromkeys(("names", "texts", "embeddings", "model", "template"), np.zeros(1)))
    tool.claim(str(other), [str(source)])  # made by an earlier version


def test_a_users_mistakes(tool, names, tower_model, tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: MODEL.TEXT.MODEL: open_clip has no model 'ViT'"):
        tool.main(["--tower", "ViT", "--names", names, "--out", str(tmp_path / "o.npz")])
    with pytest.raises(SystemExit, match="cannot read none.txt"):
        tool.main(["--tower", tower_model, "--names", "none.txt", "--out", str(tmp_path / "o.npz")])
    with pytest.raises(SystemExit):
        tool.main(["--tower", tower_model, "--names", names, "--out", "o.npz", "--template", "x"])
    assert "--template has no {}" in capsys.readouterr().err
