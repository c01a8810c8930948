"""From unlabeled images to the student's inputs: CutMix mixes everything alike, absence is known or not taught."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from hiervl.modeling.inference import Probabilities
from hiervl.semi.filters import FilterChain, PseudoLabels
from hiervl.semi.pseudo_label import PseudoLabelHook, paste

SIZE, K = 8, 3


class Teacher(torch.nn.Module):
    """Knows image i as class i; its last column is unsure; class 2 is nowhere above 0.02 in image 0."""

    class_names = ["a", "b", "c"]
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def predict(self, images, suppress=True, valid=None):
        self.valid = valid
        scores = torch.full((len(images), K, SIZE, SIZE), 0.02) * self.weight
        for i in range(len(images)):
            scores[i, i] = 0.9
            scores[i, i, :, -1] = 0.3
        return Probabilities(scores, torch.arange(K).expand(len(images), -1), K)


def make_hook(unlabeled, weight=1.0, feature_dropout=0.0, iteration=10):
    hook = PseudoLabelHook(
        FilterChain([("confidence", {"threshold": 0.5})]),
        burn_in=5,
        feature_dropout=feature_dropout,
        absence_threshold=0.05,
    )
    hook.trainer = SimpleNamespace(
        batch={"labeled": [], "unlabeled": unlabeled},
        iter=iteration,
        log={},
        teacher=SimpleNamespace(model=Teacher()),
        should_log=lambda: True,
        unlabeled_weight=lambda: weight,
        precision=SimpleNamespace(autocast=contextlib.nullcontext),
        accumulate=1,
    )
    return hook


def make_sample(i, partner, box, **extra):
    return {
        "image": torch.full((3, SIZE, SIZE), i, dtype=torch.uint8),
        "file_name": f"{i}.jpg",
        "strong": [torch.full((3, SIZE, SIZE), 10 + i, dtype=torch.uint8)],
        "cutmix_box": [box],
        "partner": partner,
        "valid": torch.ones(SIZE, SIZE, dtype=torch.bool),
        "padded": False,
        **extra,
    }


def test_cutmix_mixes_image_label_and_validity_alike():
    samples = [make_sample(0, 1, (2, 4, 6, 8)), make_sample(1, 0, None)]
    samples[1]["valid"][2:4] = False  # padding of the partner
    hook = make_hook(samples)
    hook.before_step()
    mixed, plain = hook.trainer.pseudo_inputs
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[2:6, 4:8] = True
    assert (mixed["image"][:, inside] == 11).all() and (mixed["image"][:, ~inside] == 10).all()
    assert (mixed["sem_seg"][inside] == 1).all() and (mixed["sem_seg"][~inside] == 0).all()
    assert (mixed["weight"][2:4, 4:8] == 0).all()  # the partner's padding
    assert (mixed["weight"][4:6, 4:7] == 1).all()
    assert (mixed["weight"][:, -1] == 0).all()  # rejected in both
    # kept share of the pixels that are not padding: 64 - 8 padded, minus the 6 rejected ones outside the padding
    assert mixed["image_weight"] == pytest.approx((56 - 6) / 56)
    assert (plain["image"] == 11).all() and plain["pseudo"]


def test_absence_is_known_only_if_the_teacher_never_suspects_the_class_in_either_partner():
    hook = make_hook([make_sample(0, 1, (2, 4, 6, 8)), make_sample(1, 0, None)])
    hook.before_step()
    mixed, plain = hook.trainer.pseudo_inputs
    assert mixed["unknown"].tolist() == [True, True, False]
    assert plain["unknown"].tolist() == [False, True, False]


def test_the_teacher_is_never_in_the_gradient():
    hook = make_hook([make_sample(0, 1, (2, 4, 6, 8)), make_sample(1, 0, None)])
    hook.before_step()
    for item in hook.trainer.pseudo_inputs:
        assert not any(torch.is_tensor(v) and v.requires_grad for v in item.values())
    assert not any(v.requires_grad for v in hook.trainer.log.values())


def test_padding_is_told_to_teacher_and_student():
    samples = [make_sample(0, 1, (2, 4, 6, 8)), make_sample(1, 0, None)]
    samples[1]["valid"][4:] = False
    samples[1]["padded"] = True
    hook = make_hook(samples)
    hook.before_step()
    assert hook.trainer.teacher.model.valid.equal(torch.stack([x["valid"] for x in samples]))
    mixed, plain = hook.trainer.pseudo_inputs
    assert mixed["padded"] and plain["padded"] and plain["valid"].equal(samples[1]["valid"])
    assert not mixed["valid"][4:6, 4:8].any() and mixed["valid"].sum() == SIZE * SIZE - 8
    hook = make_hook([make_sample(0, 1, None), make_sample(1, 0, None)])
    hook.before_step()
    assert hook.trainer.teacher.model.valid is None and not hook.trainer.pseudo_inputs[0]["padded"]


def test_streams():
    samples = [make_sample(0, 1, None), make_sample(1, 0, None), make_sample(2, None, None, extra=True)]
    hook = make_hook(samples, feature_dropout=0.5)
    hook.before_step()
    assert [x.get("feature_dropout") for x in hook.trainer.pseudo_inputs] == [None, 0.5, None, 0.5]
    assert (hook.trainer.pseudo_inputs[1]["image"] == 0).all()  # the weak view


@pytest.mark.parametrize("iteration, weight", [(4, 1.0), (10, 0.0)])
def test_no_inputs_during_burn_in_or_at_weight_zero(iteration, weight):
    hook = make_hook([make_sample(0, 1, None), make_sample(1, 0, None)], weight=weight, iteration=iteration)
    hook.before_step()
    assert hook.trainer.pseudo_inputs == []
    assert ("kept/confidence" in hook.trainer.log) == (weight == 0)  # at weight 0 the stream runs and is measured


def test_accuracy_is_measured_where_masks_are_there():
    truth = torch.zeros(SIZE, SIZE, dtype=torch.long)
    truth[0] = 255
    truth[1] = 2
    hook = make_hook([make_sample(0, 1, None, true_sem_seg=truth), make_sample(1, 0, None)])
    hook.before_step()
    assert hook.trainer.log["pseudo_accuracy/all"] == pytest.approx(48 / 56)
    assert hook.trainer.log["pseudo_accuracy/kept"] == pytest.approx(42 / 49)


def test_paste_leaves_its_inputs_alone():
    own, other = torch.zeros(4, 4), torch.ones(4, 4)
    mixed = paste((1, 1, 3, 4), own, other)
    assert mixed.sum() == 6 and own.sum() == 0


class LanguageTeacher(Teacher):
    """Selects classes 0 and 1 only, and sees image i with a pixel-text similarity of i / 10."""

    def predict(self, images, suppress=True, valid=None):
        assert not suppress  # every class must get its probability
        plain = super().predict(images, suppress, valid)
        count = len(images)
        similarity = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 2, SIZE // 4, SIZE // 4) / 10
        return Probabilities(plain.values[:, :2], plain.index[:, :2], K, torch.rand(count, K), similarity)


def test_the_view_of_a_teacher_with_language_modules():
    """CutMix pastes the partner's similarity at a quarter of the size; a class that was not selected is unknown."""
    hook = make_hook([make_sample(0, 1, (0, 4, 4, 8)), make_sample(1, 0, None)])
    hook.trainer.teacher.model = LanguageTeacher()
    hook.before_step()
    mixed, plain = hook.trainer.pseudo_inputs
    assert mixed["unknown"].tolist() == [True, True, True] and plain["unknown"].tolist() == [False, True, True]
    similarity = mixed["teacher"].similarity_of(torch.arange(K), K)
    torch.testing.assert_close(similarity[0], torch.tensor([[0.0, 0.1], [0.0, 0.0]]))
    assert (similarity[2] == -1).all() and plain["teacher"].index.tolist() == [0, 1]
    assert mixed["teacher"].mixed and not plain["teacher"].mixed


