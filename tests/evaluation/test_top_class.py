"""top_class gives the same results as torch.max, including for ties and NaN."""

import numpy as np
import pytest
import torch

from hiervl.evaluation.top_class import top_class


@pytest.mark.parametrize("classes,dtype", [(1, np.uint8), (2, np.uint8), (256, np.uint8), (300, np.int16)])
def test_equals_torch(classes, dtype):
    scores = torch.rand(classes, 30, 41)
    confidence, prediction = top_class(scores)
    expected = scores.max(0)
    assert prediction.dtype == dtype and torch.equal(confidence, expected.values)
    assert (prediction == expected.indices.numpy()).all()


def test_non_contiguous_scores_with_more_pixels_than_a_block():
    scores = torch.rand(5, 300, 250).bfloat16().transpose(1, 2)
    confidence, prediction = top_class(scores)
    assert torch.equal(confidence, scores.float().amax(0))
    assert torch.equal(scores.float().gather(0, torch.from_numpy(prediction).long()[None])[0], confidence)


def test_ties_go_to_the_first_class():
    scores = torch.tensor([0.2, 0.4, 0.4, 0.1]).view(4, 1, 1).expand(4, 2, 3)
    assert (top_class(scores)[1] == 1).all()


def test_nan_and_infinity_appear_in_the_confidence():
    scores = torch.rand(3, 2, 2)
    scores[1, 0, 0], scores[2, 1, 1] = float("nan"), float("inf")
    confidence = top_class(scores)[0]
    assert confidence[0, 0].isnan() and confidence[1, 1].isinf() and torch.isfinite(confidence).sum() == 2
