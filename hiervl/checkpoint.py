"""Saves checkpoints atomically, and loads weights with errors that name what does not fit."""

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from typing import IO

import torch
from detectron2.checkpoint import DetectionCheckpointer

from .download import is_url, local_weights
from .errors import UserError
from .pickled_arrays import is_array, read_pickled_arrays
from .utils.files import replace_file


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO]:
    """Opens `path` for writing (mode "w" or "wb") such that it is replaced as a whole at the end, or not at all.

    The content is forced to disk: after a crash, a full disk or a kill, the old file is still there.

    Raises:
        UserError: the file cannot be written (no space, no permission, no such folder).
    """
    try:
        with replace_file(path, mode) as file:
            yield file
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose another OUTPUT_DIR."
        ) from error


_NUMBERED = re.compile(r"model_(\d{7}|final)\.pth")


class TrainedNames:
    """The class names that a network was trained with, as a part of its checkpoint.

    Args:
        networks: networks whose attribute `trained_names` is set when a checkpoint is loaded.
    """

    def __init__(self, *networks):
        self.networks = networks

    def state_dict(self):
        return {"names": sorted(self.networks[0].trained_names)}

    def load_state_dict(self, state):
        for network in self.networks:
            network.trained_names = frozenset(state["names"])


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes and strict loading of our own checkpoints.

    `model_best` does not become `last_checkpoint`, because --resume must continue from the latest state.
    """

    def save(self, name, **extra):
        """Writes `<save_dir>/<name>.pth` (weights, checkpointables, `extra`) and its name to `last_checkpoint`."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {
            "model": self.model.state_dict(),
            **{key: obj.state_dict() for key, obj in self.checkpointables.items()},
            **extra,
        }
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with atomic_write(path) as file:
                torch.save(data, file)
        except RuntimeError as error:
            if not isinstance(error.__context__, OSError):
                raise
            raise UserError(f"{path}: cannot be written ({error.__context__}); free some space.") from error
        if name != "model_best":
            self.tag_last_checkpoint(f"{name}.pth")

    def get_checkpoint_file(self):
        """The newest intact checkpoint in this folder, or "" if the folder has no checkpoint.

        Normally `last_checkpoint` names it. If that file is damaged or missing, an earlier one is used, with a warning.

        Raises:
            UserError: the folder has checkpoints, but all of them are damaged.
        """
        named = super().get_checkpoint_file() if super().has_checkpoint() else ""
        paths = list(dict.fromkeys([*([named] if named else []), *self._numbered()]))
        for path in paths:
            problem = "it does not exist" if not os.path.isfile(path) else damage(path)
            if not problem:
                if path != named:
                    self.logger.warning("Using %s, the newest intact checkpoint", path)
                return path
            self.logger.warning("Skipping the checkpoint %s: %s", path, problem)
        if paths:
            raise UserError(f"{self.save_dir}: all {len(paths)} checkpoints are damaged (see the log); start again.")
        return ""

    def has_checkpoint(self):
        return super().has_checkpoint() or bool(self._numbered())

    def _numbered(self) -> list[str]:
        """Checkpoints that --resume can continue from, last written first.

        Not by number: a run that was prolonged has checkpoints after its model_final.
        """
        names = os.listdir(self.save_dir) if os.path.isdir(self.save_dir) else []
        paths = [os.path.join(self.save_dir, name) for name in sorted(names) if _NUMBERED.fullmatch(name)]
        return sorted(paths, key=os.path.getmtime, reverse=True)

    def tag_last_checkpoint(self, last_filename_basename):
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def load(self, path, checkpointables=None):
        """Loads weights, and the named checkpointables (None: all of this checkpointer).

        Weights of other projects need not match completely: missing and unexpected keys are only logged.

        Returns:
            the rest of the checkpoint, a dict.

        Raises:
            UserError: the file does not exist or is not a checkpoint, or its URL cannot be downloaded. For HierVL's
                checkpoints: a key is missing, unexpected or of another shape, or a checkpointable is missing. For
                weights of other projects: a shape differs, or not a single weight matches.
        """
        self._path = path
        if path and is_url(path):
            address, mark, query = path.partition("?")  # the query is for Detectron2 (matching_heuristics=True)
            path = local_weights(address, "MODEL.WEIGHTS", "set it to '' to train from scratch") + mark + query
        elif path and not os.path.isfile(path):
            raise UserError(f"{path}: no such checkpoint (MODEL.WEIGHTS, or the last_checkpoint of OUTPUT_DIR).")
        self._required = list(self.checkpointables) if checkpointables is None else checkpointables
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # left over by a failed load, it would make Detectron2 refuse the next

    def _load_file(self, path):
        """Reads a file without running code from it, unlike Detectron2, which unpickles .pkl and .pyth files."""
        if path.endswith(".pkl"):
            return _model_zoo_weights(path)
        if path.endswith(".pyth"):
            raise UserError(f"{path}: pycls checkpoints are not supported; save its model_state as a .pth file.")
        return super()._load_file(path)

    def _torch_load(self, path):
        return read_state(path, "MODEL.WEIGHTS")

    def _load_model(self, checkpoint):
        ours = "trainer" in checkpoint
        missing = [key for key in self._required if key not in checkpoint]
        if ours and missing:
            raise UserError(
                f"{self._path}: has no state of {missing[0]!r}, so training cannot be resumed from it; "
                "set MODEL.WEIGHTS to this file to start from its weights."
            )
        names = [key.removeprefix("module.") for key in checkpoint["model"]]
        if not names:
            raise UserError(f"{self._path}: contains no weights.")
        incompatible = super()._load_model(checkpoint)
        if ours:
            _raise_on_mismatch(
                self._path,
                "this config",
                incompatible.missing_keys,
                incompatible.unexpected_keys,
                incompatible.incorrect_shapes,
            )
        elif incompatible.incorrect_shapes:
            _raise_on_mismatch(self._path, "this config", (), (), incompatible.incorrect_shapes)
        elif {name for name, _ in self.model.named_parameters()} <= set(incompatible.missing_keys):
            raise UserError(
                f"{self._path}: none of its {len(names)} weights (such as {names[0]}) exists in the model; "
                "weights of a backbone alone belong in MODEL.BACKBONE.WEIGHTS."
            )
        return incompatible


