"""Label maps cut into segments, and the same in terms of kept classes."""

import cv2
import numpy as np
import pytest
import torch

from hiervl.errors import UserError
from hiervl.losses.targets import TargetBuilder, build_targets
from tools.gpu_check.waits import Waits


def test_targets_among_kept_names():
    """Of six names the first four are classes; 3 is unknown, 4 and 5 are distractors: absent for certain."""
    sem_seg = torch.zeros(1, 4, 4, dtype=torch.long)
    sem_seg[0, 0] = 2
    targets = build_targets(sem_seg, torch.ones(1, 4, 4), 4, unknown=torch.tensor([[False, False, False, True]]))
    kept = targets.restrict_to(torch.tensor([[5, 2, 3, 0]]), 6)
    assert kept.sem_seg[0, 0].unique().item() == 1 and kept.sem_seg[0, 1:].unique().item() == 3
    assert kept.present.tolist() == [[False, True, False, True]]
    assert kept.absent.tolist() == [[True, False, False, False]]
    assert kept.labels[0].tolist() == [3, 1]
    assert (kept.segments == targets.segments).all()


def test_components():
    sem_seg = torch.zeros(1, 32, 32, dtype=torch.long)
    sem_seg[0, 2:10, 2:10] = 1
    sem_seg[0, 20:30, 20:30] = 1
    sem_seg[0, 15, 15] = 1  # smaller than min_area
    targets = build_targets(sem_seg, torch.ones(1, 32, 32), 2, segments="components", min_area=9)
    assert targets.labels[0].tolist() == [0, 1, 1]
    assert targets.segments[0, 15, 15] == -1
    assert targets.segments[0, 5, 5] != targets.segments[0, 25, 25]
    whole = build_targets(sem_seg, torch.ones(1, 32, 32), 2)
    assert whole.labels[0].tolist() == [0, 1]


def test_instances():
    """Things are single objects, stuff a region, and a thing's pixel without a number is unknown."""
    sem_seg = torch.zeros(1, 8, 8, dtype=torch.long)  # class 0 is stuff, 1 and 2 are things
    sem_seg[0, :2, :4], sem_seg[0, 4:, 4:], sem_seg[0, 7, 0] = 1, 2, 1
    numbers = torch.zeros_like(sem_seg)
    numbers[0, :2, :2], numbers[0, :2, 2:4], numbers[0, 4:, 4:] = 1, 2, 2  # 2 is used for two classes
    targets = build_targets(sem_seg, torch.ones(1, 8, 8), 3, segments="instances", instances=numbers, things=(1, 2))
    assert targets.labels[0].tolist() == [0, 2, 1, 1]  # largest first
    assert targets.segments[0, 0].tolist() == [2, 2, 3, 3, 0, 0, 0, 0]
    assert targets.segments[0, 7, 0] == -1 and (targets.segments[0, 4:, 4:] == 1).all()
    few = build_targets(
        sem_seg, torch.ones(1, 8, 8), 3, segments="instances", instances=numbers, things=(1, 2), max_segments=1
    )
    assert few.labels[0].tolist() == [0] and (few.segments[0, 4:, 4:] == -1).all()


def test_pixels_that_are_not_valid_are_in_no_segment():
    sem_seg = torch.tensor([[[0, 0, 1], [1, 255, 0]]])
    weight = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]])
    for segments in ("class_regions", "components"):
        targets = build_targets(sem_seg, weight, 2, segments=segments, min_area=1)
        assert ((targets.segments < 0) == torch.tensor([[[False, True, False], [True, True, False]]])).all(), segments
    assert build_targets(sem_seg, weight, 2).segments[0, 0].tolist() == [0, -1, 1]


def test_pseudo_labels_are_cut_into_components_where_labels_have_instances():
    sem_seg = torch.zeros(8, 8, dtype=torch.long)
    sem_seg[:2, :2] = sem_seg[5:, 5:] = 1
    instances = (sem_seg == 1).long()  # one object of two parts
    builder = TargetBuilder(segments="instances", min_area=1, max_segments=9, things=(1,))
    labeled = builder([{"sem_seg": sem_seg, "instances": instances}], 2, "cpu")
    assert labeled.labels[0].tolist() == [0, 1]
    pseudo = {"sem_seg": sem_seg, "pseudo": True, "image_weight": 1.0, "unknown": torch.zeros(2, dtype=torch.bool)}
    assert builder([pseudo], 2, "cpu").labels[0].tolist() == [0, 1, 1]


