"""The CPU kernel against the float64 reference, and its behavior in edge cases."""

import pytest
import torch

from hiervl.ops import ms_deform_attn
from hiervl.ops.function import reference_path
from hiervl.ops.reference import ms_deform_attn_reference
from tests.ops.conftest import Inputs

pytestmark = pytest.mark.usefixtures("kernel")

# Maximum error of the output and of the gradients, relative to the largest element.
TOLERANCE = {torch.float64: (1e-13, 1e-12), torch.float32: (1e-5, 1e-4)}
TOLERANCE |= {torch.float16: (2e-3, 4e-3), torch.bfloat16: (1e-2, 2e-2)}
SWEEP = [
    dict(),
    dict(width=1, points=1),
    dict(width=32, shapes=[(16, 16), (8, 8), (4, 4)], heads=8, points=4, queries=336, batch=1),
    dict(width=20, heads=3),
    dict(width=13, heads=1, points=5),
    dict(width=64, heads=1),
    dict(width=100, shapes=[(5, 7)]),
    dict(points=70, queries=3),  # more sampling points than one block of the kernel holds
    dict(points=64, shapes=[(2, 2)], width=24),
    dict(shapes=[(1, 1), (1, 9), (9, 1), (0, 4), (2, 3)], queries=40),
]


def output_and_gradients(inputs, grad_output):
    leaves = inputs.map(lambda tensor: tensor.detach().clone().requires_grad_())
    output = ms_deform_attn(*leaves.args)
    return [output.detach(), *torch.autograd.grad(output, leaves.tensors, grad_output.to(output.dtype))]


def assert_close(results, expected, dtype):
    for index, (result, target) in enumerate(zip(results, expected, strict=True)):
        limit = TOLERANCE[dtype][min(index, 1)] * max(target.abs().max().item(), 1e-3)
        assert (result.double() - target).abs().max().item() <= limit, f"result {index}"


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request):
    select = torch.ops.hiervl.cpu_instruction_set
    try:
        select(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    select("best")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_reference(make_inputs, instruction_set, dtype):
    for seed, case in enumerate(SWEEP):
        # Round first, so that both paths get the same numbers.
        inputs = make_inputs(**case, seed=seed).map(lambda tensor: tensor.to(dtype))
        exact = inputs.map(torch.Tensor.double)
        grad_output = torch.randn_like(ms_deform_attn_reference(*exact.args)).to(dtype)
        with reference_path():
            expected = output_and_gradients(exact, grad_output.double())
        results = output_and_gradients(inputs, grad_output)
        assert [result.dtype for result in results] == [dtype] * 4
        assert_close(results, expected, dtype)


def test_gradcheck(make_inputs):
    inputs = make_inputs(batch=1, heads=2, width=3, queries=2, points=2)
    leaves = inputs.map(lambda tensor: tensor.requires_grad_())

    def f(value, locations, weights):
        return ms_deform_attn(value, inputs.shapes, inputs.starts, locations, weights)

    assert torch.autograd.gradcheck(f, leaves.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_bitwise_equal_for_any_number_of_threads(make_inputs, dtype):
    inputs = make_inputs(batch=1, heads=2, width=40, queries=200).map(lambda tensor: tensor.to(dtype))
    grad_output = torch.randn(1, 200, 80)
    results = []
    for threads in (
        1,
        2,
        3,
        8,
    ):  # with 8, there are more threads than heads, so heads are split into groups of channels
        torch.set_num_threads(threads)
        results.append(output_and_gradients(inputs, grad_output))
    for multithreaded in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], multithreaded, strict=True))


