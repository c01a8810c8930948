"""Two processes on the CPU, however they are started: they are one run, learn the same weights, download once, and
evaluate as one process does."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_net
from hiervl.data.shapes import generate
from hiervl.launch import launch
from hiervl.modeling.backbones import TimmBackbone
from hiervl.semi.trainer import SemiSupervisedTrainer

from .processes import error_lines, first_pseudo_inputs, free_port, run_processes, srun, train_and_save
from .test_train_net import TINY

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ["--config-file", "configs/shapes.yaml"]
SEMI = [
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


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    # Three images to validate on: one process has more of them than the other.
    generate(str(tmp_path / "shapes"), num_train=8, num_val=3, size=64, seed=0, labeled=(4,))
    return tmp_path


def start_num_gpus(options, folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # launch changes it
    launch(train_and_save, train_net.parser().parse_args(["--num-gpus", "2", "--dist-url", "auto", *options]))


def start_torchrun(options, folder, monkeypatch):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, "-m", "tests.processes", *options], cwd=ROOT, check=True, timeout=300)


def start_srun(options, folder, monkeypatch):
    port = free_port()
    args = train_net.parser().parse_args(options)
    results = run_processes(launch, (train_and_save, args), [srun(port, 0), srun(port, 1)], folder)
    assert [status for status, _ in results] == [0, 0], error_lines(results)


def assert_same_inputs(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, dict):
            assert_same_inputs(value, second[name])
        elif torch.is_tensor(value):
            torch.testing.assert_close(value, second[name], msg=name)
        else:
            assert value == second[name], name


@pytest.mark.parametrize("start", [start_num_gpus, start_torchrun, start_srun])
def test_two_processes_are_one_run(root, server, monkeypatch, start):
    address, files, requests = server
    weights = io.BytesIO()
    torch.save(TimmBackbone(name="lcnet_050").body.state_dict(), weights)

    def slowly():  # a second process that did not wait would ask as well
        time.sleep(1)
        return weights.getvalue()

    files["/backbone.pth"] = slowly
    out = root / "out"
    options = [*TINY, *SEMI, "MODEL.BACKBONE.WEIGHTS", f"{address}/backbone.pth", "OUTPUT_DIR", str(out)]

    start([*CONFIG, *options], root, monkeypatch)

    assert requests.count("/backbone.pth") == 2  # one question whether the server is there, and one download
    iterations = [json.loads(line)["iteration"] for line in (out / "metrics.json").read_text().splitlines()]
    assert iterations == [0, 1, 2, 3]  # 3: the evaluation at the end
    first, second = (torch.load(out / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    assert first["local"] == (0, 2) and second["local"] == (1, 2)
    assert first["seen"] != second["seen"]
    for network in ("student", "teacher"):
        for name, value in first[network].items():
            torch.testing.assert_close(value, second[network][name], rtol=0, atol=0, msg=name)
    assert first["hooks"] == second["hooks"] and first["hooks"][0]["adaptive"]

    # Each has one unlabeled image, whose CutMix partner is the other's: labeled there, and sent.
    args = train_net.parser().parse_args([*CONFIG, *options, "OUTPUT_DIR", str(out / "alone")])
    alone = first_pseudo_inputs(SemiSupervisedTrainer(train_net.setup(args)))
    together = first["pseudo_inputs"] + second["pseudo_inputs"]
    assert len(alone) == len(together) and all(x["teacher"]["mixed"] for x in alone)
    for expected, result in zip(alone, together):
        assert_same_inputs(expected, result)

    def confusion(kind):
        return json.loads((out / f"inference/shapes_val/{kind}/segmentation.json").read_text())["confusion_matrix"]

    together = {kind: confusion(kind) for kind in ("student", "teacher")}
    train_net.run(train_net.parser().parse_args([*CONFIG, "--eval-only", *options]))
    assert {kind: confusion(kind) for kind in together} == together


@pytest.mark.parametrize("ranks", [(0, 1), (0,), (1,)], ids=["all processes", "process 0", "process 1"])
def test_a_mistake_ends_all_processes_with_one_line(root, ranks):
    """It is found when the loader is built, when the others are about to exchange gradients."""
    port, args = free_port(), train_net.parser().parse_args([*CONFIG, *TINY, *SEMI, "OUTPUT_DIR", str(root / "out")])
    right, wrong = str(root), str(root / "wrong")
    generate(f"{wrong}/shapes", num_train=8, num_val=3, size=64, seed=0, labeled=(4,))
    for mask in Path(wrong, "shapes/masks/train").iterdir():
        mask.unlink()
    places = [srun(port, rank, DETECTRON2_DATASETS=wrong if rank in ranks else right) for rank in (0, 1)]
    results = run_processes(launch, (train_net.main, args), places, root)
    assert [status for status, _ in results] == [2, 2]
    (line,) = error_lines(results)
    assert "masks/train" in line
