"""What the checks compare with: differences are found, and counted by hand."""

import math

import pytest
import torch

from tools.gpu_check import networks, parity, resume, timing
from tools.gpu_check.findings import Settings


def test_the_worst_difference_is_found():
    errors = parity.loss_errors({"a": 1.1, "b": 2.0, "c": 1e-4}, {"a": 1.0, "b": 2.0, "c": 0.0})
    assert errors == pytest.approx({"a": 0.1, "b": 0.0, "c": 0.01})  # a loss near zero counts by itself
    assert parity.worst(errors)[0] == "a"
    name, error = parity.worst(errors | {"b": math.nan})
    assert name == "b" and math.isnan(error)


def test_gradients_are_compared_part_by_part():
    expected = {"backbone.x": torch.tensor([3.0, 0.0]), "backbone.y": torch.tensor([4.0]), "decoder.x": torch.ones(2)}
    other = expected | {"backbone.x": torch.tensor([3.0, 0.5])}
    assert parity.gradient_errors(other, expected) == pytest.approx({"backbone": 0.1, "decoder": 0.0})


def test_lost_state_is_found():
    saved = {"weight": torch.ones(2), "groups": [{"lr": 0.1}, {"lr": 0.2}], "updates": 3}
    assert resume.differences(saved, saved) == []
    assert resume.differences(saved | {"weight": torch.zeros(2)}, saved) == [".weight"]
    assert resume.differences(saved | {"groups": [{"lr": 0.1}, {"lr": 0.3}], "updates": 0}, saved) == [
        ".groups[1].lr",
        ".updates",
    ]
    assert resume.differences({"weight": torch.ones(2)}, saved) and resume.differences([1], [1, 2]) == [""]


def test_draws_do_not_depend_on_the_device():
    rand, drawn = torch.rand, []
    for device in ("cpu", "meta"):  # meta draws nothing by itself
        torch.manual_seed(0)
        with networks.drawn_on_the_cpu():
            points, indices = torch.rand(2, 3, device=device), torch.randint(4, (5,), device=device)
            assert points.device.type == indices.device.type == device and points.shape == (2, 3)
            drawn.append(torch.bernoulli(torch.full((20,), 0.5)))
    assert torch.equal(*drawn) and torch.rand is rand


def test_work_that_does_not_fit_is_told_from_other_errors():
    def work(error):
        raise error

    assert timing.fits(lambda: None)
    assert not timing.fits(lambda: work(torch.cuda.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(ValueError):
        timing.fits(lambda: work(ValueError()))


def test_times_are_medians_of_a_call(tmp_path):
    settings, calls = Settings("cpu", tmp_path), []
    times = timing.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, settings)
    assert set(times) == {"a", "b"} and all(ms >= 0 for ms in times.values())
    assert calls == ["a", "b", "a", "b"]  # once to warm up, once timed, in turns
