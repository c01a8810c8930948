"""What would make the host wait for a GPU, seen on a CPU."""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Lists the operations that make the host wait for a GPU: those whose result's size or value it needs, and copies.

    `seen`: their names; `places`: where each was called.
    """

    OPERATIONS = ("nonzero", "equal", "_local_scalar_dense", "_unique2", "masked_select", "bincount", "item")

    def __init__(self):
        super().__init__()
        self.seen, self.places, self._copies = [], [], _Copies(self)

    def note(self, name):
        self.seen.append(name)
        ours = [frame for frame in traceback.extract_stack() if "/hiervl/" in frame.filename]
        self.places.append(f"{name}: {ours[-1].filename.split('/hiervl/')[-1]}:{ours[-1].lineno}" if ours else name)

    def __enter__(self):
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.OPERATIONS or by_mask:
            self.note(name)
        return function(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Copies to the host are no operations on a CPU: they are seen one level higher."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.cpu, torch.Tensor.tolist):
            self.waits.note(function.__name__)
        return function(*args, **(kwargs or {}))
