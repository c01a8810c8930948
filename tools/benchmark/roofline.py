"""How far a piece of work is from what the machine allows: its operations and bytes against measured rates.

Each call of an operator takes at least the time in which its arrays can be copied, or its multiplications be done at
the speed of a large matrix product, whichever is longer. The sum over calls is a bound for this sequence of operators;
the operations alone are a bound for any sequence.
"""

from collections.abc import Callable

from tools.benchmark import common
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hiervl import ops  # noqa: F401  (registers the operator)


def _attention_flops(query, key, value, *args, **kwargs) -> int:
    """Scores and weighted sum: (B, h, Q, d), (B, h, S, d)."""
    batch, heads, queries, width = query.shape
    return 4 * batch * heads * queries * key.shape[2] * width


def _deformable_flops(value, shapes, starts, locations, weights, *args) -> int:
    """Four corners of a multiplication and an addition per place and channel."""
    return 8 * weights.numel() * value.shape[3]


# What torch's own table of operations leaves out. Backward: twice, and the scores once more.
EXTRA_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *a, **k: _attention_flops(*a),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, *a, **k: 5 * _attention_flops(*a) // 2,
    torch.ops.hiervl.ms_deform_attn: lambda *a, **k: _deformable_flops(*a),
    torch.ops.hiervl.ms_deform_attn_backward: lambda grad, *a, **k: 2 * _deformable_flops(*a),
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts, for each operator called within it: calls, operations, bytes read and written.

    Args:
        copy_rate: bytes per second. gemm_rate: operations per second.

    Attributes:
        rows: name -> [calls, operations, bytes, least seconds].
    """

    def __init__(self, copy_rate: float, gemm_rate: float):
        super().__init__()
        self.copy_rate, self.gemm_rate = copy_rate, gemm_rate
        self.rows: dict[str, list[float]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.is_view or function in (torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default):
            return result
        packet = function._overloadpacket
        operations = 0
        if packet in EXTRA_FLOPS:
            operations = EXTRA_FLOPS[packet](*args, **kwargs)
        elif packet in flop_registry:
            operations = flop_registry[packet](*args, **kwargs, out_val=result)
        moved = sum(_bytes(x) for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
        row = self.rows.setdefault(str(packet), [0, 0, 0, 0.0])
        seconds = max(moved / self.copy_rate, operations / self.gemm_rate)
        for i, value in enumerate((1, operations, moved, seconds)):
            row[i] += value
        return result

    def total(self, column: int) -> float:
        """Sum of a column of `rows` over all operators."""
        return sum(row[column] for row in self.rows.values())


def _bytes(tensor: torch.Tensor) -> int:
    """Memory behind a tensor: an expanded dimension is read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def count(work: Callable[[], object], facts: dict) -> Traffic:
    """Run `work` once and count."""
    with Traffic(facts["copy_gbytes"] * 1e9, facts["gemm_gflops"] * 1e9) as traffic:
        work()
    return traffic


def roofline(work: dict[str, Callable[[], object]], facts: dict, rounds: int) -> list[dict]:
    """One row for each piece of work."""
    times = common.interleave(work, rounds)
    rows = []
    for name, function in work.items():
        traffic, measured = count(function, facts), common.median_ms(times[name])
        compute_ms = traffic.total(1) / facts["gemm_gflops"] / 1e6
        rows.append(
            {
                "work": name,
                "GFLOP": traffic.total(1) / 1e9,
                "GB": traffic.total(2) / 1e9,
                "operations at GEMM's rate ms": compute_ms,
                "operator by operator ms": traffic.total(3) * 1e3,
                "measured ms": measured,
                "measured / roofline": measured / (traffic.total(3) * 1e3),
            }
        )
    return rows
