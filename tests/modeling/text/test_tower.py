"""Text embeddings from an open_clip tower: templates, context tokens, long names, cache, weights."""

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


def test_with_one_template_embeddings_equal_open_clips(make_tower, tower_model):
    network = open_clip.create_model(tower_model).eval()
    tokens = open_clip.get_tokenizer(tower_model)([f"a photo of a {name}" for name in NAMES])
    with torch.no_grad():
        expected = network.encode_text(tokens, normalize=True)
    torch.testing.assert_close(embed(make_tower(), NAMES), expected)


def test_several_templates_are_averaged_and_normalized(make_tower, monkeypatch):
    templates = ("a photo of a {}", "{} seen from afar", "one {}")
    parts = torch.stack([embed(make_tower(templates=(t,)), NAMES) for t in templates])
    expected = F.normalize(parts.mean(0), dim=1)
    torch.testing.assert_close(embed(make_tower(templates=templates), NAMES), expected)
    monkeypatch.setattr(tower_module, "_CHUNK", 2)  # splits the sentences of a name over two chunks
    torch.testing.assert_close(embed(make_tower(templates=templates, cache="/nowhere"), NAMES), expected)


def test_a_name_that_would_be_truncated_is_refused(make_tower):
    fits, too_long = "a " * 14, "a " * 15  # 20 and 21 tokens, with template, start and end
    embed(make_tower(), ["sky", fits])
    with pytest.raises(UserError, match="class 'car': 'a photo of a a .* has 21 tokens, but the tower accepts 20"):
        make_tower().embed(["sky", too_long], ["sky", "car"])
    with pytest.raises(UserError, match="has 10. tokens"):
        embed(make_tower(), ["x " * 100])


def test_names_in_other_languages(make_text):
    text = make_text(["道路", "дорога", "Straße", "🚗", "طريق"], TEMPLATES=("{}",))
    assert torch.isfinite(text()).all()
    cosines = text.anchors() @ text.anchors().t()
    assert (cosines - 2 * torch.eye(5)).max() < 0.99


def test_the_tower_is_neither_saved_nor_copied(make_text):
    text = make_text(CONTEXT_TOKENS=4)
    assert set(text.state_dict()) == {"mean", "context_embed.weight"}
    assert [name for name, _ in text.named_parameters()] == ["context_embed.weight"]
    assert copy.deepcopy(text).source is text.source


def test_context_tokens_are_trained_and_the_tower_is_not(make_text):
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


def test_context_comes_before_the_name(make_tower):
    """With the token embeddings of "a photo of a" as context, the result equals that of the sentence."""
    tower = make_tower()
    tokens = open_clip.get_tokenizer(tower.model)(["a photo of a"])[0, 1:5]
    context = tower._token_embedding.weight[tokens]
    expected = embed(make_tower(templates=("a photo of a {}.",)), NAMES)
    torch.testing.assert_close(tower.embed_in_context(NAMES, context), expected)
    with pytest.raises(UserError, match="class 'a a a .* has 17 tokens, but the tower accepts 16"):
        tower.embed_in_context(["a " * 14], context)


def test_evaluation_runs_the_tower_once_per_context(make_text, monkeypatch):
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


def test_changing_to_a_list_of_a_thousand_names(make_text):
    text = make_text()
    mean = text.mean.clone()
    text.set_classes([f"thing number {i}" for i in range(1000)])
    assert text().shape == (1000, 24) and torch.equal(text.mean, mean)


def test_the_tower_is_not_loaded_if_the_cache_has_the_embeddings(make_tower, monkeypatch):
    expected = embed(make_tower(), NAMES)
    monkeypatch.setattr(tower_module, "load_clip", lambda *args: pytest.fail("the tower was loaded"))
    assert torch.equal(embed(make_tower(), NAMES), expected)


@pytest.mark.parametrize("change", ["texts", "templates", "weights"])
def test_different_texts_templates_or_weights_use_different_cache_files(make_tower, tower_folder, tmp_path, change):
    embed(make_tower(), NAMES)
    if change == "texts":
        embed(make_tower(), NAMES[:2])
    elif change == "templates":
        embed(make_tower(templates=("{}",)), NAMES)
    else:
        changed = tmp_path / "changed"
        changed.mkdir()
        (changed / "open_clip_config.json").write_bytes((tower_folder / "open_clip_config.json").read_bytes())
        state = torch.load(tower_folder / "open_clip_pytorch_model.bin", weights_only=True)
        torch.save({**state, "text_projection": -state["text_projection"]}, changed / "model.pth")
        embed(TextTower(f"local-dir:{changed}", "", cache=str(tmp_path / "cache")), NAMES)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "truncated", "other_texts", "nan"])
def test_an_invalid_cache_file_is_computed_again(make_tower, tmp_path, damage, caplog):
    expected = embed(make_tower(), NAMES)
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "other_texts":
        np.savez(path, texts=np.array(["x", "y", "z"]), embeddings=expected.numpy())
    else:
        np.savez(path, texts=np.array(NAMES), embeddings=expected.numpy() * np.nan)
    assert torch.equal(embed(make_tower(), NAMES), expected)
    assert "computing the text embeddings again" in caplog.text
    caplog.clear()
    assert torch.equal(embed(make_tower(), NAMES), expected) and not caplog.text


