"""ClassText: centering, adapter, definitions, changing the class list, distractors."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hiervl.checkpoint import load_network
from hiervl.config import load_config
from hiervl.errors import UserError
from hiervl.losses.regularizers import language_loss
from hiervl.modeling.text import ClassText, EmbeddingTable
from hiervl.modeling.text.word_lists import read_definitions, read_lines, read_templates


def unit_vectors(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def write_embeddings(path, names, embeddings, **extra):
    np.savez(path, names=np.array(names), embeddings=np.asarray(embeddings, np.float32), **extra)
    return str(path)


@pytest.fixture
def table(tmp_path):
    """Embeddings of the words a to g and p; "p" was embedded as "word p"."""
    main = write_embeddings(
        tmp_path / "main.npz", ["a", "b", "p"], unit_vectors(3, 16), texts=np.array(["a", "b", "word p"])
    )
    extra = write_embeddings(
        tmp_path / "extra.npz",
        ["c", "d", "e", "f", "g", "word p"],
        np.concatenate([unit_vectors(5, 16, seed=1), unit_vectors(3, 16)[2:]]),
    )
    return EmbeddingTable(main, ["a", "b", "p"], extra=(extra,))


def test_centering_spreads_embeddings_in_a_narrow_cone():
    cone = F.normalize(unit_vectors(6, 32) * 1.7 + torch.ones(32), dim=1)
    text = ClassText(cone)()
    torch.testing.assert_close(text.norm(dim=1), torch.ones(6))
    off = ~torch.eye(6, dtype=torch.bool)
    assert (cone @ cone.t())[off].mean() > 0.8 and (text @ text.t())[off].mean() < 0.1
    torch.testing.assert_close(ClassText(cone, center=False)(), cone)


def test_a_single_class_is_not_centered():
    text = ClassText(unit_vectors(1, 8), adapter=True)
    assert text().norm().item() == pytest.approx(1)
    assert language_loss(text(), text.anchors(), 0.1) == 0


def test_the_state_dict_does_not_depend_on_the_number_of_classes():
    small, large = (ClassText(unit_vectors(n, 8), adapter=True).state_dict() for n in (3, 7))
    assert {k: v.shape for k, v in small.items()} == {k: v.shape for k, v in large.items()}
    assert set(ClassText(unit_vectors(3, 8)).state_dict()) == {"mean"}


def test_a_checkpoint_of_another_width_is_refused(tmp_path):
    torch.save(ClassText(unit_vectors(3, 8)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w.pth: mean has shape \(8,\), but this config needs \(16,\)"):
        load_network(ClassText(unit_vectors(3, 16)), str(tmp_path / "w.pth"))


def test_the_adapter_starts_as_the_identity_and_all_its_weights_are_trained():
    torch.manual_seed(0)
    text, target = ClassText(unit_vectors(5, 16), adapter=True), unit_vectors(5, 16, seed=1)
    torch.testing.assert_close(text(), text.anchors())
    residual = text.adapter.out(F.gelu(text.adapter.hidden(text.anchors() * 4))) / 4
    assert 0.3 < residual.norm(dim=1).mean() < 2  # so that gamma is about the relative size of the residual
    optimizer = torch.optim.Adam(text.parameters(), lr=1e-2)
    start, losses = copy.deepcopy(text.state_dict()), []
    for step in range(40):
        loss = (1 - (text() * target).sum(1)).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert text.adapter.gamma.grad != 0 and text.adapter.out.weight.grad.abs().max() == 0
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all((value != start[name]).any() for name, value in text.state_dict().items() if name != "mean")
    torch.testing.assert_close(text.mean, start["mean"])


def test_the_language_loss_is_lowest_at_the_anchors_and_pulls_toward_them():
    anchors = F.normalize(unit_vectors(6, 32) - unit_vectors(6, 32).mean(0), dim=1)
    moved = F.normalize(anchors + 0.8 * anchors.roll(1, 0), dim=1).requires_grad_()
    loss = language_loss(moved, anchors, 0.1)
    assert loss > language_loss(anchors, anchors, 0.1) + 0.02
    loss.backward()
    assert ((moved - moved.grad) * anchors).sum() > (moved * anchors).sum()


def test_definitions_are_averaged_per_class_and_available_individually(tmp_path):
    vectors = unit_vectors(4, 16)
    path = write_embeddings(tmp_path / "d.npz", ["a", "a too", "b", "c"], vectors, class_index=np.array([0, 0, 1, 2]))
    text = ClassText(EmbeddingTable(path, ["A", "B", "C"]), ["A", "B", "C"], center=False)
    torch.testing.assert_close(text()[0], F.normalize(vectors[:2].mean(0), dim=0))
    rows, index = text.definitions()
    torch.testing.assert_close(rows, vectors)
    assert index.tolist() == [0, 0, 1, 2]


def test_with_one_text_per_class_the_definitions_equal_the_class_embeddings(table):
    text = ClassText(table, ["a", "b", "p"], adapter=True)
    torch.nn.init.ones_(text.adapter.gamma)
    rows, index = text.definitions()
    assert torch.equal(rows, text()) and index.tolist() == [0, 1, 2]


def test_definitions_from_a_yaml_file(table, tmp_path):
    (tmp_path / "d.yaml").write_text("b: [b, c]\n")
    table.definitions = read_definitions(str(tmp_path / "d.yaml"))
    text = ClassText(table, ["a", "b"], center=False)
    torch.testing.assert_close(text()[1], F.normalize(unit_vectors(3, 16)[1] + unit_vectors(5, 16, seed=1)[0], dim=0))
    assert text.definitions()[1].tolist() == [0, 1, 1]


def test_changing_the_class_list_changes_no_weight(table):
    text = ClassText(table, ["a", "b"], adapter=True)
    torch.nn.init.ones_(text.adapter.gamma)
    before, embeddings = copy.deepcopy(text.state_dict()), text()
    text.set_classes(["f", "b", "word p", "c"])
    assert text.class_names == ["f", "b", "word p", "c"] and text().shape == (4, 16)
    assert all(torch.equal(value, before[name]) for name, value in text.state_dict().items())
    torch.testing.assert_close(text()[1], embeddings[1])
    torch.testing.assert_close(text.anchors()[0], F.normalize(unit_vectors(5, 16, seed=1)[3] - before["mean"], dim=0))


@pytest.mark.parametrize(
    "names, message",
    [
        (["a", "b", "a"], "class 'a' is listed more than once"),
        (["a", "nowhere"], "main.npz: no text embedding for 'nowhere' .1 of 2 missing"),
        ([], "list of classes is empty"),
        (["p", "word p"], "'p' and 'word p' have the same text embedding"),
    ],
)
def test_an_invalid_list_of_names_is_refused(table, names, message):
    text = ClassText(table, ["a", "b"])
    with pytest.raises(UserError, match=message):
        text.set_classes(names)
    assert text.class_names == ["a", "b"] and text().shape == (2, 16)  # the previous list stays in use


def test_distractors_exclude_the_classes_and_their_words(table):
    text = ClassText(table, ["a", "p"], distractors=["A", "b", "word p", "c", "g"], adapter=True)
    names, vectors = text.distractors()
    assert names == ["b", "c", "g"] and vectors.shape == (3, 16)
    torch.testing.assert_close(vectors[1], F.normalize(unit_vectors(5, 16, seed=1)[0] - text.mean, dim=0))
    text.set_classes(["a", "c"])
    assert text.distractors()[0] == ["b", "word p", "g"]
    assert ClassText(table, ["a", "b"]).distractors()[1].shape == (0, 16)
    table.definitions = {"a": ["a", "g"]}
    assert ClassText(table, ["a", "p"], distractors=["c", "g"]).distractors()[0] == ["c"]


def test_the_error_for_a_distractor_without_embedding_names_it(table):
    with pytest.raises(UserError, match="no text embedding for 'moon'"):
        ClassText(table, ["a", "b"], distractors=["c", "moon"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_text_embeddings_ignore_autocast(dtype):
    text = ClassText(unit_vectors(4, 16), adapter=True, distractors=())
    torch.nn.init.ones_(text.adapter.gamma)
    with torch.autocast("cpu", dtype):
        with_autocast = [text(), text.anchors(), text.definitions()[0]]
    for value, expected in zip(with_autocast, [text(), text.anchors(), text.definitions()[0]]):
        assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_a_copy_is_independent_of_the_original(table):
    text = ClassText(table, ["a", "b"], adapter=True)
    teacher = copy.deepcopy(text)
    teacher.set_classes(["c", "d", "e"])
    torch.nn.init.ones_(teacher.adapter.gamma)
    assert text.class_names == ["a", "b"] and text.adapter.gamma == 0


def test_templates_and_word_lists_from_files(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a {}\n\nthe {}\na {}\n", encoding="utf-8")
    assert read_templates(("one {}", str(path))) == ["one {}", "a {}", "the {}"]
    with pytest.raises(UserError, match="none.txt: cannot be read .*MODEL.TEXT.DISTRACTORS"):
        read_lines(str(tmp_path / "none.txt"), "MODEL.TEXT.DISTRACTORS")
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_lines(str(path), "MODEL.TEXT.DISTRACTORS")


@pytest.mark.parametrize(
    "content, message",
    [
        ("- a\n", "needs a line"),
        ("a: b\n", "'a' needs a list of texts"),
        ("a: []\n", "'a' needs"),
        ("a: [", "invalid YAML"),
    ],
)
def test_invalid_definitions_files_are_refused(tmp_path, content, message):
    (tmp_path / "d.yaml").write_text(content)
    with pytest.raises(UserError, match=f"d.yaml.*{message}"):
        read_definitions(str(tmp_path / "d.yaml"))


def test_extra_files_need_a_main_file():
    cfg = load_config("", ["MODEL.TEXT.EXTRA_EMBEDDINGS", ("x.npz",)])
    with pytest.raises(UserError, match="EXTRA_EMBEDDINGS needs MODEL.TEXT.EMBEDDINGS, which is empty"):
        ClassText(cfg, ["a", "b"])


def test_context_tokens_need_a_tower(tmp_path):
    path = write_embeddings(tmp_path / "e.npz", ["a", "b"], unit_vectors(2, 16))
    cfg = load_config("", ["MODEL.TEXT.EMBEDDINGS", path, "MODEL.TEXT.CONTEXT_TOKENS", 8])
    with pytest.raises(UserError, match="MODEL.TEXT.CONTEXT_TOKENS needs a CLIP text tower"):
        ClassText(cfg, ["a", "b"])