@pytest.mark.parametrize("value, locations, weights", [
    (torch.float16, torch.float32, torch.float32), (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float64, torch.float16), (torch.float64, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16, torch.float64),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("points", [3, 6])
def test_inputs_may_have_different_types(make_inputs, instruction_set, points, value, locations, weights):
    inputs = make_inputs(queries=50, points=points)
    inputs = Inputs(
        inputs.value.to(value), inputs.shapes, inputs.starts, inputs.locations.to(locations), inputs.weights.to(weights)
    )
    exact = inputs.map(torch.Tensor.double)
    grad_output = torch.randn(2, 50, 16).to(value)
    results = output_and_gradients(inputs, grad_output)
    assert [result.dtype for result in results] == [value, value, locations, weights]
    least_precise = max((value, locations, weights), key=lambda dtype: TOLERANCE[dtype])
    with reference_path():
        assert_close(results, output_and_gradients(exact, grad_output.double()), least_precise)
        same_types = output_and_gradients(inputs, grad_output)
    assert [result.dtype for result in same_types] == [result.dtype for result in results]


def test_non_contiguous_inputs(make_inputs):
    inputs = make_inputs()
    strided = inputs.map(lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1))
    assert not strided.value.is_contiguous()
    expanded = torch.ones((), dtype=torch.float64).expand(2, 7, 16)  # as in sum().backward()
    for result, target in zip(
        output_and_gradients(strided, expanded), output_and_gradients(inputs, expanded.contiguous()), strict=True
    ):
        assert torch.equal(result, target)


@pytest.mark.parametrize(
    "case", [dict(batch=0), dict(queries=0), dict(width=0), dict(heads=0), dict(points=0), dict(shapes=[])], ids=str
)
def test_empty_inputs(make_inputs, case):
    inputs = make_inputs(**case)
    batch, queries, heads = inputs.weights.shape[:3]
    output, *grads = output_and_gradients(inputs, torch.ones(batch, queries, heads * inputs.value.shape[3]))
    assert output.shape == (batch, queries, heads * inputs.value.shape[3])
    assert not output.any() and not any(grad.any() for grad in grads)
    with reference_path():
        leaves = inputs.map(lambda tensor: tensor.requires_grad_())
        expected = ms_deform_attn(*leaves.args)
        expected.sum().backward()
    assert expected.shape == output.shape and all(tensor.grad is not None for tensor in leaves.tensors)


def test_locations_that_are_not_finite_count_as_outside(make_inputs):
    inputs = make_inputs(queries=1, points=3)
    inputs.locations[..., 0, :] = float("nan")
    inputs.locations[..., 1, :] = float("inf")
    inputs.locations[..., 2, :] = -1e300
    output, *grads = output_and_gradients(inputs, torch.ones(2, 1, 16))
    assert not output.any() and not any(grad.any() for grad in grads)


def test_nan_in_values_that_are_not_sampled_has_no_effect(make_inputs):
    inputs = make_inputs(shapes=[(4, 4)])
    inputs.value[:, 8:] = float("nan")  # the lower half
    inputs.locations[..., 1] = inputs.locations[..., 1].clamp(-0.5, 0.2)
    assert output_and_gradients(inputs, torch.ones(2, 7, 16))[0].isfinite().all()


def test_error_names_the_invalid_argument(make_inputs):
    inputs = make_inputs()
    value, shapes, starts, locations, weights = inputs.args
    cases = [
        (TypeError, "value must be float32", (value.long(), shapes, starts, locations, weights)),
        (TypeError, "attention_weights must be float32", (value, shapes, starts, locations, weights.int())),
        (ValueError, "value must be .B, S, H, D.", (value[0], shapes, starts, locations, weights)),
        (ValueError, "sampling_locations must be", (value, shapes, starts, locations[..., :1], weights)),
        (ValueError, "2 spatial shapes, but 1 level", (value, shapes, starts[:1], locations, weights)),
        (ValueError, "does not fit B=2, H=2, L=2", (value, shapes, starts, locations[:, :, :1], weights)),
        (ValueError, "attention_weights must be", (value, shapes, starts, locations, weights[..., :1])),
        (ValueError, "level 1 .6x4 from row 16. does not fit into 39", (value, shapes, [0, 16], locations, weights)),
        (ValueError, "sampling_locations is on meta", (value, shapes, starts, locations.to("meta"), weights)),
    ]
    for error, message, args in cases:
        with pytest.raises(error, match=message):
            ms_deform_attn(*args)


def test_the_registered_operator_also_checks_its_arguments(make_inputs):
    value, _, starts, locations, weights = make_inputs().args
    op = torch.ops.hiervl.ms_deform_attn
    with pytest.raises(RuntimeError, match="does not fit into the 39 rows"):
        op(value, [3, 5, 60, 40], starts, locations, weights)
    with pytest.raises(RuntimeError, match="attention_weights should be"):
        op(value, [3, 5, 6, 4], starts, locations, weights[:, :3])
    with pytest.raises(RuntimeError, match="grad_output should be"):
        torch.ops.hiervl.ms_deform_attn_backward(value, value, [3, 5, 6, 4], starts, locations, weights)


def test_second_derivative_is_refused(make_inputs):
    leaves = make_inputs().map(lambda tensor: tensor.requires_grad_())
    (grad,) = torch.autograd.grad(ms_deform_attn(*leaves.args).square().sum(), leaves.value, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_scratch_memory_is_at_most_the_size_of_the_output(make_inputs):
    """The scratch memory of all threads together does not exceed the output, for any number of queries."""
    torch.set_num_threads(2)
    for queries in (10, 100, 1000, 4000):
        inputs = make_inputs(batch=1, shapes=[(32, 32)], heads=8, width=32, queries=queries, points=16)
        inputs = inputs.map(lambda tensor: tensor.float())
        ms_deform_attn(*inputs.args)
        with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
            output = ms_deform_attn(*inputs.args)
        events = profile.profiler.kineto_results.events()
        sizes = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
        assert output.nbytes in sizes and sum(sizes) <= 2 * output.nbytes + 4096
