"""Text embeddings from an open_clip tower: ensemble, context tokens, long names, cache, weights that cannot be had."""

import copy
import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from hiervl.modeling.clip import clip_fingerprint, load_clip
from hiervl.config import load_config
from hiervl.errors import UserError
from hiervl.losses.regularizers import language_loss
from hiervl.modeling.text import ClassText, TextTower
from hiervl.modeling.text import tower as tower_module

NAMES = ["sky", "traffic sign", "person riding a bicycle"]


@pytest.fixture
def make_tower(tower_model, tmp_path):
    def make(**options):
        return TextTower(tower_model, "", **{"cache": str(tmp_path / "cache"), **options})

    return make


@pytest.fixture
def make_text(tower_model, tmp_path):
    def make(names=NAMES, **options):
        options = {"MODEL": tower_model, "CACHE": str(tmp_path / "cache"), **options}
        return ClassText(load_config("", [x for k, v in options.items() for x in (f"MODEL.TEXT.{k}", v)]), names)

    return make


def embed(tower, texts):
    return tower.embed(texts, texts)


def test_one_template_is_what_open_clip_computes(make_tower, tower_model):
    network = open_clip.create_model(tower_model).eval()
    tokens = open_clip.get_tokenizer(tower_model)([f"a photo of a {name}" for name in NAMES])
    with torch.no_grad():
        expected = network.encode_text(tokens, normalize=True)
    torch.testing.assert_close(embed(make_tower(), NAMES), expected)


def test_an_ensemble_is_the_normalized_mean(make_tower, monkeypatch):
    templates = ("a photo of a {}", "{} seen from afar", "one {}")
    parts = torch.stack([embed(make_tower(templates=(t,)), NAMES) for t in templates])
    expected = F.normalize(parts.mean(0), dim=1)
    torch.testing.assert_close(embed(make_tower(templates=templates), NAMES), expected)
    monkeypatch.setattr(tower_module, "_CHUNK", 2)  # sentences of one name in two chunks
    torch.testing.assert_close(embed(make_tower(templates=templates, cache="/nowhere"), NAMES), expected)


def test_a_name_that_would_be_cut_is_named(make_tower):
    fits, too_long = "a " * 14, "a " * 15  # with "a photo of a", start and end: 20 and 21 tokens, the tower reads 20
    embed(make_tower(), ["sky", fits])
    with pytest.raises(UserError, match="class 'car': 'a photo of a a .* has 21 tokens, the tower reads 20"):
        make_tower().embed(["sky", too_long], ["sky", "car"])
    with pytest.raises(UserError, match="has 10. tokens"):
        embed(make_tower(), ["x " * 100])


def test_names_in_other_languages(make_text):
    text = make_text(["道路", "дорога", "Straße", "🚗", "طريق"], TEMPLATES=("{}",))
    assert torch.isfinite(text()).all()
    cosines = text.anchors() @ text.anchors().t()
    assert (cosines - 2 * torch.eye(5)).max() < 0.99


def test_the_tower_is_in_no_checkpoint_and_in_no_copy(make_text):
    text = make_text(CONTEXT_TOKENS=4)
    assert set(text.state_dict()) == {"mean", "context_embed.weight"}
    assert [name for name, _ in text.named_parameters()] == ["context_embed.weight"]
    assert copy.deepcopy(text).source is text.source


def test_context_tokens_learn_and_the_tower_does_not(make_text):
    text = make_text(CONTEXT_TOKENS=8, ADAPTER=True)
    frozen = copy.deepcopy(text.source._clip.state_dict())
    anchors, start = text.anchors(), text().detach()
    assert text.context_embed.weight.shape == (8, 32)
    optimizer = torch.optim.Adam(text.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = language_loss(text(), anchors, 0.1)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0] and not torch.allclose(text(), start)
    assert torch.equal(text.anchors(), anchors)
    assert all(torch.equal(value, frozen[name]) for name, value in text.source._clip.state_dict().items())


