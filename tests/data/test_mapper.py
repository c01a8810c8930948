import numpy as np
import pytest
import torch
from PIL import Image

from hiervl.data.augmentation import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    cutmix_box,
    strong_view,
)
from hiervl.data.mapper import Geometry, TestMapper, TrainMapper
from hiervl.data.randomness import rng
from hiervl.errors import UserError

from .conftest import coded_image


@pytest.fixture
def coded(tmp_path):
    """A record whose image and label encode the same position: label = x // 2 = red // 4."""
    image = coded_image(100, 120)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image[..., 0] // 4).save(tmp_path / "a_mask.png")
    return {"file_name": str(tmp_path / "a.png"), "sem_seg_file_name": str(tmp_path / "a_mask.png"), "image_id": "a"}


def test_addresses_are_reproducible_and_distinct():
    def draw(*address):
        return tuple(rng(*address).integers(1 << 62, size=4))

    addresses = [(s, i, j, name) for s in (0, 1) for i in range(5) for j in range(5) for name in ("a", "b")]
    assert len({draw(*address) for address in addresses}) == len(addresses)
    assert draw(3, 4, 5, "crop") == draw(3, 4, 5, "crop")
    with pytest.raises(ValueError, match="negative"):
        rng(-1, 0, 0, "a")


@pytest.mark.parametrize("scale", [(0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (0.5, 2.0)])
def test_image_and_label_stay_aligned(coded, scale):
    mapper = TrainMapper((64, 64), scale_range=scale)
    for slot in range(20):
        sample = mapper.labeled(coded, rng(0, 0, slot, "crop"))
        image, label, valid = sample["image"], sample["sem_seg"], sample["valid"]
        assert image.dtype == torch.uint8 and label.dtype == torch.int64 and image.shape == (3, 64, 64)
        # One label step is two source pixels. Resampling may be off by less than that, but without a systematic shift.
        error = (image[0].float() / 4 - label - 0.25)[valid]
        assert error.abs().max() <= 1.0 and abs(error.mean()) < 0.15


def test_padding_is_black_ignored_and_invalid(coded):
    sample = TrainMapper((64, 96), scale_range=(0.5, 0.5)).labeled(coded, rng(0, 0, 0, "crop"))
    valid = sample["valid"]
    assert valid[:50, :60].all() and valid.sum() == 50 * 60
    assert (sample["sem_seg"][~valid] == 255).all() and (sample["sem_seg"][valid] != 255).all()
    assert (sample["image"][:, ~valid] == 0).all()
    strong = TrainMapper((64, 96), scale_range=(0.5, 0.5)).unlabeled(
        coded, rng(0, 0, 0, "crop"), [rng(0, 0, s, "strong") for s in range(8)]
    )
    assert all((view[:, ~valid] == 0).all() for view in strong["strong"])


def test_geometry_covers_scales_positions_and_flips():
    geometries = [Geometry.draw(rng(0, 0, s, "crop"), (100, 120), (64, 64), (0.5, 2.0), 0.5) for s in range(400)]
    scales = np.array([g.scale for g in geometries])
    assert scales.min() < 0.55 and scales.max() > 1.95 and abs(np.mean([g.flip for g in geometries]) - 0.5) < 0.08
    for g in geometries:
        y, x, height, width = g.window
        assert 0 <= y <= 100 - height and 0 <= x <= 120 - width and max(g.size) <= 64
        # Both sides have the same scale, up to rounding to one pixel.
        assert abs(g.size[0] / height - g.scale) < 1 / height * 2 and abs(g.size[1] / width - g.scale) < 1 / width * 2


def test_unlabeled_views_share_the_geometry(coded):
    sample = TrainMapper((64, 64)).unlabeled(coded, rng(0, 1, 2, "crop"), [rng(0, 1, 2, f"s{v}") for v in range(2)])
    assert len(sample["strong"]) == 2 and not torch.equal(*sample["strong"])
    assert "sem_seg" not in sample and "true_sem_seg" not in sample
    with_truth = TrainMapper((64, 64)).unlabeled(coded, rng(0, 1, 2, "crop"), [], with_truth=True)
    assert torch.equal(with_truth["image"], sample["image"])
    assert (with_truth["image"][0].float() / 4 - with_truth["true_sem_seg"])[with_truth["valid"]].abs().max() < 1.3


def test_crop_of_one_class_is_redrawn(tmp_path):
    label = np.zeros((200, 200), np.uint8)
    label[:, 150:] = 1
    Image.fromarray(label).save(tmp_path / "m.png")
    Image.new("RGB", (200, 200)).save(tmp_path / "i.png")
    record = {"file_name": str(tmp_path / "i.png"), "sem_seg_file_name": str(tmp_path / "m.png")}
    fractions = {}  # of crops dominated by one class
    for limit in (1.0, 0.75):
        mapper = TrainMapper((50, 50), scale_range=(1.0, 1.0), cat_max_ratio=limit)
        crops = [mapper.labeled(record, rng(0, 0, s, "crop"))["sem_seg"] for s in range(40)]
        fractions[limit] = np.mean([max((c == 0).float().mean(), (c == 1).float().mean()) > 0.75 for c in crops])
    assert fractions[0.75] < 0.5 * fractions[1.0]


def test_test_samples_keep_their_size_or_are_resized_to_the_short_side(coded):
    whole = TestMapper()(coded)
    assert whole["image"].shape == (3, 100, 120) and (whole["height"], whole["width"]) == (100, 120)
    assert {"file_name", "sem_seg_file_name", "image_id"} <= set(whole)
    small = TestMapper(short_side=50)(coded)
    assert small["image"].shape == (3, 50, 60) and (small["height"], small["width"]) == (100, 120)


@pytest.mark.parametrize("invalid", [{"crop_size": (0, 4)}, {"scale_range": (2.0, 0.5)}, {"cat_max_ratio": 0.0}])
def test_invalid_settings_are_refused(invalid):
    with pytest.raises(UserError, match="INPUT"):
        TrainMapper(**{"crop_size": (8, 8), **invalid})


def test_error_for_a_mask_of_the_wrong_size_names_both_files(coded):
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(coded["sem_seg_file_name"])
    with pytest.raises(UserError, match="a_mask.png is 10x10, its image .*a.png is 120x100"):
        TrainMapper((64, 64)).labeled(coded, rng(0, 0, 0, "crop"))


def test_strong_views_depend_only_on_their_generator():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    before = image.copy()
    np.random.seed(1)
    first = strong_view(image, rng(0, 0, 0, "s"))
    np.random.seed(2)
    assert (strong_view(image, rng(0, 0, 0, "s")) == first).all() and (image == before).all()
    views = [strong_view(image, rng(0, 0, s, "s")) for s in range(50)]
    assert all(v.dtype == np.uint8 and v.shape == image.shape for v in views)
    gray = np.mean([np.ptp(v.astype(int), axis=2).max() <= 2 for v in views])
    unchanged = np.mean([(v == image).all() for v in views])
    assert 0.05 < gray < 0.4 and unchanged < 0.25


def test_color_adjustments_at_neutral_and_extreme_factors():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for adjust in (adjust_brightness, adjust_contrast, adjust_saturation):
        assert (adjust(image, 1) == image).all()
    rounding = abs(adjust_hue(image, 0).astype(int) - image)  # of the 8-bit hue
    assert rounding.max() <= 10 and rounding.mean() < 2
    assert (adjust_brightness(image, 0) == 0).all()
    assert np.ptp(adjust_contrast(image, 0)) == 0
    assert np.ptp(adjust_saturation(image, 0), axis=2).max() == 0
    assert (adjust_hue(np.array([[[255, 0, 0]]], np.uint8), 1 / 3)[0, 0] == [0, 255, 0]).all()


def test_cutmix_boxes_are_inside_the_image_and_have_the_documented_size():
    boxes = [cutmix_box(rng(0, 0, s, "box"), 80, 100, prob=0.5) for s in range(1000)]
    drawn = [b for b in boxes if b is not None]
    assert 0.45 < len(drawn) / 1000 < 0.55
    for y0, x0, y1, x1 in drawn:
        assert 0 <= y0 < y1 <= 80 and 0 <= x0 < x1 <= 100
    area_fractions = np.array([(y1 - y0) * (x1 - x0) / 8000 for y0, x0, y1, x1 in drawn])
    assert area_fractions.min() > 0.01 and area_fractions.max() < 0.42
    tall = np.mean([(b[2] - b[0]) > (b[3] - b[1]) for b in drawn])
    assert 0.4 < tall < 0.6
    assert cutmix_box(rng(0, 0, 0, "box"), 80, 100, prob=0) is None