def _model_zoo_weights(path):
    """Reads a .pkl file of Detectron2's model zoo or of Caffe2's blobs, into the dict that Detectron2 expects."""
    data = read_pickled_arrays(path)
    if "model" not in data or "__author__" not in data:
        blobs = data.get("blobs", data)
        data = {
            "model": {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")},
            "__author__": "Caffe2",
            "matching_heuristics": True,
        }
    invalid = next((name for name, value in data["model"].items() if not is_array(value)), None)
    if invalid is not None:
        raise UserError(f"{path}: {invalid!r} is not an array of numbers; use a checkpoint of Detectron2's model zoo.")
    return data


def damage(path: str) -> str:
    """What is wrong with a checkpoint, or "". It is a zip archive, whose checksums torch.load does not verify."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
    except Exception as error:  # a damaged archive makes zipfile raise errors of many types
        return str(error) or type(error).__name__
    return f"the checksum of {name} is wrong" if name else ""


def read_state(path: str, key: str):
    """torch.load onto the CPU, restricted to tensors and plain containers, with its checksums verified.

    Args:
        path: of the file.
        key: config key that names the file, for error messages.

    Raises:
        UserError: the file does not exist, is damaged, or contains anything else.
    """
    try:
        problem = zipfile.is_zipfile(path) and damage(path)  # files of old versions of torch are no archives
        if problem:
            raise zipfile.BadZipFile(problem)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file ({key}).") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{path}: not a weights file, or damaged ({key}): {(str(error) or 'it is empty').splitlines()[0][:150]}"
        ) from None


def load_strictly(module: torch.nn.Module, path: str, key: str) -> None:
    """Loads a state dict whose keys and shapes must match those of `module`.

    Args:
        module: gets the weights.
        path: of the state dict.
        key: config key that names the file, for error messages.

    Raises:
        UserError: the file cannot be read or does not match. The message names the file, the first key that does not
            match, and the config key.
    """
    _load_matching(module, read_state(path, key), path, key)


def load_network(network: torch.nn.Module, path: str, kind: str = "teacher") -> None:
    """Loads one network of a HierVL checkpoint.

    Args:
        network: gets the weights.
        path: of the checkpoint, or of a plain state dict.
        kind: "teacher" or "student"; without effect if the file has only one network.

    Raises:
        UserError: the file cannot be read or does not match the network.
    """
    state = read_state(path, "MODEL.WEIGHTS")
    name = "teacher" if kind == "teacher" and "teacher" in state else "model"
    _load_matching(network, state.get(name, state), path, "this config")
    if "trained_names" in state:
        TrainedNames(network).load_state_dict(state["trained_names"])


def _load_matching(module, state, path, target):
    """Loads a state dict if it matches `module`, which errors call `target`."""
    expected = module.state_dict()
    shapes = [
        (name, tuple(value.shape), tuple(expected[name].shape))
        for name, value in state.items()
        if name in expected and value.shape != expected[name].shape
    ]
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    _raise_on_mismatch(path, target, missing, unexpected, shapes)
    module.load_state_dict(state)


def _raise_on_mismatch(path, target, missing, unexpected, shapes):
    """Raises UserError on the first mismatch; `shapes` has (name, shape in the file, shape in the model)."""
    if shapes:
        name, file_shape, model_shape = shapes[0]
        raise UserError(
            f"{path}: {name} has shape {file_shape}, but {target} needs {model_shape} "
            f"({len(shapes)} such weights); use the config that the weights were trained with."
        )
    if missing:
        raise UserError(
            f"{path}: {missing[0]} is missing ({len(missing)} such weights) for {target}; "
            "use weights of this architecture."
        )
    if unexpected:
        raise UserError(
            f"{path}: {unexpected[0]} does not exist in {target} ({len(unexpected)} such weights); "
            "use weights of this architecture."
        )
