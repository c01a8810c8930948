"""The CUDA kernel on a GPU against the reference in float64 on the CPU. Skipped without a GPU or a built kernel."""

import pytest
import torch

from hiervl.ops import ms_deform_attn
from hiervl.ops.extension import has_kernel
from hiervl.ops.reference import ms_deform_attn_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU found")


@pytest.fixture(autouse=True)
def cuda_kernel():
    if not has_kernel("cuda"):
        pytest.skip("the CUDA kernel is not built: python -m hiervl.ops.build")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [dict(), dict(width=32, heads=8, points=4, queries=100), dict(width=13, heads=3), dict(queries=0)], ids=str
)
def test_equals_the_reference(make_inputs, dtype, case):
    inputs = make_inputs(**case).map(lambda tensor: tensor.to(dtype))
    exact = inputs.map(lambda tensor: tensor.double().requires_grad_())
    device = inputs.map(lambda tensor: tensor.cuda().requires_grad_())
    output, expected = ms_deform_attn(*device.args), ms_deform_attn_reference(*exact.args)
    grad_output = torch.randn_like(expected).to(dtype)
    results = [output, *torch.autograd.grad(output, device.tensors, grad_output.cuda())]
    targets = [expected, *torch.autograd.grad(expected, exact.tensors, grad_output.double())]
    limit = {torch.float32: 1e-4, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    for result, target in zip(results, targets, strict=True):
        assert result.dtype == dtype
        if target.numel():
            assert (result.cpu().double() - target).abs().max() <= limit * target.abs().max().clamp(min=1e-3)


def test_no_call_synchronizes_with_the_device(make_inputs):
    leaves = make_inputs().map(lambda tensor: tensor.float().cuda().requires_grad_())
    ms_deform_attn(*leaves.args).sum().backward()  # loads the kernel, fills the allocator
    torch.cuda.set_sync_debug_mode("error")
    try:
        ms_deform_attn(*leaves.args).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradcheck(make_inputs):
    inputs = make_inputs(batch=1, width=3, queries=2, points=2)
    leaves = inputs.map(lambda tensor: tensor.cuda().requires_grad_())

    def f(value, locations, weights):
        return ms_deform_attn(value, inputs.shapes, inputs.starts, locations, weights)

    assert torch.autograd.gradcheck(f, leaves.tensors, nondet_tol=1e-9)
