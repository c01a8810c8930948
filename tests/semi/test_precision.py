"""Number formats of training: which one is chosen, what is scaled, and when a step is skipped."""

import pytest
import torch

from hiervl.errors import UserError
from hiervl.semi.precision import MixedPrecision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def card(monkeypatch, bfloat16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


@pytest.mark.parametrize("bfloat16, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_bfloat16_where_the_card_has_it(monkeypatch, bfloat16, expected):
    card(monkeypatch, bfloat16)
    assert MixedPrecision(CUDA, True, "auto").dtype == expected
    assert MixedPrecision(CUDA, False, "auto").dtype is None


def test_bfloat16_on_a_card_without_it_is_refused(monkeypatch):
    card(monkeypatch, bfloat16=False)
    with pytest.raises(UserError, match="SOLVER.AMP.DTYPE is bfloat16, but Tesla T4.*auto or float16"):
        MixedPrecision(CUDA, True, "bfloat16")


@pytest.mark.parametrize("enabled, dtype", [(False, "auto"), (True, "bfloat16"), (True, "float16")])
def test_a_step_is_that_of_the_unscaled_gradient(enabled, dtype):
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer, precision = torch.optim.SGD([weight], lr=1.0), MixedPrecision(CPU, enabled, dtype)
    with precision.autocast():
        assert torch.is_autocast_enabled("cpu") == enabled
    precision.backward((weight**2).sum() / 2)
    norm = precision.step(optimizer, [weight], clip_norm=1.0)
    torch.testing.assert_close(norm, torch.tensor(5.0))
    torch.testing.assert_close(weight.data, torch.tensor([3.0 - 0.6, 4.0 - 0.8]))
    assert precision.skipped == 0 and bool(precision.counters()) == (dtype == "float16")


def test_overflow_skips_and_halves_the_scale_until_it_cannot_be_overflow():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, precision = torch.optim.SGD([weight], lr=1.0), MixedPrecision(CPU, True, "float16")
    for i in range(16):
        precision.backward((weight * torch.inf).sum())
        precision.step(optimizer, [weight], clip_norm=1.0)
        assert precision.skipped == i + 1 and precision.scaler.get_scale() == 2.0 ** (15 - i)
        assert weight.tolist() == [1, 1]
        weight.grad = None
    precision.backward((weight * torch.nan).sum())
    with pytest.raises(FloatingPointError):
        precision.step(optimizer, [weight], clip_norm=1.0)
    assert weight.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_without_scaling_a_gradient_that_is_not_finite_is_an_error(dtype):
    weight = torch.nn.Parameter(torch.ones(2))
    precision = MixedPrecision(CPU, True, dtype)
    precision.backward((weight * torch.nan).sum())
    with pytest.raises(FloatingPointError):
        precision.step(torch.optim.SGD([weight], lr=1.0), [weight], clip_norm=1.0)


def test_state_of_another_number_format_is_left_out():
    scaled, plain = MixedPrecision(CPU, True, "float16"), MixedPrecision(CPU, False, "auto")
    scaled.load_state_dict(plain.state_dict())
    assert scaled.scaler.get_scale() == 65536
    plain.load_state_dict({"scaler": scaled.scaler.state_dict(), "skipped": 3})
    assert plain.skipped == 3 and plain.counters() == {}
