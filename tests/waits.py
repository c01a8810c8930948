"""What would make the host wait for a GPU, seen on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU."""

    OPERATIONS = ("nonzero", "equal", "_local_scalar_dense", "_unique2", "masked_select", "bincount", "item")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.OPERATIONS or by_mask:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))
