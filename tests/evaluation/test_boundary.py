"""Boundary IoU against its definition, computed mask by mask with SciPy's erosion."""

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from hiervl.evaluation.boundary import BoundaryIoU, boundary_region


def blobs(shape, k, seed):
    """A random map of ids (H, W) that consists of regions rather than noise."""
    noise = np.random.default_rng(seed).random((k, shape[0] // 8 + 1, shape[1] // 8 + 1))
    return noise.repeat(8, axis=1).repeat(8, axis=2)[:, : shape[0], : shape[1]].argmax(0)


def outline(mask, distance):
    return mask & ~binary_erosion(mask, np.ones((3, 3), bool), iterations=distance, border_value=0)


@pytest.mark.parametrize("k, dtype", [(4, np.uint8), (300, np.int32)])
def test_equals_the_definition(k, dtype):
    boundary_iou, counts = BoundaryIoU(k, 255 if k < 256 else 65535), np.zeros((3, k), int)
    for seed, shape in enumerate([(60, 90), (33, 47), (120, 41)]):
        label, prediction = (blobs(shape, k, 2 * seed + i).astype(dtype) for i in (0, 1))
        correct = np.random.default_rng(seed).random(shape)[:: shape[0]] < 0.7  # (1, W): correct columns
        prediction = np.where(correct, label, prediction)
        label[:9, 5:20] = boundary_iou.ignore_label
        boundary_iou.update(label, prediction)
        distance, valid = round(0.02 * np.hypot(*shape)), label != boundary_iou.ignore_label
        for c in range(k):
            truth, predicted = (outline((ids == c) & valid, distance) for ids in (label, prediction))
            counts[:, c] += (truth & predicted).sum(), truth.sum(), predicted.sum()
    assert np.array_equal([boundary_iou.shared, boundary_iou.truth, boundary_iou.predicted], counts)
    union = counts[1] + counts[2] - counts[0]
    expected = [100 * s / u if u else np.nan for s, u in zip(counts[0], union)]
    np.testing.assert_allclose(boundary_iou.iou(), expected)
    assert boundary_iou.mean() == pytest.approx(np.mean([e for e, t in zip(expected, counts[1]) if t]))


def test_is_sensitive_to_outline_errors_that_barely_change_iou():
    label = np.zeros((200, 200), np.uint8)
    label[20:180, 20:180] = 1
    shifted = np.roll(label, 3, axis=1)
    boundary_iou = BoundaryIoU(2)
    boundary_iou.update(label, shifted)
    iou = 100 * (label & shifted).sum() / (label | shifted).sum()
    assert boundary_iou.iou()[1] < 70 < 95 < iou


def test_perfect_prediction_absent_class_and_small_image():
    boundary_iou = BoundaryIoU(3)
    label = np.array([[0, 0, 1], [0, 255, 1]], np.uint8)
    boundary_iou.update(label, np.array([[0, 0, 1], [0, 1, 1]], np.uint8))
    assert boundary_iou.iou()[:2].tolist() == [100, 100] and np.isnan(boundary_iou.iou()[2])
    assert boundary_iou.mean() == 100
    assert np.isnan(BoundaryIoU(2).mean())
    assert boundary_region(np.zeros((9, 9), np.uint8), 2).sum() == 81 - 25
