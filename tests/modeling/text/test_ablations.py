"""Controls: vectors without a meaning, and names with another one's meaning."""

import copy

import pytest
import torch

from hiervl.config import load_config
from hiervl.errors import UserError
from hiervl.modeling.text import ClassText
from tests.test_train_net import TINY


def make(control):
    options = ["MODEL.TEXT.ABLATION", control, "MODEL.TEXT.CENTER", False]
    cfg = load_config("configs/shapes_supervised.yaml", [*TINY, *options])
    return ClassText(cfg, ["background", "red disc", "red ring", "blue ring"])


def test_random_texts_mean_nothing_and_do_not_change():
    real, random = make("none"), make("random")
    near = random() @ random().t()
    torch.testing.assert_close(near.diagonal(), torch.ones(4))
    assert near.fill_diagonal_(0).abs().max() < 0.3 < (real() @ real().t())[2, 3]
    torch.testing.assert_close(random(), make("random")())
    assert not torch.allclose(random.distractors()[1], real.distractors()[1])
    kept = random()[1:]
    random = copy.deepcopy(random)  # as the teacher is made
    random.set_classes(["red disc", "red ring", "blue ring"])
    torch.testing.assert_close(random(), kept)
    with pytest.raises(UserError, match="green moon"):
        random.set_classes(["green moon"])


def test_permuted_texts_belong_to_the_next_class():
    real, permuted = make("none"), make("permuted")
    torch.testing.assert_close(permuted(), real().roll(-1, 0))
    assert permuted.class_names == real.class_names and permuted.distractors()[0] == real.distractors()[0]
    torch.testing.assert_close(permuted.distractors()[1], real.distractors()[1])


def test_an_unknown_control():
    with pytest.raises(UserError, match="MODEL.TEXT.ABLATION: 'shuffled'"):
        make("shuffled")
