"""datasets/embed_names.py writes embeddings files for MODEL.TEXT.EMBEDDINGS."""

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
    table = EmbeddingTable(out, ["pavement", "car"])
    torch.testing.assert_close(table.embed(["pavement", "car"], ["pavement", "car"]), expected, atol=1e-3, rtol=0)
    assert table.words("pavement") == "sidewalk"


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
    with pytest.raises(SystemExit, match="has 8 tokens, but the model reads 6"):
        long = "a very very very long sentence with {}"
        tool.main(["--model", "m", "--names", names, "--out", out, "--template", long])


def test_the_names_file_and_files_not_created_by_this_tool_are_not_overwritten(tool, tmp_path):
    source, user_file = tmp_path / "names.npz", tmp_path / "mine.npz"
    source.write_text("car\n")
    np.savez(user_file, mine=np.zeros(3))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for out, words in (
        (source, "one of the input files"),
        (tmp_path / "names", "one of the input files"),
        (user_file, "already exists"),
        (tmp_path / "mine", "already exists"),
    ):
        with pytest.raises(SystemExit, match=f"{out.name}.* {words}.* --out"):
            tool.main(["--tower", "none", "--names", str(source), "--out", str(out)])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    np.savez(user_file, **dict.fromkeys(("names", "texts", "embeddings", "model", "template"), np.zeros(1)))
    tool.claim(str(user_file), [str(source)])  # the arrays of an earlier version of the tool


def test_invalid_options_are_reported(tool, names, tower_model, tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: MODEL.TEXT.MODEL: open_clip has no model 'ViT'"):
        tool.main(["--tower", "ViT", "--names", names, "--out", str(tmp_path / "o.npz")])
    with pytest.raises(SystemExit, match="cannot read none.txt"):
        tool.main(["--tower", tower_model, "--names", "none.txt", "--out", str(tmp_path / "o.npz")])
    with pytest.raises(SystemExit):
        tool.main(["--tower", tower_model, "--names", names, "--out", "o.npz", "--template", "x"])
    assert "--template has no {}" in capsys.readouterr().err
