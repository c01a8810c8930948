"""The confusion matrix against counting pixel by pixel, and its metrics against metrics computed from pixel sets."""

import numpy as np
import pytest
import torch

from hiervl.errors import UserError
from hiervl.evaluation import ConfusionMatrix, compute_metrics
from hiervl.ops import extension


@pytest.fixture(params=[True, False], ids=["kernel", "torch"], autouse=True)
def counting_path(request, monkeypatch):
    """Runs each test with the compiled kernel, if it is built, and with the PyTorch path."""
    if not request.param:
        monkeypatch.setitem(extension._loaded, "cpu", False)
    elif not extension.has_kernel("cpu"):
        pytest.skip(f"the CPU kernel is not built: {extension.BUILD_COMMAND}")


def random_maps(k, shape=(37, 53), ignore=255, dtype=np.uint8, absent=(), seed=0, prediction_dtype=np.int64):
    """A label map with ignored pixels, and a prediction that is correct for about half of the pixels."""
    rng = np.random.default_rng(seed)
    present = np.setdiff1d(np.arange(k), absent)
    label = rng.choice(present, shape)
    prediction = np.where(rng.random(shape) < 0.5, label, rng.choice(present, shape))
    label[rng.random(shape) < 0.2] = ignore
    return label.astype(dtype), prediction.astype(prediction_dtype)


def direct_counts(label, prediction, k, ignore):
    counts = np.zeros((k, k), np.int64)
    for truth, predicted in zip(label.ravel().tolist(), prediction.ravel().tolist()):
        if truth != ignore:
            counts[truth, predicted] += 1
    return counts


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize(
    "k, ignore, dtype",
    [
        (1, 255, np.uint8),
        (2, 255, np.uint8),
        (11, 255, np.uint8),
        (19, 200, np.uint8),
        (19, 300, np.uint8),
        (150, 255, np.uint8),
        (255, 255, np.uint8),
        (256, 65535, np.int32),
        (256, 300, np.uint8),
        (300, 65535, np.uint16),
        (300, 65535, np.int32),
        (19, -1, np.int32),
        (1000, 65535, np.int64),
    ],
)
def test_equals_direct_counting(k, ignore, dtype, narrow):
    matrix = ConfusionMatrix(k, ignore)
    prediction_dtype = (np.uint8 if k <= 256 else np.int16) if narrow else np.int64  # narrow: as top_class returns it
    ignore_value = ignore if np.iinfo(dtype).min <= ignore <= np.iinfo(dtype).max else 0
    expected, ignored = np.zeros((k, k), np.int64), 0
    for seed in range(2):
        label, prediction = random_maps(
            k, ignore=ignore_value, dtype=dtype, seed=seed, prediction_dtype=prediction_dtype
        )
        matrix.update(label, prediction)
        expected += direct_counts(label, prediction, k, ignore)
        ignored += int((label.astype(np.int64) == ignore).sum())
    assert np.array_equal(matrix.counts, expected)
    assert matrix.ignored == ignored


@pytest.mark.parametrize("threads", [1, 3])
def test_strided_images_larger_than_a_chunk(threads):
    label, prediction = random_maps(19, shape=(1400, 801))
    label, prediction = label[::2, ::-1], prediction.astype(np.uint8)[::2, ::-1]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    matrix = ConfusionMatrix(19)
    matrix.update(label, prediction)
    torch.set_num_threads(num_threads)
    valid = label != 255
    expected = np.bincount(19 * label[valid].astype(np.int64) + prediction[valid], minlength=19 * 19)
    assert np.array_equal(matrix.counts.ravel(), expected)
    assert matrix.ignored == (~valid).sum()


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (1, 3), (5, 1), (1, 1025), (3, 2049)])
def test_any_number_of_pixels(shape):
    label, prediction = random_maps(2, shape)
    matrix = ConfusionMatrix(2)
    matrix.update(label, prediction)
    assert np.array_equal(matrix.counts, direct_counts(label, prediction, 2, 255))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize("k, invalid", [(3, 5), (3, 3), (3, 254)])
def test_label_out_of_range_names_the_file_and_counts_nothing(dtype, k, invalid):
    label, prediction = random_maps(k, dtype=dtype)
    label[4, 7] = invalid
    matrix = ConfusionMatrix(k)
    with pytest.raises(UserError, match=rf"masks/a\.png: label {invalid} \(1 pixels.*0 to 2.*255") as error:
        matrix.update(label, prediction, "masks/a.png")
    assert "\n" not in str(error.value)
    assert not matrix.counts.any() and matrix.ignored == 0