def test_a_labeled_image_with_more_classes_than_can_be_selected_is_an_error():
    builder = TargetBuilder(segments="class_regions", min_area=1, max_segments=9, max_classes=2)
    few, many = {"sem_seg": torch.tensor([[0, 0, 1]])}, {"sem_seg": torch.tensor([[0, 2, 1]])}
    assert builder([few], 3, "cpu").num_present == [2]
    with pytest.raises(UserError, match="MODEL.HSQG.TOP_K is 2, but a training image shows 3 classes"):
        builder([few, many], 3, "cpu")


def find_components(classes, numbers, things, min_area):
    """(class, mask) of every region of one class of one image, by OpenCV."""
    for k in np.unique(classes[classes >= 0]):
        _, regions, stats, _ = cv2.connectedComponentsWithStats((classes == k).astype(np.uint8), connectivity=8)
        for region in range(1, len(stats)):
            if stats[region, cv2.CC_STAT_AREA] >= min_area:
                yield k, regions == region


def find_instances(classes, numbers, things, min_area):
    """(class, mask) of every object and stuff region of one image."""
    single = (classes >= 0) & (numbers > 0)
    for k, number in np.unique(np.stack((classes[single], numbers[single])), axis=1).T:
        yield k, single & (classes == k) & (numbers == number)
    for k in np.setdiff1d(classes[(classes >= 0) & ~single], things):
        yield k, (classes == k) & ~single


FIND = {"components": find_components, "instances": find_instances}


def make_maps(batch, classes, cell, size=(25, 30)):
    """Classes with an unknown one and the ignore label among them, weights with a padded edge, object numbers."""
    cells = torch.randint(0, classes + 1, (batch, *size))
    sem_seg = cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, : size[0], : size[1]]
    sem_seg[torch.rand(sem_seg.shape) < 0.02] = 255
    weight = torch.rand(sem_seg.shape) * (torch.rand(sem_seg.shape) < 0.9)
    weight[..., size[1] - 4 :] = 0
    return sem_seg, weight, torch.randint(-1, 3, sem_seg.shape)


@pytest.mark.parametrize("segments", ["components", "instances"])
@pytest.mark.parametrize(("batch", "classes", "cell"), [(1, 2, 1), (2, 3, 4), (3, 60, 2), (4, 6, 2)])
@pytest.mark.parametrize(("min_area", "max_segments"), [(0, 5000), (1, 6), (4, 20), (2000, 9)])
def test_the_largest_segments_by_brute_force(segments, batch, classes, cell, min_area, max_segments):
    sem_seg, weight, numbers = make_maps(batch, classes, cell)
    options = {"min_area": min_area, "max_segments": max_segments, "instances": numbers, "things": range(0, classes, 2)}
    targets = build_targets(sem_seg, weight, classes, segments=segments, **options)
    for b in range(batch):
        known = torch.where((weight[b] > 0) & (sem_seg[b] < classes), sem_seg[b], -1).numpy()
        found = list(FIND[segments](known, numbers[b].numpy(), options["things"], min_area))
        found = sorted(found, key=lambda segment: -segment[1].sum())[:max_segments]
        expected = np.full(known.shape, -1)
        for index, (_, mask) in enumerate(found):
            expected[mask] = index
        assert targets.labels[b].tolist() == [k for k, _ in found]
        assert (targets.segments[b].numpy() == expected).all()


def test_a_batch_may_have_more_objects_than_an_image_has_pixels():
    numbers = torch.arange(1, 19).view(9, 1, 2)
    targets = build_targets(
        torch.zeros_like(numbers), torch.ones(9, 1, 2), 1, segments="instances", instances=numbers, things=(0,)
    )
    assert targets.segments.tolist() == [[[0, 1]]] * 9


@pytest.mark.parametrize("segments", ["components", "instances"])
def test_an_image_without_a_valid_pixel_has_no_segment(segments):
    sem_seg, weight, numbers = make_maps(3, 4, 3)
    weight[1] = 0
    targets = build_targets(sem_seg, weight, 4, segments=segments, min_area=1, instances=numbers, things=(1,))
    assert targets.counts[1] == 0 and (targets.segments[1] == -1).all()
    assert targets.counts[0] > 0 and targets.counts[2] > 0
    nothing = build_targets(sem_seg, weight * 0, 4, segments=segments, instances=numbers, things=(1,))
    assert nothing.counts == [0, 0, 0] and (nothing.segments == -1).all()


def test_the_host_waits_no_more_often_for_more_images():
    """It reads the classes and the number of segments of all images at once."""
    for batch in (1, 5):
        sem_seg, weight, numbers = make_maps(batch, 4, 3)
        with Waits() as waits:
            build_targets(sem_seg, weight, 4, segments="components")
        assert waits.seen == ["cpu", "nonzero", "equal", "tolist"]
        with Waits() as waits:
            build_targets(sem_seg, weight, 4, segments="instances", instances=numbers, things=(1,))
        assert waits.seen == ["cpu", "_unique2", "tolist"]
