"""Checkpoints that are whole or absent, and weights that fit or say what does not."""

import contextlib
import os
import pickle
import tempfile
import zipfile

import torch
from detectron2.checkpoint import DetectionCheckpointer

from .download import is_url, local_weights
from .errors import UserError
from .pickled_arrays import is_array, read_pickled_arrays


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "wb"):
    """Open `path` for writing (mode "w" or "wb") such that it is replaced at the end, as a whole, or not at all.

    The content goes to a temporary file in the same folder, is forced to disk, and takes the name by a rename: a
    crash, a full disk or a kill leaves the old file.

    Raises:
        UserError: the file cannot be written (no space, no permission, no such folder).
    """
    try:
        with _replacing(path, mode) as file:
            yield file
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another OUTPUT_DIR."
        ) from error


@contextlib.contextmanager
def _replacing(path, mode):
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=os.path.basename(path) + ".", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    folder_handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(folder_handle)  # the rename itself
    finally:
        os.close(folder_handle)


class TrainedNames:
    """Which class names a network was trained with, as a part of its checkpoint.

    Args:
        networks: they get the names when a checkpoint is loaded (attribute `trained_names`).
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

    `model_best` is not what --resume continues from, so it does not become `last_checkpoint`.
    """

    def save(self, name, **extra):
        """Write `<save_dir>/<name>.pth` (weights, checkpointables, `extra`) and make `last_checkpoint` name it."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {
            "model": self.model.state_dict(),
            **{key: obj.state_dict() for key, obj in self.checkpointables.items()},
            **extra,
        }
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_write(path) as file:
            torch.save(data, file)
        if name != "model_best":
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename):
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def load(self, path, checkpointables=None):
        """Load weights, and the named checkpointables (None: all that the file has).

        Raises:
            UserError: no such file, a URL that cannot be fetched, not a checkpoint; for our own checkpoints, a key that
                is missing, surplus or of another shape, or a checkpointable that is not there. Weights of other
                projects may lack keys: those are listed in the log; that not one of their keys is known is an error.
        """
        self._path = path
        if path and is_url(path):
            address, mark, query = path.partition("?")  # the query is for Detectron2 (matching_heuristics=True)
            path = local_weights(address, "MODEL.WEIGHTS", "set it to '' to train from scratch") + mark + query
        elif path and not os.path.isfile(path):
            raise UserError(f"{path}: no such checkpoint (MODEL.WEIGHTS, or the last_checkpoint of OUTPUT_DIR).")
        self._wanted = list(self.checkpointables) if checkpointables is None else checkpointables
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # a load that failed must not make detectron2 refuse the next one

    def _load_file(self, path):
        """Detectron2 unpickles .pkl files as they are and .pyth files with all that torch.load allows; neither may
        run code here."""
        if path.endswith(".pkl"):
            return _model_zoo_weights(path)
        if path.endswith(".pyth"):
            raise UserError(f"{path}: checkpoints of pycls are not read; save its model_state as a .pth file.")
        return super()._load_file(path)

    def _torch_load(self, path):
        return read_state(path, "MODEL.WEIGHTS")

    def _load_model(self, checkpoint):
        ours = "trainer" in checkpoint
        absent = [key for key in self._wanted if key not in checkpoint]
        if ours and absent:
            raise UserError(
                f"{self._path}: the state of {absent[0]!r} is not in it, so training cannot go on from "
                "here; name it in MODEL.WEIGHTS to start from its weights."
            )
        found = [key.removeprefix("module.") for key in checkpoint["model"]]
        if not found:
            raise UserError(f"{self._path}: holds no weights.")
        incompatible = super()._load_model(checkpoint)
        if ours:
            _raise_on_misfit(
                self._path,
                "this config",
                incompatible.missing_keys,
                incompatible.unexpected_keys,
                incompatible.incorrect_shapes,
            )
        elif incompatible.incorrect_shapes:
            _raise_on_misfit(self._path, "this config", (), (), incompatible.incorrect_shapes)
        elif {name for name, _ in self.model.named_parameters()} <= set(incompatible.missing_keys):
            raise UserError(
                f"{self._path}: none of its {len(found)} weights (such as {found[0]}) has a name that the "
                "model knows; weights of a backbone alone belong in MODEL.BACKBONE.WEIGHTS."
            )
        return incompatible


def _model_zoo_weights(path):
    """What Detectron2 makes of a .pkl file: a checkpoint of its own model zoo, or Caffe2's blobs."""
    data = read_pickled_arrays(path)
    if "model" not in data or "__author__" not in data:
        blobs = data.get("blobs", data)
        data = {
            "model": {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")},
            "__author__": "Caffe2",
            "matching_heuristics": True,
        }
    strange = next((name for name, value in data["model"].items() if not is_array(value)), None)
    if strange is not None:
        raise UserError(
            f"{path}: {strange!r} in it is no array of numbers; it is not a checkpoint of Detectron2's model zoo."
        )
    return data


def read_state(path: str, key: str):
    """torch.load of tensors and plain containers only, onto the CPU. `key`: the config key to name in errors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file ({key}).") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{path}: not a file of weights, or damaged ({key}): {(str(error) or 'it is empty').splitlines()[0][:150]}"
        ) from None


def load_strictly(module: torch.nn.Module, path: str, key: str) -> None:
    """Load a state dict that must fit `module` key by key.

    Raises:
        UserError: names the file, the first key that does not fit, and the config key that chose the file.
    """
    _fit(module, read_state(path, key), path, key)


def load_network(network: torch.nn.Module, path: str, kind: str = "teacher") -> None:
    """Load one network of a HierVL checkpoint, "teacher" or "student"; a file of plain weights has only one.

    Raises:
        UserError: no such file, or it does not fit the network.
    """
    state = read_state(path, "MODEL.WEIGHTS")
    name = "teacher" if kind == "teacher" and "teacher" in state else "model"
    _fit(network, state.get(name, state), path, "this config")
    if "trained_names" in state:
        TrainedNames(network).load_state_dict(state["trained_names"])


def _fit(module, state, path, target):
    own = module.state_dict()
    shapes = [
        (name, tuple(value.shape), tuple(own[name].shape))
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    _raise_on_misfit(path, target, [k for k in own if k not in state], [k for k in state if k not in own], shapes)
    module.load_state_dict(state)


def _raise_on_misfit(path, target, missing, unexpected, shapes):
    if shapes:
        name, found, wanted = shapes[0]
        raise UserError(
            f"{path}: {name} has shape {found}, {target} needs {wanted} "
            f"({len(shapes)} such weights); use the config the weights were made with."
        )
    if missing:
        raise UserError(
            f"{path}: {missing[0]} is missing ({len(missing)} such weights) for {target}; "
            "use weights of this architecture."
        )
    if unexpected:
        raise UserError(
            f"{path}: {unexpected[0]} has no place in {target} ({len(unexpected)} such weights); "
            "use weights of this architecture."
        )
