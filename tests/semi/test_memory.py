"""The largest step is tried before training: it fits, or one line says what would; nothing of the trainer changes."""

import logging

import pytest
import torch

from hiervl.errors import UserError
from hiervl.semi.memory import LargestStep, tile_map
from hiervl.semi.trainer import SemiSupervisedTrainer

OPTIONS = ["SEMI.BURN_IN", 1, "SEMI.FILTERS", ("adaptive",), "MODEL.CRITERION.SEGMENTS", "components"]


def limit_images(trainer, most, seen):
    """A card on which the student can take this many images at once."""
    plain = trainer.student.forward

    def forward(batch, normalizers=None):
        seen.append(len(batch.inputs))
        if len(batch.inputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return plain(batch, normalizers)

    trainer.student.forward = forward


def state_of(trainer):
    networks = {"student": trainer.student, "teacher": trainer.teacher.model}
    values = {f"{k}.{name}": v.clone() for k, network in networks.items() for name, v in network.state_dict().items()}
    return values, trainer.state_dict(), len(trainer.optimizer.state), trainer.accumulate, dict(trainer.log)


def test_the_largest_step_leaves_no_trace(make_cfg, caplog):
    trainer = SemiSupervisedTrainer(make_cfg(*OPTIONS))
    before, seen = state_of(trainer), []
    limit_images(trainer, 99, seen)
    with caplog.at_level(logging.INFO, logger="hiervl"):
        LargestStep.from_config(trainer.cfg, trainer).check()
    assert "2 labeled and 3 views of 2 unlabeled images of 64x64 pixels, fits:" in caplog.text
    assert seen == [8]  # although burn-in begins with the labeled images alone
    after = state_of(trainer)
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1:] == after[1:]
    assert all(p.grad is None for p in trainer.student.parameters())


@pytest.mark.parametrize("most, accumulate, expected", [(4, 1, 2), (3, 2, 4), (1, 1, 8), (1, 3, 8)])
def test_what_does_not_fit_is_refused_with_what_would(make_cfg, most, accumulate, expected):
    trainer = SemiSupervisedTrainer(make_cfg(*OPTIONS, "SOLVER.ACCUMULATE", accumulate))
    limit_images(trainer, most, [])
    with pytest.raises(
        UserError, match=f"SOLVER.ACCUMULATE is {accumulate}, but.*set SOLVER.ACCUMULATE to {expected} "
    ):
        LargestStep.from_config(trainer.cfg, trainer).check()
    assert trainer.accumulate == accumulate


def test_what_never_fits_names_the_other_ways_out(make_cfg):
    trainer = SemiSupervisedTrainer(make_cfg(*OPTIONS))
    limit_images(trainer, 0, [])
    with pytest.raises(UserError, match="not even image by image; set SOLVER.ACTIVATION_CHECKPOINTING"):
        LargestStep.from_config(trainer.cfg, trainer).check()


def test_running_out_of_memory_later_names_the_images_the_checkpoint_and_the_way_out(make_cfg):
    trainer = SemiSupervisedTrainer(make_cfg(*OPTIONS, "SOLVER.CHECKPOINT_PERIOD", 2))
    limit_images(trainer, 99, [])
    plain = trainer.run_step

    def run_step():
        if trainer.iter == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        plain()

    trainer.run_step = run_step
    with pytest.raises(UserError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith("iteration 3: the GPU ran out of memory (CUDA out of memory) with the images ")
    assert message.count(".png") == 4 and "model_0000001.pth is kept" in message
    assert message.endswith("continue from it with --resume and SOLVER.ACCUMULATE 2.") and "\n" not in message


@pytest.mark.parametrize("count", [1, 2, 3, 21, 50])
def test_tiles_are_as_many_as_asked_for(count):
    tiles = tile_map(96, 80, count)
    assert count <= len(tiles.unique()) and tiles.min() == 0
    assert torch.bincount(tiles.flatten()).max() <= 2 * 96 * 80 / count + 96 + 80
