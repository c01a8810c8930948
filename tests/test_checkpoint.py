"""Checkpoints: whole or absent, strict where they must be, and one line that names the key and the file."""

import os
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from hiervl import checkpoint as checkpoint_module
from hiervl.checkpoint import AtomicCheckpointer, atomic_write, load_strictly, read_state
from hiervl.errors import UserError


class Counter:
    """A checkpointable."""

    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def make(folder, width=3, count=0):
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    return AtomicCheckpointer(model, str(folder), trainer=Counter(count))


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_round_trip(tmp_path):
    saved, loaded = make(tmp_path, count=7), make(tmp_path)
    saved.save("model_0000001", iteration=1)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    rest = loaded.resume_or_load("", resume=True)
    assert rest["iteration"] == 1 and loaded.checkpointables["trainer"].count == 7
    for key, value in saved.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]


def test_the_best_model_is_not_what_resume_takes(tmp_path):
    checkpointer = make(tmp_path)
    checkpointer.save("model_0000001")
    checkpointer.save("model_best")
    assert checkpointer.get_checkpoint_file().endswith("model_0000001.pth")


@pytest.mark.parametrize("death", [KeyboardInterrupt, RuntimeError])
def test_dying_while_saving_leaves_the_old_file(tmp_path, monkeypatch, death):
    checkpointer = make(tmp_path)
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    def save_half(state, file):
        file.write(before[:100])
        raise death

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(death):
        checkpointer.save("model")
    monkeypatch.undo()
    assert (tmp_path / "model.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]
    make(tmp_path).resume_or_load("", resume=True)


def test_the_name_is_taken_only_after_the_content_is_on_the_disk(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            checkpoint_module.os, name, lambda *args, real=real, name=name: (steps.append(name), real(*args))[1]
        )
    with atomic_write(str(tmp_path / "file"), "w") as file:
        file.write("é")
    assert steps[:2] == ["fsync", "replace"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "é"


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    def no_space(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(UserError) as error:
        make(tmp_path).save("model")
    one_line(error, "model.pth", "No space left")


def test_own_checkpoint_of_another_shape(tmp_path):
    make(tmp_path, width=3).save("model")
    with pytest.raises(UserError) as error:
        make(tmp_path, width=4).resume_or_load("", resume=True)
    one_line(error, "model.pth", "0.weight", "(3, 2)", "(4, 2)")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state["model"].pop("1.bias"), ["1.bias", "missing"]),
        (lambda state: state["model"].update(extra=torch.zeros(1)), ["extra"]),
        (lambda state: state.update(optimizer=None), []),
    ],
)
def test_own_checkpoint_with_other_keys(tmp_path, change, words):
    make(tmp_path).save("model")
    path = str(tmp_path / "model.pth")
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    if not words:  # what nobody asked for is handed back
        assert "optimizer" in make(tmp_path).load(path)
        return
    with pytest.raises(UserError) as error:
        make(tmp_path).load(path)
    one_line(error, path, *words)


def test_resuming_needs_every_state_and_a_failed_load_can_be_followed_by_another(tmp_path):
    make(tmp_path).save("model")
    path = str(tmp_path / "model.pth")
    checkpointer = make(tmp_path)
    checkpointer.add_checkpointable("optimizer", Counter())
    with pytest.raises(UserError) as error:
        checkpointer.load(path)
    one_line(error, path, "optimizer", "MODEL.WEIGHTS")
    checkpointer.load(path, checkpointables=[])


def test_weights_of_others_may_lack_keys_but_not_all(tmp_path):
    path = str(tmp_path / "others.pth")
    torch.save({"0.weight": torch.ones(3, 2)}, path)
    checkpointer = make(tmp_path)
    checkpointer.load(path, checkpointables=[])
    assert checkpointer.model[0].weight.eq(1).all()
    torch.save({"conv.weight": torch.ones(3, 2)}, path)
    with pytest.raises(UserError) as error:
        make(tmp_path).load(path, checkpointables=[])
    one_line(error, path, "conv.weight", "MODEL.BACKBONE.WEIGHTS")


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint at all", "truncated", "code"])
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "model.pth"
    if content == "truncated":
        make(tmp_path).save("model")
        path.write_bytes(path.read_bytes()[:-200])
    elif content == "code":
        torch.save({"model": {}, "run": re.compile("x")}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        make(tmp_path).load(str(path))
    one_line(error, str(path))


def test_strict_loading_of_a_part(tmp_path):
    path = str(tmp_path / "part.pth")
    torch.save(nn.Linear(2, 3).state_dict(), path)
    part = nn.Linear(2, 3)
    load_strictly(part, path, "MODEL.BACKBONE.WEIGHTS")
    assert torch.equal(part.weight, read_state(path, "")["weight"])
    with pytest.raises(UserError) as error:
        load_strictly(nn.Linear(2, 4), path, "MODEL.BACKBONE.WEIGHTS")
    one_line(error, path, "weight", "(3, 2)", "(4, 2)", "MODEL.BACKBONE.WEIGHTS")


class Evil:
    """Unpickling it runs code."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


@pytest.mark.parametrize("suffix", [".pkl", ".pyth", ".pth"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda evil: evil,
        lambda evil: {"model": {"0.weight": evil}, "__author__": "x"},
        lambda evil: {"blobs": {"w": evil}},
        lambda evil: {"model_state": {"w": evil}},
    ],
)
def test_no_file_of_weights_runs_code(tmp_path, suffix, wrap):
    path, proof = tmp_path / f"weights{suffix}", tmp_path / "executed"
    path.write_bytes(pickle.dumps(wrap(Evil(proof))))
    with pytest.raises(UserError) as error:
        make(tmp_path).load(str(path), checkpointables=[])
    one_line(error, str(path))
    assert not proof.exists()


def test_a_pickle_of_the_model_zoo_is_read(tmp_path):
    path = tmp_path / "R-50.pkl"
    state = {"model": {"weight": np.full((3, 2), 7, np.float32)}, "__author__": "x", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(state, protocol=2).replace(b"numpy._core", b"numpy.core"))  # as numpy 1 wrote it
    checkpointer = make(tmp_path)
    checkpointer.load(str(path), checkpointables=[])
    assert checkpointer.model[0].weight.eq(7).all()


@pytest.mark.parametrize(
    "content, words",
    [
        ({"model": {"conv9": np.ones(3)}, "__author__": "x", "matching_heuristics": True}, ["none of its 1", "conv9"]),
        ({"model": {}, "__author__": "x", "matching_heuristics": True}, ["contains no weights"]),
        ({"model": {"0.weight": "text"}, "__author__": "x"}, ["0.weight", "not an array"]),
        ({"blobs": {"w": np.array([None])}}, ["'w'", "not an array"]),
        ([1, 2], ["holds no weights", "list"]),
    ],
)
def test_a_pickle_that_brings_nothing_is_an_error(tmp_path, content, words):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError) as error:
        make(tmp_path).load(str(path), checkpointables=[])
    one_line(error, str(path), *words)
