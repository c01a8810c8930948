"""Kills a run, and continues it: nothing of its state is lost."""

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from hiervl.semi.trainer import SemiSupervisedTrainer

from . import shapes_run
from .findings import ROOT, Findings, Settings

_WAIT = 0.02  # seconds between two looks at the run's folder


def run(settings: Settings, findings: Findings) -> None:
    iterations, period = (8, 2) if settings.tiny else (80, 10)
    with shapes_run.shapes_folder() as folder:
        output = folder / "run"
        pairs = shapes_run.overrides(settings, output, iterations, "SOLVER.CHECKPOINT_PERIOD", period)
        status = kill_after_first_checkpoint(pairs, output, findings)
        findings.check("the run was killed before its end", status == -signal.SIGKILL, status, -signal.SIGKILL)
        checkpoint = torch.load(last_checkpoint(output), weights_only=True, map_location="cpu")
        trainer = shapes_run.make_trainer(pairs, SemiSupervisedTrainer)
        trainer.resume_or_load(True)
        findings.check(
            "it continues after its last checkpoint",
            trainer.start_iter == checkpoint["iteration"] + 1 and trainer.start_iter % period == 0,
            trainer.start_iter,
            checkpoint["iteration"] + 1,
        )
        for name, part in (
            ("student", trainer.student), ("teacher", trainer.teacher.model), ("optimizer", trainer.optimizer),
            ("scheduler", trainer.scheduler), ("trainer", trainer),
        ):  # fmt: skip
            saved = checkpoint["model" if name == "student" else name]
            found = differences(part.state_dict(), saved)
            findings.check(f"state of the {name} is restored", not found, ", ".join(found[:3]))
        moments = checkpoint["optimizer"]["state"]
        findings.check("the optimizer's state is not empty", len(moments) > 0, len(moments))
        trainer.train()
        findings.check("it ends at the last iteration", trainer.iter == iterations, trainer.iter, iterations)
        for name, model in (("student", trainer.student), ("teacher", trainer.teacher.model)):
            bad = [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]
            findings.check(f"weights of the {name} are finite", not bad, ", ".join(bad[:3]))
        losses = shapes_run.logged(output, "total_loss")
        findings.check("losses are finite", all(map(math.isfinite, losses)), f"{len(losses)} iterations")


def kill_after_first_checkpoint(pairs: list, output: Path, findings: Findings) -> int:
    """Start a run as a user does, and kill it some iterations after its first checkpoint. Returns its exit status."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "train_net.py"), "--config-file", str(shapes_run.CONFIG)]
    process = subprocess.Popen([*command, *map(str, pairs)], cwd=ROOT)
    try:
        while process.poll() is None and findings.seconds_left > 0:
            if (output / "last_checkpoint").exists():
                break
            time.sleep(_WAIT)
    finally:
        process.kill()
    return process.wait()


def last_checkpoint(output: Path) -> Path:
    """
    Raises:
        FileNotFoundError: the run wrote none.
    """
    return output / (output / "last_checkpoint").read_text()


def differences(state, saved, name: str = "") -> list[str]:
    """Names of the values in which two nested states differ; tensors may be on different devices."""
    if isinstance(state, torch.Tensor):
        return [] if torch.equal(state.cpu(), saved.cpu()) else [name]
    if isinstance(state, dict):
        missing = [f"{name}.{key}" for key in state.keys() ^ saved.keys()]
        shared = [key for key in state if key in saved]
        return missing + [bad for key in shared for bad in differences(state[key], saved[key], f"{name}.{key}")]
    if isinstance(state, (list, tuple)):
        if len(state) != len(saved):
            return [name]
        return [bad for i, pair in enumerate(zip(state, saved)) for bad in differences(*pair, f"{name}[{i}]")]
    return [] if state == saved else [name]
