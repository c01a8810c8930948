"""The PyTorch path against loops that follow the definition, and against recorded results of Mask2Former."""

import math
from pathlib import Path

import pytest
import torch

from hiervl.ops import ms_deform_attn
from hiervl.ops.function import reference_path
from hiervl.ops.reference import ms_deform_attn_reference

PARITY = Path(__file__).parents[3] / "shared" / "parity" / "mask2former.pt"


def loop_reference(inputs):
    """The definition, with one Python iteration per sampling point. Returns (B, Q, H*D)."""
    value, shapes, starts, locations, weights = inputs.args
    batch, queries, heads, levels, points = weights.shape
    output = value.new_zeros(batch, queries, heads, value.shape[3])
    for b, q, h, level, p in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
        height, width = shapes[level]
        x = locations[b, q, h, level, p, 0].item() * width - 0.5
        y = locations[b, q, h, level, p, 1].item() * height - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    weight = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[b, q, h, level, p]
                    output[b, q, h] += weight * value[b, starts[level] + row * width + column, h]
    return output.flatten(2)


def test_equals_the_definition(make_inputs):
    inputs = make_inputs()
    assert torch.allclose(ms_deform_attn_reference(*inputs.args), loop_reference(inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["reference", "kernel"])
def test_equals_mask2former(path, request):
    if not PARITY.exists():
        pytest.skip("../shared/parity/mask2former.pt does not exist")
    if path == "kernel":
        request.getfixturevalue("kernel")
    recorded = torch.load(PARITY, weights_only=True)["op"]
    names = ("value", "sampling_locations", "attention_weights")
    value, locations, weights = (recorded[name].clone().requires_grad_() for name in names)
    shapes = recorded["spatial_shapes"]
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    if path == "reference":
        with reference_path():
            output = ms_deform_attn(value, shapes, starts, locations, weights)
    else:
        output = ms_deform_attn(value, shapes, starts, locations, weights)
    output.backward(recorded["grad_output"])
    assert torch.allclose(output, recorded["output"], rtol=0, atol=1e-10)
    for name, tensor in zip(names, (value, locations, weights), strict=True):
        assert torch.allclose(tensor.grad, recorded[f"grad_{name}"], rtol=0, atol=1e-10), name
