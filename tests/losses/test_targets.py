"""Label maps cut into segments, and the same in terms of kept classes."""

import pytest
import torch

from hiervl.errors import UserError
from hiervl.losses.targets import TargetBuilder, build_targets


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
