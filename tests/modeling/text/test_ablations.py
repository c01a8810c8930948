"""Ablations of the text: random embeddings, and embeddings permuted among the classes."""

import copy

import pytest
import torch

from hiervl.config import load_config
from hiervl.errors import UserError
from hiervl.modeling.text import ClassText
from tests.test_train_net import TINY


def make_text(ablation):
    options = ["MODEL.TEXT.ABLATION", ablation, "MODEL.TEXT.CENTER", False]
    cfg = load_config("configs/shapes_supervised.yaml", [*TINY, *options])
    return ClassText(cfg, ["background", "red disc", "red ring", "blue ring"])


def test_random_embeddings_are_unrelated_and_reproducible():
    real, random = make_text("none"), make_text("random")
    cosines = random() @ random().t()
    torch.testing.assert_close(cosines.diagonal(), torch.ones(4))
    assert cosines.fill_diagonal_(0).abs().max() < 0.3 < (real() @ real().t())[2, 3]
    torch.testing.assert_close(random(), make_text("random")())
    assert not torch.allclose(random.distractors()[1], real.distractors()[1])
    expected = random()[1:]
    random = copy.deepcopy(random)  # as for the EMA teacher
    random.set_classes(["red disc", "red ring", "blue ring"])
    torch.testing.assert_close(random(), expected)
    with pytest.raises(UserError, match="green moon"):
        random.set_classes(["green moon"])


def test_permuted_texts_belong_to_the_next_class():
    real, permuted = make_text("none"), make_text("permuted")
    torch.testing.assert_close(permuted(), real().roll(-1, 0))
    assert permuted.class_names == real.class_names and permuted.distractors()[0] == real.distractors()[0]
    torch.testing.assert_close(permuted.distractors()[1], real.distractors()[1])


def test_an_unknown_ablation_is_refused():
    with pytest.raises(UserError, match="MODEL.TEXT.ABLATION: 'shuffled'"):
        make_text("shuffled")
