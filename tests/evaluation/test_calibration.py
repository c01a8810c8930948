"""Calibration metrics against a direct computation over all pixels."""

import math

import numpy as np
import pytest
import torch

from hiervl.evaluation import Calibration


def random_pixels(seed, shape=(61, 83)):
    rng = np.random.default_rng(seed)
    confidence = rng.random(shape).astype(np.float32) ** 0.3
    return torch.from_numpy(confidence), rng.random(shape) < confidence * 0.8, rng.random(shape) < 0.7


def direct_ece(confidence, right, bins=15):
    error = 0.0
    for i in range(bins):
        in_bin = (confidence >= i / bins) & ((confidence < (i + 1) / bins) | (i == bins - 1))
        if in_bin.any():
            error += in_bin.mean() * abs(right[in_bin].mean() - confidence[in_bin].mean())
    return error


def test_ece_and_bins_equal_the_direct_computation():
    calibration, pixels = Calibration(), []
    for seed in range(3):
        confidence, right, valid = random_pixels(seed)
        calibration.update(confidence, right, valid)
        pixels.append((confidence.double().numpy()[valid], right[valid]))
    confidence, right = (np.concatenate(part) for part in zip(*pixels))
    assert calibration.ece() == pytest.approx(direct_ece(confidence, right), abs=2e-5)
    bins = calibration.bins()
    assert sum(b["pixels"] for b in bins) == len(confidence)
    last = confidence >= 14 / 15
    assert bins[-1]["confidence"] == pytest.approx(confidence[last].mean(), abs=2e-5)
    assert bins[-1]["accuracy"] == pytest.approx(right[last].mean())
    above = calibration.above(0.95)
    assert above["kept"] == pytest.approx((confidence >= 0.95).mean())
    assert above["accuracy"] == pytest.approx(right[confidence >= 0.95].mean())


def test_confidences_of_zero_and_one_and_rounding_above_one():
    calibration = Calibration()
    calibration.update(torch.tensor([[0.0, 1.0, 1.0002]]), np.array([[False, True, True]]), np.ones((1, 3), bool))
    assert calibration.ece() == pytest.approx(0, abs=1e-5)
    assert calibration.bins()[0]["pixels"] == 1 and calibration.bins()[-1]["pixels"] == 2


def test_metrics_are_undefined_without_valid_pixels():
    calibration = Calibration()
    calibration.update(torch.rand(3, 4), np.zeros((3, 4), bool), np.zeros((3, 4), bool))
    assert math.isnan(calibration.ece()) and calibration.above(0.5)["kept"] is None


@pytest.mark.parametrize("value", [-0.2, 1.3, math.nan])
def test_values_that_are_not_probabilities_are_refused(value):
    with pytest.raises(ValueError, match="not probabilities"):
        Calibration().update(torch.full((2, 2), value), np.ones((2, 2), bool), np.ones((2, 2), bool))


def test_merging_equals_counting_together():
    together, first, second = Calibration(), Calibration(), Calibration()
    for seed in range(4):
        together.update(*random_pixels(seed))
        (first, second)[seed % 2].update(*random_pixels(seed))
    first.merge(second)
    assert np.array_equal(first.counts, together.counts)