def test_a_class_is_excluded_if_it_stays_below_the_threshold_outside_padding():
    probabilities = torch.zeros(1, K, 2, 2)
    probabilities[0, 0, 0, 0], probabilities[0, 1, 0, 0], probabilities[0, 2, 1, 1] = 0.06, 0.04, 0.9
    valid = torch.tensor([[[True, True], [True, False]]])
    pseudo = PseudoLabels.from_probabilities(probabilities, valid, Teacher.class_names)
    assert make_hook([]).not_excluded(pseudo).tolist() == [[True, False, False]]


def test_the_teacher_teaches_from_the_end_of_burn_in_on():
    samples = [make_sample(0, 1, None), make_sample(1, 0, None)]
    for iteration, expected in ((4, 0), (5, 2)):
        hook = make_hook(samples, iteration=iteration)
        hook.before_step()
        assert len(hook.trainer.pseudo_inputs) == expected


def test_every_strong_view_is_mixed_with_the_same_view_of_the_partner():
    samples = [make_sample(0, 1, (0, 0, 4, 4)), make_sample(1, 0, None)]
    for i, sample in enumerate(samples):
        sample["strong"].append(torch.full((3, SIZE, SIZE), 20 + i, dtype=torch.uint8))
        sample["cutmix_box"] *= 2
    hook = make_hook(samples)
    hook.before_step()
    images = [x["image"] for x in hook.trainer.pseudo_inputs]
    assert [image[0, 0, 0].item() for image in images] == [11, 21, 11, 21]
    assert [image[0, -1, -1].item() for image in images] == [10, 20, 11, 21]


def test_accuracy_leaves_out_padding_and_weighs_kept_pixels():
    samples = [make_sample(0, 1, None, true_sem_seg=torch.zeros(SIZE, SIZE, dtype=torch.long)), make_sample(1, 0, None)]
    samples[0]["true_sem_seg"][:, -2:] = 1  # class 0 is predicted everywhere; the last column is not kept
    samples[0]["valid"][4:] = False
    samples[0]["true_sem_seg"][4:] = 1
    hook = make_hook(samples)
    hook.before_step()
    assert hook.trainer.log["pseudo_accuracy/all"] == pytest.approx(6 / 8)
    assert hook.trainer.log["pseudo_accuracy/kept"] == pytest.approx(6 / 7)