def test_context_stands_before_the_name(make_tower):
    """With the embeddings of "a photo of a" as context, the result is that of the sentence."""
    tower = make_tower()
    words = open_clip.get_tokenizer(tower.model)(["a photo of a"])[0, 1:5]
    context = tower._token_embedding.weight[words]
    expected = embed(make_tower(templates=("a photo of a {}.",)), NAMES)
    torch.testing.assert_close(tower.embed_in_context(NAMES, context), expected)
    with pytest.raises(UserError, match="class 'a a a .* has 17 tokens, the tower reads 16"):
        tower.embed_in_context(["a " * 14], context)


def test_context_in_evaluation_is_computed_once_per_context(make_text, monkeypatch):
    text, calls = make_text(CONTEXT_TOKENS=4), []
    original = text.source.embed_in_context
    monkeypatch.setattr(text.source, "embed_in_context", lambda *args: calls.append(1) or original(*args))
    with torch.no_grad():
        first = text()
        assert torch.equal(text(), first) and len(calls) == 1
        text.context_embed.weight += 1
        assert not torch.equal(text(), first) and len(calls) == 2
        text.set_classes(["road", "sky"])
        assert text().shape == (2, 24) and len(calls) == 3
    torch.testing.assert_close(
        text()[1], F.normalize(text.source.embed_in_context(["sky"], text.context_embed.weight)[0] - text.mean, dim=0)
    )


def test_definitions_and_distractors(make_text, tmp_path):
    (tmp_path / "d.yaml").write_text("sky: [sky, blue sky, clouds]\n")
    (tmp_path / "w.txt").write_text("banana\nsky\nzebra\n")
    for context in (0, 4):
        text = make_text(
            DEFINITIONS=str(tmp_path / "d.yaml"), DISTRACTORS=str(tmp_path / "w.txt"), CONTEXT_TOKENS=context
        )
        rows, index = text.definitions()
        assert rows.shape == (5, 24) and index.tolist() == [0, 0, 0, 1, 2] and text().shape == (3, 24)
        names, vectors = text.distractors()
        assert names == ["banana", "zebra"] and vectors.shape == (2, 24)
        assert vectors.requires_grad == bool(context)


def test_other_classes_and_a_thousand_names(make_text):
    text = make_text()
    mean = text.mean.clone()
    text.set_classes([f"thing number {i}" for i in range(1000)])
    assert text().shape == (1000, 24) and torch.equal(text.mean, mean)


def test_the_cache_saves_the_tower(make_tower, monkeypatch):
    expected = embed(make_tower(), NAMES)
    monkeypatch.setattr(tower_module, "load_clip", lambda *args: pytest.fail("the tower was loaded"))
    assert torch.equal(embed(make_tower(), NAMES), expected)


@pytest.mark.parametrize("change", ["texts", "templates", "weights"])
def test_what_decides_the_embeddings_decides_the_cache(make_tower, tower_folder, tmp_path, change):
    embed(make_tower(), NAMES)
    if change == "texts":
        embed(make_tower(), NAMES[:2])
    elif change == "templates":
        embed(make_tower(templates=("{}",)), NAMES)
    else:
        other = tmp_path / "other"
        other.mkdir()
        (other / "open_clip_config.json").write_bytes((tower_folder / "open_clip_config.json").read_bytes())
        state = torch.load(tower_folder / "open_clip_pytorch_model.bin", weights_only=True)
        torch.save({**state, "text_projection": -state["text_projection"]}, other / "model.pth")
        embed(TextTower(f"local-dir:{other}", "", cache=str(tmp_path / "cache")), NAMES)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "nan"])
def test_a_broken_cache_is_made_anew(make_tower, tmp_path, damage, caplog):
    expected = embed(make_tower(), NAMES)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    if damage in ("other", "nan"):
        rows = expected.numpy() if damage == "other" else expected.numpy() * np.nan
        np.savez(path, texts=np.array(["x", "y", "z"] if damage == "other" else NAMES), embeddings=rows)
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    assert torch.equal(embed(make_tower(), NAMES), expected)
    assert "is made anew" in caplog.text
    caplog.clear()
    assert torch.equal(embed(make_tower(), NAMES), expected) and not caplog.text


def test_a_folder_that_cannot_be_written_is_no_error(make_tower, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert embed(make_tower(cache=str(tmp_path / "file" / "cache")), NAMES).shape == (3, 24)
    assert "MODEL.TEXT.CACHE" in caplog.text


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path, tower_model):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    embed(TextTower(tower_model, ""), ["sky"])
    assert len(list((tmp_path / "hiervl").glob("text-*.npz"))) == 1