@pytest.mark.parametrize(
    "dtype, invalid",
    [(np.int32, -1), (np.int32, 2**31 - 1), (np.int64, 2**32 + 1), (np.int64, -(2**63)), (np.uint16, 65534)],
)
def test_label_far_out_of_range(dtype, invalid):
    label = np.zeros((2, 2), dtype)
    label[1] = invalid
    with pytest.raises(UserError, match=rf"label {invalid} \(2 pixels"):
        ConfusionMatrix(3).update(label, np.zeros((2, 2), np.uint8))


def test_ignore_label_must_not_be_a_class():
    with pytest.raises(UserError, match="ignore label 255 is also the id"):
        ConfusionMatrix(256, 255)


@pytest.mark.parametrize(
    "prediction, message",
    [
        (np.full((2, 2), 3), "3 to 3"),
        (np.full((2, 2), -1, np.int16), "-1 to -1"),
        (np.full((2, 2), 2**32), "outside"),
        (np.full((2, 2), 255, np.uint8), "outside"),
        (np.zeros((2, 3), int), "differ in shape"),
    ],
)
@pytest.mark.parametrize("label", [0, 255])
def test_invalid_predictions_raise_value_error(prediction, message, label):
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        matrix.update(np.full((2, 2), label, np.uint8), prediction)
    assert not matrix.counts.any() and matrix.ignored == 0


def test_merging_equals_counting_together():
    maps = [random_maps(7, seed=s) for s in range(4)]
    together, first, second = (ConfusionMatrix(7) for _ in range(3))
    for i, pair in enumerate(maps):
        together.update(*pair)
        (first, second)[i % 2].update(*pair)
    first.merge(second)
    assert np.array_equal(first.counts, together.counts) and first.ignored == together.ignored


def iou_from_sets(label, prediction, k, ignore):
    """IoU by set operations on pixel indices, independent of the matrix. Returns {class: IoU}, truth, predicted."""
    valid = np.flatnonzero(label.ravel() != ignore)
    truth = [set(valid[label.ravel()[valid] == c].tolist()) for c in range(k)]
    predicted = [set(valid[prediction.ravel()[valid] == c].tolist()) for c in range(k)]
    iou = {c: len(truth[c] & predicted[c]) / len(truth[c] | predicted[c]) for c in range(k) if truth[c] | predicted[c]}
    return iou, truth, predicted


@pytest.mark.parametrize("k", [1, 2, 11, 300])
def test_metrics_equal_those_from_pixel_sets(k):
    absent = [2, 5] if k == 11 else []
    label, prediction = random_maps(k, ignore=65535, dtype=np.int32, absent=absent)
    if k == 11:
        prediction[0, :9] = 5  # class 5 is predicted but never labeled: its union is not empty
    matrix = ConfusionMatrix(k, 65535)
    matrix.update(label, prediction)
    metrics = compute_metrics(matrix.counts)
    iou, truth, predicted = iou_from_sets(label, prediction, k, 65535)
    in_truth = [c for c in range(k) if truth[c]]
    total = sum(map(len, truth))
    assert metrics.miou == pytest.approx(100 * np.mean([iou[c] for c in in_truth]))
    assert metrics.miou_union == pytest.approx(100 * np.mean(list(iou.values())))
    assert metrics.miou_all == pytest.approx(100 * sum(iou.values()) / k)
    assert metrics.fwiou == pytest.approx(100 * sum(len(truth[c]) / total * iou[c] for c in in_truth))
    assert metrics.pacc == pytest.approx(100 * sum(len(truth[c] & predicted[c]) for c in range(k)) / total)
    for c in range(k):
        true_positives = len(truth[c] & predicted[c])
        assert metrics.iou[c] == pytest.approx(100 * iou[c] if c in iou else np.nan, nan_ok=True)
        recall = 100 * true_positives / len(truth[c]) if truth[c] else np.nan
        precision = 100 * true_positives / len(predicted[c]) if predicted[c] else np.nan
        assert metrics.recall[c] == pytest.approx(recall, nan_ok=True)
        assert metrics.precision[c] == pytest.approx(precision, nan_ok=True)
    if k == 11:
        assert metrics.iou[5] == 0 and np.isnan(metrics.iou[2])
        assert metrics.miou > metrics.miou_union > metrics.miou_all


def test_the_three_means_on_a_worked_example():
    # class 0: 2 of 3 pixels correct; class 1: 4 of 5, and one false positive; class 2: only predicted; class 3: absent
    counts = np.array([[2, 1, 0, 0], [0, 4, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    metrics = compute_metrics(counts)
    a, b = 2 / 3, 4 / 6
    assert metrics.miou == pytest.approx(100 * (a + b) / 2)
    assert metrics.miou_union == pytest.approx(100 * (a + b) / 3)
    assert metrics.miou_all == pytest.approx(100 * (a + b) / 4)


def test_metrics_without_labeled_pixels_raise_value_error():
    with pytest.raises(ValueError, match="no labeled pixel"):
        compute_metrics(np.zeros((3, 3), np.int64))
