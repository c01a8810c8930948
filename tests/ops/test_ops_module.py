"""The attention layer: parameters of Mask2Former, and what its arguments do."""

import math

import pytest
import torch

from hiervl.ops import MSDeformAttn

SHAPES, STARTS, ROWS = [(4, 6), (2, 3)], [0, 24], 30


def layer(**changes) -> MSDeformAttn:
    torch.manual_seed(0)
    return MSDeformAttn(**(dict(d_model=16, n_levels=2, n_heads=4, n_points=3) | changes))


def call(module, query, memory, padding=None):
    reference = torch.rand(query.shape[0], query.shape[1], 2, 2, generator=torch.Generator().manual_seed(0))
    return module(query, reference.to(query), memory, SHAPES, STARTS, padding)


def test_parameters_are_those_of_mask2former():
    shapes = {name: tuple(tensor.shape) for name, tensor in MSDeformAttn().state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }


def test_initial_values():
    module = layer(n_heads=8, d_model=32)
    offsets = module.sampling_offsets.bias.view(8, 2, 3, 2)
    # Eight heads look along the sides and diagonals of a square, the points at distance 1, 2, 3.
    assert torch.allclose(offsets[:, 0, 0], offsets[:, 1, 0]) and torch.allclose(offsets[:, :, 1], 2 * offsets[:, :, 0])
    square = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
    assert torch.allclose(offsets[:, 0, 2], 3.0 * square, atol=1e-5)
    for zero in (module.sampling_offsets.weight, module.attention_weights.weight, module.attention_weights.bias):
        assert not zero.any()
    bound = math.sqrt(6 / 64)
    for projection in (module.value_proj, module.output_proj):
        assert 0.8 * bound < projection.weight.abs().max() <= bound and not projection.bias.any()


def test_weights_sum_to_one_over_levels_and_points():
    """With constant value and all places inside, the result is that value."""
    module = layer()
    torch.nn.init.zeros_(module.sampling_offsets.bias)
    torch.nn.init.normal_(module.attention_weights.weight)
    memory = torch.ones(1, ROWS, 16)
    reference = torch.full((1, 5, 2, 2), 0.5)
    result = module(torch.randn(1, 5, 16), reference, memory, SHAPES, STARTS)
    assert torch.allclose(result, module.output_proj(module.value_proj(memory[:, :5])), atol=1e-5)


def test_padding_counts_as_zero():
    module, query, memory = layer(), torch.randn(2, 5, 16), torch.randn(2, ROWS, 16)
    padding = torch.zeros(2, ROWS, dtype=torch.bool)
    padding[:, 3:9] = True
    result = call(module, query, memory, padding)
    memory[padding] = 1e3
    assert torch.allclose(call(module, query, memory, padding), result)
    assert not torch.allclose(call(module, query, memory), result)


def test_every_parameter_has_a_gradient():
    module, query = layer(), torch.randn(2, 5, 16)
    call(module, query, torch.randn(2, ROWS, 16)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())


def test_training_after_inference_mode():
    """Shapes first seen in inference mode must not leave tensors behind that training cannot use."""
    module, query, memory = layer(), torch.randn(1, 5, 16), torch.randn(1, ROWS, 16)
    with torch.inference_mode():
        call(module, query, memory)
    call(module, query, memory).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_types(dtype):
    module, query, memory = layer(), torch.randn(1, 5, 16), torch.randn(1, ROWS, 16)
    expected = call(module, query, memory)
    result = call(module.to(dtype), query.to(dtype), memory.to(dtype))
    assert result.dtype == dtype and torch.allclose(result.float(), expected, atol=5e-2)


def test_autocast():
    module, query, memory = layer(), torch.randn(1, 5, 16), torch.randn(1, ROWS, 16)
    expected = call(module, query, memory)
    with torch.autocast("cpu", torch.bfloat16):
        result = call(module, query, memory)
    result.float().sum().backward()
    assert result.dtype == torch.bfloat16 and torch.allclose(result.float(), expected, atol=5e-2)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    module, query, memory = layer(), torch.randn(1, 5, 16), torch.randn(1, ROWS, 16)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.allclose(call(compiled, query, memory), call(module, query, memory), atol=1e-6)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="d_model must be a multiple of n_heads, got 10 and 4"):
        MSDeformAttn(d_model=10, n_heads=4)
    with pytest.raises(ValueError, match="n_levels=3, got 2 spatial shapes"):
        call(layer(n_levels=3), torch.randn(1, 5, 16), torch.randn(1, ROWS, 16))