@pytest.fixture
def tiny_name(tower_folder, tmp_path):
    """The tower under a name that open_clip knows, its weights apart from it."""
    config = json.loads((tower_folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "hiervl-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "hiervl-tiny.json")
    return "hiervl-tiny"


def test_weights_from_a_file(make_tower, tiny_name, tower_folder, tmp_path):
    weights = tower_folder / "open_clip_pytorch_model.bin"
    own = TextTower(tiny_name, str(weights), cache=str(tmp_path / "own"))
    torch.testing.assert_close(embed(own, NAMES), embed(make_tower(), NAMES))
    first = clip_fingerprint(tiny_name, str(weights), "MODEL.TEXT")
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "text_projection": -state["text_projection"]}, tmp_path / "w.pt")
    assert clip_fingerprint(tiny_name, str(tmp_path / "w.pt"), "MODEL.TEXT") != first


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Failed to download weights\nfor tag 'openai': no network")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(UserError) as error:
        load_clip("ViT-B-16", "openai", "MODEL.TEXT")
    assert "\n" not in str(error.value) and "could not be downloaded" in str(error.value)
    assert "MODEL.TEXT.PRETRAINED (with MODEL ViT-B-16-quickgelu)" in str(error.value)


def test_openais_weights_get_their_activation(monkeypatch):
    seen = {}
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: seen.update(kwargs) or torch.nn.Identity())
    load_clip("ViT-B-16", "openai", "MODEL.TEXT")
    assert seen["force_quick_gelu"]
    seen.clear()
    load_clip("ViT-B-16", "laion2b_s34b_b88k", "MODEL.TEXT")
    assert "force_quick_gelu" not in seen


def test_models_and_weights_that_cannot_be(tiny_name, tmp_path):
    with pytest.raises(UserError, match="MODEL.TEXT.MODEL: open_clip has no model 'ViT-B-17'; similar: .*ViT-B-16"):
        load_clip("ViT-B-17", "openai", "MODEL.TEXT")
    with pytest.raises(UserError, match="MODEL.TEXT.PRETRAINED: 'opnai' is neither a file nor weights .*openai"):
        load_clip("ViT-B-16", "opnai", "MODEL.TEXT")
    with pytest.raises(UserError, match="has no open_clip_config.json"):
        load_clip(f"local-dir:{tmp_path}", "", "MODEL.TEXT")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("other.pt", "text.pt"):
        with pytest.raises(UserError, match=f"{name}: does not hold the weights of MODEL.TEXT.MODEL hiervl-tiny"):
            load_clip(tiny_name, str(tmp_path / name), "MODEL.TEXT")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "jit.pt"))
    with pytest.raises(UserError, match="jit.pt: is a TorchScript archive"):
        load_clip(tiny_name, str(tmp_path / "jit.pt"), "MODEL.TEXT")


def test_weights_that_are_not_finite(tiny_name, tower_folder, tmp_path):
    state = torch.load(tower_folder / "open_clip_pytorch_model.bin", weights_only=True)
    torch.save({**state, "text_projection": state["text_projection"] * float("nan")}, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="nan.pt: the text tower hiervl-tiny gives embeddings that are not finite"):
        embed(TextTower(tiny_name, str(tmp_path / "nan.pt"), cache=str(tmp_path / "c")), NAMES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_the_tower(make_text, tmp_path, dtype):
    text = make_text(CONTEXT_TOKENS=2)
    expected, other = text(), make_text(["road"]).raw
    with torch.autocast("cpu", dtype):
        assert torch.equal(text(), expected)
        assert torch.equal(make_text(["road"], CACHE=str(tmp_path / "new")).raw, other)


def test_templates_without_a_place_for_the_name(make_text, tmp_path):
    (tmp_path / "t.txt").write_text("a photo\n")
    with pytest.raises(UserError, match="MODEL.TEXT.TEMPLATES: 'a photo' has no {}"):
        make_text(TEMPLATES=(str(tmp_path / "t.txt"),))
    text = make_text(TEMPLATES=("datasets/templates.txt",))
    assert len(text.source.templates) == 8
