"""The CUDA source, executed on the host through simt_shim.h, against the CPU kernel and the reference.

This cannot cover the memory model and arithmetic of a GPU; see test_ops_gpu.py for those.
"""

import ctypes

import pytest
import torch

from hiervl.ops import ms_deform_attn
from hiervl.ops.reference import ms_deform_attn_reference

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # in the order of ScalarType
SWEEP = [
    (dict(), 32),
    (dict(width=1, points=1, queries=3), 64),
    (dict(width=32, shapes=[(8, 8), (4, 4), (2, 2)], heads=2, points=2, queries=20, batch=1), 256),
    (dict(width=20, heads=3, queries=5), 96),
    (dict(width=13, heads=1, points=4), 128),
    (dict(width=70, heads=1, queries=3), 32),
    (dict(shapes=[(1, 1), (1, 9), (9, 1), (0, 4)], queries=11, width=4), 160),
]
BUGS = (
    ("(p.value) + item.value + channel;", "(p.value) + item.value + (channel + N) % p.width;"),
    ("store_as(g.x, p.grad_locations, p.location_type, 2 * place_index);",
     "store_as(g.x, p.grad_locations, p.location_type, 2 * place_index + 1);"),
    ("distance > 0; distance /= 2", "distance > 1; distance /= 2"),
)  # fmt: skip


class HostDevice:
    """Calls the CUDA entry points on host memory."""

    def __init__(self, library: ctypes.CDLL, threads: int, reverse: bool = False) -> None:
        self.library, self.threads = library, threads
        library.simt_reset(int(reverse))

    def _run(self, backward: bool, inputs, output, *grads) -> None:
        levels = [n for start, (h, w) in zip(inputs.starts, inputs.shapes, strict=True) for n in (start, h, w)]
        batch, queries, heads, n_levels, points = inputs.weights.shape
        sizes = [batch, inputs.value.shape[1], heads, inputs.value.shape[3], queries, points, n_levels, *levels]
        types = [TYPES.index(tensor.dtype) for tensor in inputs.tensors]
        arrays = [tensor.data_ptr() for tensor in (*inputs.tensors, output, *grads)] + [None] * (4 - len(grads))
        error = self.library.run(
            int(backward),
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_int * 3)(*types),
            (ctypes.c_void_p * 8)(*arrays),
            self.threads,
        )
        if error:
            raise RuntimeError(error.decode())

    def forward(self, inputs) -> torch.Tensor:
        batch, queries, heads = inputs.weights.shape[:3]
        output = inputs.value.new_full((batch, queries, heads * inputs.value.shape[3]), float("nan"))
        self._run(False, inputs, output)
        return output

    def backward(self, inputs, grad_output) -> list[torch.Tensor]:
        exact = torch.promote_types(inputs.value.dtype, torch.float32)
        grad_value = torch.zeros_like(inputs.value, dtype=exact)
        grads = [torch.full_like(tensor, float("nan")) for tensor in (inputs.locations, inputs.weights)]
        self._run(True, inputs, grad_output, grad_output, grad_value, *grads)
        return [grad_value.to(inputs.value.dtype), *grads]


class OnHost(torch.autograd.Function):
    """The two entry points as one differentiable function, for gradcheck."""

    @staticmethod
    def forward(ctx, device, inputs, *tensors):
        ctx.device, ctx.inputs = device, inputs.map(torch.Tensor.detach)
        ctx.inputs.value, ctx.inputs.locations, ctx.inputs.weights = (t.detach() for t in tensors)
        return device.forward(ctx.inputs)

    @staticmethod
    def backward(ctx, grad_output):
        return None, None, *ctx.device.backward(ctx.inputs, grad_output.contiguous())


def errors(device: HostDevice, inputs, grad_output, expected) -> list[float]:
    """Largest error of the output and of each gradient, relative to the largest element."""
    results = [device.forward(inputs), *device.backward(inputs, grad_output)]
    return [
        ((result.double() - target).abs().max() / target.abs().max().clamp(min=1e-3)).nan_to_num(nan=torch.inf).item()
        for result, target in zip(results, expected, strict=True)
    ]


def expected_results(inputs, grad_output) -> list[torch.Tensor]:
    leaves = inputs.map(lambda tensor: tensor.double().requires_grad_())
    output = ms_deform_attn_reference(*leaves.args)
    return [output.detach(), *torch.autograd.grad(output, leaves.tensors, grad_output.double())]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_equals_the_reference(make_inputs, cuda_on_host, dtype):
    limit = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for seed, (case, threads) in enumerate(SWEEP):
        inputs = make_inputs(**case, seed=seed).map(lambda tensor: tensor.to(dtype))
        batch, queries, heads = inputs.weights.shape[:3]
        grad_output = torch.randn(batch, queries, heads * inputs.value.shape[3]).to(dtype)
        expected = expected_results(inputs, grad_output)
        for reverse in (False, True):
            device = HostDevice(cuda_on_host(), threads, reverse)
            assert max(errors(device, inputs, grad_output, expected)) < limit, case


