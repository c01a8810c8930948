import numpy as np
import pytest
import torch

from hiervl.classifier import TextClassifier
from hiervl.errors import UserError
from hiervl.text import ClassText, read_embeddings
from tests.conftest import shared_file


def write(path, names, embeddings, **extra):
    np.savez(path, names=np.array(names), embeddings=np.asarray(embeddings, np.float16), **extra)
    return str(path)


def test_rows_follow_the_class_list(tmp_path):
    path = write(tmp_path / "e.npz", ["car", "road", "sky"], np.eye(3))
    assert torch.equal(read_embeddings(path, ["sky", "car"]), torch.eye(3)[[2, 0]])


def test_definitions_are_averaged(tmp_path):
    path = write(tmp_path / "e.npz", ["a", "a too", "b"], np.eye(3), class_index=np.array([0, 0, 1]))
    rows = read_embeddings(path, ["a", "b"])
    torch.testing.assert_close(rows, torch.tensor([[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]]), rtol=1e-3, atol=1e-3)


def test_centring_spreads_the_cone():
    cone = torch.nn.functional.normalize(torch.randn(6, 32) * 0.3 + torch.ones(32), dim=1)
    text = ClassText(cone)()
    torch.testing.assert_close(text.norm(dim=1), torch.ones(6))
    off = ~torch.eye(6, dtype=torch.bool)
    assert (cone @ cone.t())[off].mean() > 0.8 and (text @ text.t())[off].mean() < 0.1
    torch.testing.assert_close(ClassText(cone, center=False)(), cone)


def test_one_class_is_not_centred_away():
    assert ClassText(torch.randn(1, 8))().norm() == pytest.approx(1)


def test_the_mean_is_in_the_checkpoint_and_the_embeddings_are_not():
    assert set(ClassText(torch.randn(3, 8)).state_dict()) == {"mean"}


def test_scores_are_cosines_times_a_bounded_scale():
    classifier = TextClassifier(4, 8)
    with torch.no_grad():
        classifier.log_scale.fill_(50)
    logits = classifier(torch.randn(2, 3, 4), torch.nn.functional.normalize(torch.randn(5, 8), dim=1))
    assert logits.shape == (2, 3, 6) and logits.abs().max() <= 100.001


@pytest.mark.parametrize("names, rows, message", [
    (["car"], np.eye(1), "no text embedding for class 'sky'"),
    (["car", "sky"], np.zeros((2, 4)), "zero or not finite"),
])
def test_files_that_do_not_fit(tmp_path, names, rows, message):
    with pytest.raises(UserError, match=message):
        read_embeddings(write(tmp_path / "e.npz", names, rows), ["car", "sky"])


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="no such embeddings file"):
        read_embeddings(str(tmp_path / "none.npz"), ["car"])
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="not an embeddings file"):
        read_embeddings(str(tmp_path / "text.npz"), ["car"])


def test_real_clip_embeddings_after_centring():
    names = [str(n) for n in np.load(shared_file("clip_text/camvid11.npz"))["names"]]
    raw = read_embeddings(shared_file("clip_text/camvid11.npz"), names)
    off = ~torch.eye(11, dtype=torch.bool)
    assert (raw @ raw.t())[off].mean() > 0.7
    text = ClassText(raw)()
    assert (text @ text.t())[off].abs().mean() < 0.3
