"""The attention layer: its parameters, which match Mask2Former, and the effect of its arguments."""

import math

import pytest
import torch

from hiervl.ops import MSDeformAttn

SHAPES, STARTS, ROWS = [(4, 6), (2, 3)], [0, 24], 30


def make_layer(**overrides) -> MSDeformAttn:
    torch.manual_seed(0)
    return MSDeformAttn(**(dict(d_model=16, n_levels=2, n_heads=4, n_points=3) | overrides))


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
    module = make_layer(n_heads=8, d_model=32)
    offsets = module.sampling_offsets.bias.view(8, 2, 3, 2)
    # The eight heads point along the axes and diagonals, and their points are at distances 1, 2 and 3.
    assert torch.allclose(offsets[:, 0, 0], offsets[:, 1, 0]) and torch.allclose(offsets[:, :, 1], 2 * offsets[:, :, 0])
    square = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
    assert torch.allclose(offsets[:, 0, 2], 3.0 * square, atol=1e-5)
    for parameter in (module.sampling_offsets.weight, module.attention_weights.weight, module.attention_weights.bias):
        assert not parameter.any()
    bound = math.sqrt(6 / 64)
    for projection in (module.value_proj, module.output_proj):
        assert 0.8 * bound < projection.weight.abs().max() <= bound and not projection.bias.any()


def test_weights_sum_to_one_over_levels_and_points():
    """If the value is constant and all sampling points are inside, the result is that value."""
    module = make_layer()
    torch.nn.init.zeros_(module.sampling_offsets.bias)
    torch.nn.init.normal_(module.attention_weights.weight)
    memory = torch.ones(1, ROWS, 16)
    reference = torch.full((1, 5, 2, 2), 0.5)
    result = module(torch.randn(1, 5, 16), reference, memory, SHAPES, STARTS)
    assert torch.allclose(result, module.output_proj(module.value_proj(memory[:, :5])), atol=1e-5)


def test_padding_counts_as_zero():
    module, query, memory = make_layer(), torch.randn(2, 5, 16), torch.randn(2, ROWS, 16)
    padding = torch.zeros(2, ROWS, dtype=torch.bool)
    padding[:, 3:9] = True
    result = call(module, query, memory, padding)
    memory[padding] = 1e3
    assert torch.allclose(call(module, query, memory, padding), result)
    assert not torch.allclose(call(module, query, memory), result)


def test_every_parameter_has_a_gradient():
    module, query = make_layer(), torch.randn(2, 5, 16)
    call(module, query, torch.randn(2, ROWS, 16)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())


def test_training_after_inference_mode():
    """A tensor that is first cached in inference mode must be usable in training."""
    module, query, memory = make_layer(), torch.randn(1, 5, 16), torch.randn(1, ROWS, 16)
    with torch.inference_mode():
        call(module, query, memory)
    call(module, query, memory).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_types(dtype):
    module, query, memory = make_layer(), torch.randn(1, 5, 16), torch.randn(1, ROWS, 16)
    expected = call(module, query, memory)
    result = call(module.to(dtype), query.to(dtype), memory.to(dtype))
    assert result.dtype == dtype and torch.allclose(result.float(), expected, atol=5e-2)


def test_autocast():
    module, query, memory = make_layer(), torch.randn(1, 5, 16), torch.randn(1, ROWS, 16)
    expected = call(module, query, memory)
    with torch.autocast("cpu", torch.bfloat16):
        result = call(module, query, memory)
    result.float().sum().backward()
    assert result.dtype == torch.bfloat16 and torch.allclose(result.float(), expected, atol=5e-2)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    module, query, memory = make_layer(), torch.randn(1, 5, 16), torch.randn(1, ROWS, 16)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.allclose(call(compiled, query, memory), call(module, query, memory), atol=1e-6)


def test_error_names_the_mismatched_sizes():
    with pytest.raises(ValueError, match="d_model must be a multiple of n_heads, got 10 and 4"):
        MSDeformAttn(d_model=10, n_heads=4)
    with pytest.raises(ValueError, match="n_levels=3, got 2 spatial shapes"):
        call(make_layer(n_levels=3), torch.randn(1, 5, 16), torch.randn(1, ROWS, 16))
