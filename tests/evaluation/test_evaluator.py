"""The evaluator end to end, from label files to metrics and result file, on one rank or two."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.evaluation import print_csv_format
from PIL import Image

from hiervl.errors import UserError
from hiervl.evaluation import SegmentationEvaluator, load_result
from hiervl.evaluation.evaluator import RESULT_FILE
from hiervl.evaluation import evaluator as evaluator_module

NAMES = ("sky", "road", "pole", "car")


def write_mask(path, label):
    Image.fromarray(label.astype(np.uint8 if label.max() < 256 else np.uint16)).save(path)
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    """Three images of different sizes: [(input dict, output dict, label)]; "car" occurs nowhere."""
    rng = np.random.default_rng(0)
    pairs = []
    for i, (h, w) in enumerate([(20, 30), (17, 9), (8, 8)]):
        label = rng.integers(0, 3, (h, w))
        label[0, :3] = 255
        scores = torch.rand(4, h, w, generator=torch.Generator().manual_seed(i))
        path = write_mask(tmp_path / f"{i}.png", label)
        pairs.append(({"sem_seg_file_name": path}, {"sem_seg": scores / (0.01 + scores.sum(0))}, label))
    return pairs


def run(pairs, **kwargs):
    evaluator = SegmentationEvaluator(NAMES, **kwargs)
    for image, output, _ in pairs:
        evaluator.process([image], [output])
    return evaluator


def test_metrics_and_result_file(pairs, tmp_path):
    evaluator = run(pairs, output_dir=str(tmp_path / "new" / "folder"), num_images=3)
    metrics = evaluator.evaluate()["sem_seg"]
    num_correct = sum(int((out["sem_seg"].argmax(0).numpy() == label)[label != 255].sum()) for _, out, label in pairs)
    pixels = sum(int((label != 255).sum()) for *_, label in pairs)
    assert metrics["pACC"] == pytest.approx(100 * num_correct / pixels)
    assert list(metrics) == ["mIoU", "mIoU_union", "mIoU_all", "fwIoU", "pACC", "ECE", *(f"IoU-{n}" for n in NAMES)]
    assert metrics["mIoU"] == pytest.approx(np.mean([metrics[f"IoU-{n}"] for n in NAMES[:3]]))
    assert metrics["IoU-car"] == 0 and metrics["mIoU_all"] < metrics["mIoU"]
    result = load_result(str(tmp_path / "new" / "folder" / RESULT_FILE))
    assert result == evaluator.result
    assert np.sum(result["confusion_matrix"]) == result["pixels"] == pixels
    assert result["images"] == 3 and set(result["metrics"]) <= set(result["definitions"])
    print_csv_format({"sem_seg": metrics})


def test_undefined_metrics_are_nan_for_callers_and_null_in_the_file(pairs, tmp_path):
    for _, output, _ in pairs:
        output["sem_seg"][3] = 0
    evaluator = run(pairs, output_dir=str(tmp_path))
    assert math.isnan(evaluator.evaluate()["sem_seg"]["IoU-car"])
    with open(tmp_path / RESULT_FILE) as file:
        assert json.load(file)["per_class"]["iou"][3] is None


def test_two_ranks_equal_one(pairs, monkeypatch):
    expected = run(pairs).evaluate()
    first, second = (run(part, num_images=3) for part in (pairs[:1], pairs[1:]))
    sent = []

    def gather_on(rank):
        def gather(part):
            sent.append(part)
            return sent if rank == 0 else []

        monkeypatch.setattr(evaluator_module.comm, "gather", gather)
        monkeypatch.setattr(evaluator_module.comm, "is_main_process", lambda: rank == 0)

    gather_on(1)
    assert second.evaluate() is None
    gather_on(0)
    assert first.evaluate() == expected and first.result["images"] == 3


def test_image_counted_twice_is_reported(pairs):
    with pytest.raises(UserError, match="4 images were scored instead of 3"):
        run([*pairs, pairs[0]], num_images=3).evaluate()


def test_reset_discards_counts(pairs):
    evaluator = run(pairs)
    evaluator.reset()
    with pytest.raises(UserError, match="no labeled pixel in 0 images"):
        evaluator.evaluate()


def test_many_classes_in_a_16_bit_mask(tmp_path):
    label = np.arange(300).reshape(15, 20)
    label[0, 0] = 65535
    path = write_mask(tmp_path / "wide.png", label)
    scores = torch.nn.functional.one_hot(torch.arange(300).view(15, 20), 300).permute(2, 0, 1).float()
    evaluator = SegmentationEvaluator([f"class {i}" for i in range(300)], ignore_label=65535)
    evaluator.process([{"sem_seg_file_name": path}], [{"sem_seg": scores}])
    metrics = evaluator.evaluate()["sem_seg"]
    assert (
        metrics["mIoU"] == 100
        and math.isnan(metrics["IoU-class 0"])
        and metrics["mIoU_all"] == pytest.approx(29900 / 300)
    )


def break_label(image, output, label):
    label[3, 3] = 77
    write_mask(image["sem_seg_file_name"], label)


def break_size(image, output, label):
    output["sem_seg"] = output["sem_seg"][:, :-1]


def break_scores(image, output, label):
    output["sem_seg"][1, 2, 2] = math.nan


def break_file(image, output, label):
    with open(image["sem_seg_file_name"], "r+b") as file:
        file.truncate(60)


@pytest.mark.parametrize(
    "breaking, words",
    [
        (break_label, "label 77"),
        (break_size, "20 x 30 .* 19 x 30"),
        (break_scores, "not finite"),
        (break_file, "decode"),
    ],
)
def test_error_for_a_bad_image_is_one_line_that_names_its_file(pairs, breaking, words):
    breaking(*pairs[0])
    with pytest.raises(UserError, match=words) as error:
        run(pairs)
    assert "0.png" in str(error.value) and "\n" not in str(error.value)


def test_error_for_a_missing_mask_names_the_image():
    with pytest.raises(UserError, match="x.jpg: no label map"):
        SegmentationEvaluator(NAMES).process([{"file_name": "x.jpg"}], [{"sem_seg": torch.rand(4, 2, 2)}])


def test_scores_need_not_be_probabilities_without_calibration(pairs):
    for _, output, _ in pairs:
        output["sem_seg"] = 50 * output["sem_seg"] - 10
    assert "ECE" not in run(pairs, calibration=False).evaluate()["sem_seg"]
    with pytest.raises(ValueError, match="not probabilities"):
        run(pairs)


def test_scores_of_some_classes_equal_those_of_all_with_zeros(pairs):
    """Positions in `classes` are not class ids: here they are in another order."""
    classes = torch.tensor([2, 0, 1])
    for _, output, _ in pairs:
        output["sem_seg"][3] = 0
    every = run(pairs)
    selected = [(image, {"sem_seg": out["sem_seg"][classes], "classes": classes}, label) for image, out, label in pairs]
    expected, metrics = every.evaluate()["sem_seg"], run(selected).evaluate()["sem_seg"]
    assert metrics == pytest.approx(expected, nan_ok=True)
    assert every.result["metrics"]["pACC"] > 0


def test_calibration_is_in_percent_and_without_ignored_pixels(tmp_path):
    """Of the 8 pixels with a label 6 are right, at a confidence of 0.5."""
    label = np.zeros((2, 6), np.int64)
    label[0, :2], label[:, 4:] = 1, 255
    path = write_mask(tmp_path / "label.png", label)
    probabilities = torch.full((4, 2, 6), 0.1)
    probabilities[0] = 0.5
    evaluator = run([({"sem_seg_file_name": path}, {"sem_seg": probabilities}, label)])
    assert evaluator.evaluate()["sem_seg"]["ECE"] == pytest.approx(25, abs=0.01)


def test_boundary_miou_is_over_the_classes_in_the_ground_truth(tmp_path):
    """Class 3 is predicted and never true; it does not lower the mean."""
    label = np.zeros((20, 20), np.int64)
    label[:, 10:] = 1
    path = write_mask(tmp_path / "label.png", label)
    scores = torch.nn.functional.one_hot(torch.from_numpy(label), 4).permute(2, 0, 1).float()
    scores[:, 5, 5] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    evaluator = run([({"sem_seg_file_name": path}, {"sem_seg": scores}, label)], boundary=True)
    metrics = evaluator.evaluate()["sem_seg"]
    per_class = evaluator.result["per_class"]["boundary_iou"]
    assert per_class[3] == 0 and per_class[2] is None
    assert metrics["boundary_mIoU"] == pytest.approx((per_class[0] + per_class[1]) / 2) and per_class[0] > 50
