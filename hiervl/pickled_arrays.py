"""Detectron2's .pkl checkpoints, read without running what is in them.

A pickle is a program: unpickling a stranger's file can run any code. The files of Detectron2's and Mask2Former's model
zoos hold dicts of NumPy arrays, and those can be read with a handful of harmless constructors.
"""

import pickle

import numpy as np

from .errors import UserError


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers and arrays; anything else is refused."""

    ALLOWED = {
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"),
    }

    def find_class(self, module, name):
        module = module.replace("numpy.core", "numpy._core")  # numpy 1 wrote the one, numpy 2 has the other
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def read_pickled_arrays(path: str) -> dict:
    """The dict in a .pkl checkpoint of arrays, such as {"model": {name: array}, "__author__": ...}.

    Raises:
        UserError: no such file, damaged, or it holds anything but arrays and plain values.
    """
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint.") from None
    except Exception as error:  # a damaged pickle makes its virtual machine raise nearly anything
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(
            f"{path}: not a pickled checkpoint of arrays, or damaged ({reason}); HierVL reads no other "
            "pickles, since they can run code."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no weights but a {type(content).__name__}.")
    return content


def is_array(value) -> bool:
    """Whether a value of such a dict is an array of numbers."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
