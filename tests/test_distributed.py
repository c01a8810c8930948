"""Two processes on the CPU: they learn the same weights, and evaluate as one process does."""

import json

import pytest
import torch
from detectron2.utils import comm

import train_net
from hiervl.data.loaders import SemiSupervisedBatches
from hiervl.data.shapes import generate
from hiervl.semi.filters import FilterChain
from hiervl.semi.pseudo_label import PseudoLabelHook
from hiervl.semi.trainer import SemiSupervisedTrainer

from .test_train_net import TINY

CONFIG = ["--config-file", "configs/shapes.yaml"]
OPTIONS = [
    "SOLVER.MAX_ITER",
    "3",
    "SEMI.UNLABELED_PER_BATCH",
    "2",
    "SEMI.BURN_IN",
    "1",
    "SEMI.RAMP",
    "0",
    "SEMI.CUTMIX_PROB",
    "1.0",
]


def train(rank, rendezvous, out):
    """One of two processes; writes what it has learned."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    args = train_net.parser().parse_args([*CONFIG, *TINY, *OPTIONS, "OUTPUT_DIR", out])
    trainer = SemiSupervisedTrainer(train_net.setup(args))
    pseudo_inputs = first_pseudo_inputs(trainer)
    trainer.train()
    state = {
        "student": trainer.student.state_dict(),
        "teacher": trainer.teacher.model.state_dict(),
        "hooks": [hook.state_dict() for hook in trainer._hooks if hasattr(hook, "filters")],
        "seen": [x["file_name"] for x in trainer.batch["labeled"]],
        "pseudo_inputs": pseudo_inputs,
    }
    torch.save(state, f"{out}/rank{rank}.pth")
    torch.distributed.destroy_process_group()


def first_pseudo_inputs(trainer):
    """The student's pseudo-labeled inputs of iteration 1, with all of the initial teacher's labels."""
    hook, trainer.iter = PseudoLabelHook.from_config(trainer.cfg), 1
    hook.trainer, hook.filters, hook.feature_dropout = trainer, FilterChain([]), 0.0
    trainer.batch = SemiSupervisedBatches(trainer.cfg)[1]
    hook.before_step()
    trainer.batch, trainer.log = None, {}
    inputs = trainer.pseudo_inputs
    return [{k: v for k, v in x.items() if k != "padded"} | {"teacher": vars(x["teacher"])} for x in inputs]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    # Three images to validate on: one process has more of them than the other.
    generate(str(tmp_path / "shapes"), num_train=8, num_val=3, size=64, seed=0, labeled=(4,))
    torch.multiprocessing.spawn(train, (str(tmp_path / "rendezvous"), str(tmp_path / "out")), nprocs=2)
    return tmp_path / "out"


def assert_same_inputs(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, dict):
            assert_same_inputs(value, second[name])
        elif torch.is_tensor(value):
            torch.testing.assert_close(value, second[name], msg=name)
        else:
            assert value == second[name], name


def test_two_processes_learn_the_same_and_evaluate_as_one(trained):
    first, second = (torch.load(trained / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    assert first["seen"] != second["seen"]
    for network in ("student", "teacher"):
        for name, value in first[network].items():
            torch.testing.assert_close(value, second[network][name], rtol=0, atol=0, msg=name)
    assert first["hooks"] == second["hooks"] and first["hooks"][0]["adaptive"]

    # Each has one unlabeled image, whose CutMix partner is the other's: labeled there, and sent.
    args = train_net.parser().parse_args([*CONFIG, *TINY, *OPTIONS, "OUTPUT_DIR", str(trained / "alone")])
    alone = first_pseudo_inputs(SemiSupervisedTrainer(train_net.setup(args)))
    together = first["pseudo_inputs"] + second["pseudo_inputs"]
    assert len(alone) == len(together) and all(x["teacher"]["mixed"] for x in alone)
    for expected, result in zip(alone, together):
        assert_same_inputs(expected, result)

    def confusion(kind):
        return json.loads((trained / f"inference/shapes_val/{kind}/segmentation.json").read_text())["confusion_matrix"]

    together = {kind: confusion(kind) for kind in ("student", "teacher")}
    train_net.run(train_net.parser().parse_args([*CONFIG, "--eval-only", *TINY, "OUTPUT_DIR", str(trained)]))
    assert {kind: confusion(kind) for kind in together} == together
