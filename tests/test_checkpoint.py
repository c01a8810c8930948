"""Checkpoints are written atomically and loaded strictly; errors are one line that names the key and the file."""

import os
import pickle
import re
import resource

import numpy as np
import pytest
import torch
from torch import nn


from hiervl.checkpoint import AtomicCheckpointer, atomic_write, load_strictly, read_state
from hiervl.errors import UserError
from hiervl.utils import files


class Counter:
    """A minimal checkpointable."""

    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def make_checkpointer(folder, width=3, count=0):
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    return AtomicCheckpointer(model, str(folder), trainer=Counter(count))


def assert_one_line(error, *expected_words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in expected_words), text


def test_saved_state_is_restored(tmp_path):
    saved, loaded = make_checkpointer(tmp_path, count=7), make_checkpointer(tmp_path)
    saved.save("model_0000001", iteration=1)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    extra = loaded.resume_or_load("", resume=True)
    assert extra["iteration"] == 1 and loaded.checkpointables["trainer"].count == 7
    for key, value in saved.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]


def test_resume_does_not_take_the_best_model(tmp_path):
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save("model_0000001")
    checkpointer.save("model_best")
    assert checkpointer.get_checkpoint_file().endswith("model_0000001.pth")


@pytest.mark.parametrize("error_type", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, error_type):
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    def save_half(state, file):
        file.write(before[:100])
        raise error_type

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(error_type):
        checkpointer.save("model")
    monkeypatch.undo()
    assert (tmp_path / "model.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]
    make_checkpointer(tmp_path).resume_or_load("", resume=True)


def test_content_is_on_disk_before_the_file_is_replaced(tmp_path, monkeypatch):
    steps = []

    def record_calls(name):
        original = getattr(os, name)

        def recorded(*args):
            steps.append(name)
            return original(*args)

        monkeypatch.setattr(files.os, name, recorded)

    record_calls("fsync")
    record_calls("replace")
    with atomic_write(str(tmp_path / "file"), "w") as file:
        file.write("é")
    assert steps[:2] == ["fsync", "replace"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "é"


def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    def no_space(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(UserError) as error:
        make_checkpointer(tmp_path).save("model")
    assert_one_line(error, "model.pth", "No space left")


def test_hiervl_checkpoints_of_another_shape_are_refused(tmp_path):
    make_checkpointer(tmp_path, width=3).save("model")
    with pytest.raises(UserError) as error:
        make_checkpointer(tmp_path, width=4).resume_or_load("", resume=True)
    assert_one_line(error, "model.pth", "0.weight", "(3, 2)", "(4, 2)")


@pytest.mark.parametrize(
    "change, expected_words",
    [
        (lambda state: state["model"].pop("1.bias"), ["1.bias", "missing"]),
        (lambda state: state["model"].update(extra=torch.zeros(1)), ["extra"]),
        (lambda state: state.update(optimizer=None), []),
    ],
)
def test_hiervl_checkpoints_must_have_exactly_the_expected_keys(tmp_path, change, expected_words):
    make_checkpointer(tmp_path).save("model")
    path = str(tmp_path / "model.pth")
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    if not expected_words:  # surplus entries are returned
        assert "optimizer" in make_checkpointer(tmp_path).load(path)
        return
    with pytest.raises(UserError) as error:
        make_checkpointer(tmp_path).load(path)
    assert_one_line(error, path, *expected_words)


def test_resuming_needs_every_state_and_loading_can_be_retried(tmp_path):
    make_checkpointer(tmp_path).save("model")
    path = str(tmp_path / "model.pth")
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.add_checkpointable("optimizer", Counter())
    with pytest.raises(UserError) as error:
        checkpointer.load(path)
    assert_one_line(error, path, "optimizer", "MODEL.WEIGHTS")
    checkpointer.load(path, checkpointables=[])


def test_weights_of_other_projects_may_lack_some_keys_but_not_all(tmp_path):
    path = str(tmp_path / "others.pth")
    torch.save({"0.weight": torch.ones(3, 2)}, path)
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.load(path, checkpointables=[])
    assert checkpointer.model[0].weight.eq(1).all()
    torch.save({"conv.weight": torch.ones(3, 2)}, path)
    with pytest.raises(UserError) as error:
        make_checkpointer(tmp_path).load(path, checkpointables=[])
    assert_one_line(error, path, "conv.weight", "MODEL.BACKBONE.WEIGHTS")


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint at all", "truncated", "code"])
def test_files_that_are_not_checkpoints_are_refused(tmp_path, content):
    path = tmp_path / "model.pth"
    if content == "truncated":
        make_checkpointer(tmp_path).save("model")
        path.write_bytes(path.read_bytes()[:-200])
    elif content == "code":
        torch.save({"model": {}, "run": re.compile("x")}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        make_checkpointer(tmp_path).load(str(path))
    assert_one_line(error, str(path))


def test_strict_loading_needs_matching_shapes(tmp_path):
    path = str(tmp_path / "part.pth")
    torch.save(nn.Linear(2, 3).state_dict(), path)
    part = nn.Linear(2, 3)
    load_strictly(part, path, "MODEL.BACKBONE.WEIGHTS")
    assert torch.equal(part.weight, read_state(path, "")["weight"])
    with pytest.raises(UserError) as error:
        load_strictly(nn.Linear(2, 4), path, "MODEL.BACKBONE.WEIGHTS")
    assert_one_line(error, path, "weight", "(3, 2)", "(4, 2)", "MODEL.BACKBONE.WEIGHTS")


class CodeOnUnpickling:
    """Unpickling an instance runs code."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("suffix", [".pkl", ".pyth", ".pth"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda malicious: malicious,
        lambda malicious: {"model": {"0.weight": malicious}, "__author__": "x"},
        lambda malicious: {"blobs": {"w": malicious}},
        lambda malicious: {"model_state": {"w": malicious}},
    ],
)
def test_loading_weights_never_runs_code(tmp_path, suffix, wrap):
    path, marker = tmp_path / f"weights{suffix}", tmp_path / "executed"
    path.write_bytes(pickle.dumps(wrap(CodeOnUnpickling(marker))))
    with pytest.raises(UserError) as error:
        make_checkpointer(tmp_path).load(str(path), checkpointables=[])
    assert_one_line(error, str(path))
    assert not marker.exists()


def test_model_zoo_pickles_are_loaded(tmp_path):
    path = tmp_path / "R-50.pkl"
    state = {"model": {"weight": np.full((3, 2), 7, np.float32)}, "__author__": "x", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(state, protocol=2).replace(b"numpy._core", b"numpy.core"))  # as numpy 1 wrote it
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.load(str(path), checkpointables=[])
    assert checkpointer.model[0].weight.eq(7).all()


@pytest.mark.parametrize(
    "content, expected_words",
    [
        ({"model": {"conv9": np.ones(3)}, "__author__": "x", "matching_heuristics": True}, ["none of its 1", "conv9"]),
        ({"model": {}, "__author__": "x", "matching_heuristics": True}, ["contains no weights"]),
        ({"model": {"0.weight": "text"}, "__author__": "x"}, ["0.weight", "not an array"]),
        ({"blobs": {"w": np.array([None])}}, ["'w'", "not an array"]),
        ([1, 2], ["holds no weights", "list"]),
    ],
)
def test_pickles_without_usable_weights_are_refused(tmp_path, content, expected_words):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError) as error:
        make_checkpointer(tmp_path).load(str(path), checkpointables=[])
    assert_one_line(error, str(path), *expected_words)


def flip_bits(path, count, seed=0):
    """Copies of a file, each with one flipped bit."""
    content, random = path.read_bytes(), np.random.default_rng(seed)
    for position in random.integers(8 * len(content), size=count).tolist():
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        yield bytes(damaged)


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    """Some bytes of the archive mean nothing; all others are covered by a checksum or break the archive."""
    checkpointer, damaged = make_checkpointer(tmp_path, width=40), tmp_path / "damaged.pth"
    checkpointer.save("model_0000001", iteration=1)
    expected, noticed = checkpointer.model.state_dict(), 0
    for content in flip_bits(tmp_path / "model_0000001.pth", 300):
        damaged.write_bytes(content)
        try:
            state = read_state(str(damaged), "MODEL.WEIGHTS")
        except UserError as error:
            assert "damaged" in str(error) and "\n" not in str(error)
            noticed += 1
        else:
            assert state["iteration"] == 1 and state["trainer"] == {"count": 0}
            assert all(torch.equal(state["model"][name], value) for name, value in expected.items())
    assert noticed > 100


def save_three(tmp_path):
    checkpointer = make_checkpointer(tmp_path)
    for i in (1, 2, 3):
        checkpointer.checkpointables["trainer"].count = i
        checkpointer.save(f"model_{i:07}")
    return checkpointer


@pytest.mark.parametrize("fault", ["truncated", "empty", "bit", "missing"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, fault):
    save_three(tmp_path)
    newest = tmp_path / "model_0000003.pth"
    content = newest.read_bytes()
    if fault == "missing":
        newest.unlink()
    else:
        flipped = bytearray(content)
        weights = content.rindex(torch.load(newest)["model"]["0.weight"].numpy().tobytes())
        flipped[weights] ^= 1
        newest.write_bytes({"truncated": content[:-100], "empty": b"", "bit": bytes(flipped)}[fault])
    resumed = make_checkpointer(tmp_path)
    assert resumed.get_checkpoint_file() == str(tmp_path / "model_0000002.pth")
    resumed.resume_or_load("", resume=True)
    assert resumed.checkpointables["trainer"].count == 2


def test_without_last_checkpoint_the_newest_numbered_one_is_used(tmp_path):
    checkpointer = save_three(tmp_path)
    checkpointer.save("model_best")
    (tmp_path / "last_checkpoint").unlink()
    resumed = make_checkpointer(tmp_path)
    assert resumed.has_checkpoint()
    assert resumed.get_checkpoint_file() == str(tmp_path / "model_0000003.pth")


def test_only_damaged_checkpoints_are_an_error_and_none_is_not(tmp_path):
    assert not make_checkpointer(tmp_path).has_checkpoint() and make_checkpointer(tmp_path).get_checkpoint_file() == ""
    save_three(tmp_path)
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="all 3 checkpoints are damaged"):
        make_checkpointer(tmp_path).resume_or_load("", resume=True)


def test_a_disk_that_fills_up_during_a_save_is_one_line_and_keeps_the_old_file(tmp_path):
    """A real limit: the process may not write files above 64 kB."""
    AtomicCheckpointer(nn.Linear(3, 3), str(tmp_path)).save("model_0000001")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with pytest.raises(UserError) as error:
            AtomicCheckpointer(nn.Linear(300, 300), str(tmp_path)).save("model_0000001")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_line(error, "model_0000001.pth: cannot be written (")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    assert read_state(str(tmp_path / "model_0000001.pth"), "")["model"]["weight"].shape == (3, 3)


def test_a_prolonged_run_falls_back_to_its_own_checkpoint_not_to_the_final_one_before(tmp_path):
    checkpointer = make_checkpointer(tmp_path)
    names = ["model_0000003", "model_final", "model_0000005", "model_0000007"]
    for second, name in enumerate(names):
        checkpointer.save(name)
        os.utime(tmp_path / f"{name}.pth", (second, second))
    (tmp_path / "model_0000007.pth").write_bytes(b"")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000005.pth")