def test_a_cache_folder_that_cannot_be_written_only_warns(make_tower, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert embed(make_tower(cache=str(tmp_path / "file" / "cache")), NAMES).shape == (3, 24)
    assert "MODEL.TEXT.CACHE" in caplog.text


def test_the_default_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path, tower_model):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    embed(TextTower(tower_model, ""), ["sky"])
    assert len(list((tmp_path / "hiervl").glob("text-*.npz"))) == 1


@pytest.fixture
def tiny_name(tower_folder, tmp_path):
    """The tower's architecture, registered with open_clip under a name, without weights."""
    config = json.loads((tower_folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "hiervl-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "hiervl-tiny.json")
    return "hiervl-tiny"


def test_weights_from_a_file(make_tower, tiny_name, tower_folder, tmp_path):
    weights = tower_folder / "open_clip_pytorch_model.bin"
    tower = TextTower(tiny_name, str(weights), cache=str(tmp_path / "file_cache"))
    torch.testing.assert_close(embed(tower, NAMES), embed(make_tower(), NAMES))
    fingerprint = clip_fingerprint(tiny_name, str(weights), "MODEL.TEXT")
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "text_projection": -state["text_projection"]}, tmp_path / "w.pt")
    assert clip_fingerprint(tiny_name, str(tmp_path / "w.pt"), "MODEL.TEXT") != fingerprint


def test_the_error_for_a_failed_download_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Failed to download weights\nfor tag 'openai': no network")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(UserError) as error:
        load_clip("ViT-B-16", "openai", "MODEL.TEXT")
    assert "\n" not in str(error.value) and "could not be downloaded" in str(error.value)
    assert "MODEL.TEXT.PRETRAINED to the file and MODEL.TEXT.MODEL to ViT-B-16-quickgelu" in str(error.value)


def test_openais_weights_use_quick_gelu(monkeypatch):
    options = {}
    monkeypatch.setattr(
        open_clip, "create_model", lambda *args, **kwargs: options.update(kwargs) or torch.nn.Identity()
    )
    load_clip("ViT-B-16", "openai", "MODEL.TEXT")
    assert options["force_quick_gelu"]
    options.clear()
    load_clip("ViT-B-16", "laion2b_s34b_b88k", "MODEL.TEXT")
    assert "force_quick_gelu" not in options


def test_unknown_models_and_unsuitable_weights_are_refused(tiny_name, tmp_path):
    with pytest.raises(UserError, match="MODEL.TEXT.MODEL: open_clip has no model 'ViT-B-17'; similar: .*ViT-B-16"):
        load_clip("ViT-B-17", "openai", "MODEL.TEXT")
    with pytest.raises(
        UserError, match="MODEL.TEXT.PRETRAINED: 'opnai' is neither a file nor one of open_clip's tags .*openai"
    ):
        load_clip("ViT-B-16", "opnai", "MODEL.TEXT")
    with pytest.raises(UserError, match="has no open_clip_config.json"):
        load_clip(f"local-dir:{tmp_path}", "", "MODEL.TEXT")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("other.pt", "text.pt"):
        with pytest.raises(UserError, match=f"{name}: does not contain the weights of MODEL.TEXT.MODEL hiervl-tiny"):
            load_clip(tiny_name, str(tmp_path / name), "MODEL.TEXT")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "jit.pt"))
    with pytest.raises(UserError, match="jit.pt: is a TorchScript archive"):
        load_clip(tiny_name, str(tmp_path / "jit.pt"), "MODEL.TEXT")


def test_weights_that_give_non_finite_embeddings_are_refused(tiny_name, tower_folder, tmp_path):
    state = torch.load(tower_folder / "open_clip_pytorch_model.bin", weights_only=True)
    torch.save({**state, "text_projection": state["text_projection"] * float("nan")}, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="nan.pt: the embeddings of the text tower hiervl-tiny are not finite"):
        embed(TextTower(tiny_name, str(tmp_path / "nan.pt"), cache=str(tmp_path / "c")), NAMES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_tower_ignores_autocast(make_text, tmp_path, dtype):
    text = make_text(CONTEXT_TOKENS=2)
    expected, expected_road = text(), make_text(["road"]).raw
    with torch.autocast("cpu", dtype):
        assert torch.equal(text(), expected)
        assert torch.equal(make_text(["road"], CACHE=str(tmp_path / "new")).raw, expected_road)


def test_templates_without_a_placeholder_are_refused(make_text, tmp_path):
    (tmp_path / "t.txt").write_text("a photo\n")
    with pytest.raises(UserError, match="MODEL.TEXT.TEMPLATES: 'a photo' has no {}"):
        make_text(TEMPLATES=(str(tmp_path / "t.txt"),))
    text = make_text(TEMPLATES=("datasets/templates.txt",))
    assert len(text.source.templates) == 8
