"""The counting operator: its counts, multithreading and argument checks."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("kernel")
IGNORE = 255


def count(*args):
    return torch.ops.hiervl.confusion_counts(*args)


def direct_counts(label, prediction, k, ignore=IGNORE):
    table = torch.zeros(k + 2, k + 1, dtype=torch.int64)
    for truth, predicted in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if 0 <= truth < k:
            row = truth
        else:
            row = k if truth == ignore else k + 1
        column = predicted if 0 <= predicted < k else k
        table[row, column] += 1
    return table


@pytest.mark.parametrize("label_type", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("prediction_type", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("k", [2, 19, 150])
def test_values_in_and_out_of_range_are_counted(k, label_type, prediction_type):
    low = {torch.uint8: 0}
    label = torch.randint(low.get(label_type, -3), 256, (41, 67)).to(label_type)
    prediction = torch.randint(low.get(prediction_type, -3), min(k + 4, 256), (41, 67)).to(prediction_type)
    assert torch.equal(count(label, prediction, k, IGNORE), direct_counts(label, prediction, k))


@pytest.mark.parametrize("k", [256, 300])
def test_more_classes_than_fit_into_8_bits(k):
    label, prediction = torch.randint(0, k + 2, (2, 60, 70))
    label[::5] = 65535
    table = count(label.int(), prediction.short(), k, 65535)
    assert torch.equal(table, direct_counts(label, prediction, k, 65535))


@pytest.mark.parametrize("ignore", [255, 65535, -1, -65281])
@pytest.mark.parametrize("k", [19, 254, 255])
def test_uint8_labels_and_predictions(k, ignore):
    """Up to 254 classes, cell indices have 16 bits. -65281 and 255 have the same lower 16 bits."""
    label, prediction = torch.randint(0, 256, (2, 41, 67), dtype=torch.uint8)
    assert torch.equal(count(label, prediction, k, ignore), direct_counts(label, prediction, k, ignore))


@pytest.mark.parametrize("k", [19, 150])
def test_counts_do_not_depend_on_the_number_of_threads(k):
    label, prediction = torch.randint(0, k, (2, 700_001), dtype=torch.uint8)
    label[::9] = IGNORE
    expected = torch.zeros(256 * 256, dtype=torch.int64)
    expected.scatter_add_(0, label.long() * 256 + prediction.long(), torch.ones(label.numel(), dtype=torch.int64))
    expected = expected.view(256, 256)
    for threads in (1, 2, 5):  # the one_thread fixture restores the number
        torch.set_num_threads(threads)
        table = count(label, prediction, k, IGNORE)
        assert torch.equal(table[:k, :k], expected[:k, :k]) and torch.equal(table[k, :k], expected[IGNORE, :k])
        assert table.sum() == label.numel()


def test_strided_and_empty_inputs():
    label, prediction = torch.randint(0, 3, (2, 30, 40), dtype=torch.uint8)
    assert torch.equal(count(label[::2].T, prediction[::2].T, 3, IGNORE), direct_counts(label[::2], prediction[::2], 3))
    assert not count(label[:0], prediction[:0], 3, IGNORE).any()


def test_invalid_arguments_are_refused():
    label = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="differ in shape"):
        count(label, label[:3], 3, IGNORE)
    with pytest.raises(RuntimeError, match="got Float"):
        count(label, label.float(), 3, IGNORE)
    for classes in (0, 1 << 16):
        with pytest.raises(RuntimeError, match=f"{classes} classes; at most"):
            count(label, label, classes, IGNORE)