@pytest.mark.usefixtures("kernel")
def test_equals_the_cpu_kernel(make_inputs, cuda_on_host):
    inputs = make_inputs(width=24, queries=30).map(torch.Tensor.float)
    sizes = [size for shape in inputs.shapes for size in shape]
    rest = (inputs.value, sizes, inputs.starts, inputs.locations, inputs.weights)
    grad_output = torch.randn(2, 30, 48)
    expected = [torch.ops.hiervl.ms_deform_attn(*rest), *torch.ops.hiervl.ms_deform_attn_backward(grad_output, *rest)]
    expected = [tensor.double() for tensor in expected]
    assert max(errors(HostDevice(cuda_on_host(), 128), inputs, grad_output, expected)) < 1e-6


def test_locations_may_be_more_precise_than_value(make_inputs, cuda_on_host):
    inputs = make_inputs(width=16).map(torch.Tensor.float)
    inputs.value = inputs.value.bfloat16()
    grad_output = torch.randn(2, 7, 32).bfloat16()
    relative_errors = errors(HostDevice(cuda_on_host(), 64), inputs, grad_output, expected_results(inputs, grad_output))
    assert max(relative_errors[:2]) < 1e-2 and max(relative_errors[2:]) < 1e-5


def test_gradcheck(make_inputs, cuda_on_host):
    inputs = make_inputs(batch=1, heads=2, width=3, queries=2, points=2)
    leaves = inputs.map(lambda tensor: tensor.requires_grad_())
    device = HostDevice(cuda_on_host(), 32)
    assert torch.autograd.gradcheck(lambda *tensors: OnHost.apply(device, inputs, *tensors), leaves.tensors)


@pytest.mark.parametrize("bug", BUGS, ids=["channel", "location", "shuffle"])
def test_planted_bug_is_detected(make_inputs, cuda_on_host, bug):
    inputs = make_inputs(width=32, queries=3).map(torch.Tensor.float)
    grad_output = torch.randn(2, 3, 64)
    expected = expected_results(inputs, grad_output)
    assert max(errors(HostDevice(cuda_on_host(), 64), inputs, grad_output, expected)) < 1e-5
    assert max(errors(HostDevice(cuda_on_host((bug,)), 64), inputs, grad_output, expected)) > 1e-2


def test_shim_synchronizes_shuffles_and_adds(cuda_on_host):
    library, blocks, threads = cuda_on_host(), 3, 128
    data = torch.randint(-100, 100, (blocks * threads - 5,), dtype=torch.int32)
    for reverse in (0, 1):
        library.simt_reset(reverse)
        by_shared, by_shuffle, by_atomic = (torch.zeros(n, dtype=torch.int32) for n in (blocks, 1, 1))
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (data, by_shared, by_shuffle, by_atomic)]
        library.simt_sum(pointers[0], len(data), blocks, threads, *pointers[1:])
        assert not library.simt_error()
        assert by_shared.sum() == by_shuffle == by_atomic == data.sum()


def test_shim_reports_a_deadlock(cuda_on_host):
    library = cuda_on_host()
    library.simt_reset(0)
    library.simt_stuck()
    assert library.simt_error() == b"deadlock: not every thread reaches __shfl_xor_sync"
    library.simt_reset(0)


@pytest.mark.parametrize("implementation", ["cuda source", "cpu kernel"])
def test_value_with_more_than_2_to_the_31_elements(make_inputs, cuda_on_host, implementation, request):
    """Samples only the last rows of the value, so that only the touched pages use memory."""
    rows, width = 2**15 + 4, 2**16 + 3
    try:
        value = torch.empty(1, rows, 1, width, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("cannot allocate 4 GB of address space")
    assert value.numel() > 2**31
    inputs = make_inputs(batch=1, shapes=[(2, 2)], heads=1, width=1, queries=1, points=1).map(torch.Tensor.bfloat16)
    small = torch.randn(1, 4, 1, width).bfloat16()
    value[:, -4:] = small
    inputs.value, inputs.starts = value, [rows - 4]
    inputs.locations = torch.full_like(inputs.locations, 0.4)
    if implementation == "cuda source":
        output = HostDevice(cuda_on_host(), 128).forward(inputs)
    else:
        request.getfixturevalue("kernel")
        output = ms_deform_attn(*inputs.args)
    expected = ms_deform_attn_reference(
        small.double(), [(2, 2)], [0], inputs.locations.double(), inputs.weights.double()
    )
    assert (output.double() - expected).abs().max() < 1e-2 * expected.abs().max()
