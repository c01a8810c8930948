"""Runs of several processes, for tests: fresh processes that have everything imported already, and a main function."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
from detectron2.utils import comm

import train_net
from hiervl.data.loaders import SemiSupervisedBatches
from hiervl.launch import launch
from hiervl.semi.filters import FilterChain
from hiervl.semi.pseudo_label import PseudoLabelHook
from hiervl.semi.trainer import SemiSupervisedTrainer
from hiervl.utils.processes import end_together

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train_net"])  # imported once, by the server that all processes are forked from


def run_processes(target, args, environments, folder, limit=100):
    """Call target(*args) in one process per environment, a dict of variables in addition to those of this process.

    Returns:
        a list of (exit status, stderr) per process; status None: still running after `limit` seconds.
    """
    logs = [Path(folder) / f"stderr{i}.txt" for i in range(len(environments))]
    processes = [
        _context.Process(target=_child, args=(target, args, {**os.environ, **environment}, str(log)))
        for environment, log in zip(environments, logs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(limit)
    results = [(process.exitcode, log.read_text()) for process, log in zip(processes, logs)]
    for process in processes:
        process.kill()
    return results


def _child(target, args, environment, log):
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    target(*args)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def srun(port, rank, size=2, **more):
    """Variables of one of the processes that srun starts on one machine."""
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(size),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODELIST": "localhost",
        "MASTER_PORT": str(port),
        **more,
    }


def error_lines(results):
    """What all processes have reported, and every line of a stack trace."""
    lines = [line for _, stderr in results for line in stderr.splitlines()]
    return [line for line in lines if line.startswith(("error: ", "Traceback"))]


def train_and_save(args):
    """A main function for launch: train, and write what this process has learned to OUTPUT_DIR/rank0.pth, ..."""
    end_together(_train_and_save, args)


def _train_and_save(args):
    torch.set_num_threads(1)
    cfg = train_net.setup(args)
    trainer = SemiSupervisedTrainer(cfg)
    pseudo_inputs = first_pseudo_inputs(trainer)
    trainer.resume_or_load(args.resume)
    trainer.train()
    state = {
        "student": trainer.student.state_dict(),
        "teacher": trainer.teacher.model.state_dict(),
        "hooks": [hook.state_dict() for hook in trainer._hooks if hasattr(hook, "filters")],
        "seen": [x["file_name"] for x in trainer.batch["labeled"]],
        "pseudo_inputs": pseudo_inputs,
        "local": (comm.get_local_rank(), comm.get_local_size()),
    }
    torch.save(state, f"{cfg.OUTPUT_DIR}/rank{comm.get_rank()}.pth")


def first_pseudo_inputs(trainer):
    """The student's pseudo-labeled inputs of iteration 1, with all of the initial teacher's labels."""
    hook, trainer.iter = PseudoLabelHook.from_config(trainer.cfg), 1
    hook.trainer, hook.filters, hook.feature_dropout = trainer, FilterChain([]), 0.0
    trainer.batch = SemiSupervisedBatches(trainer.cfg)[1]
    hook.before_step()
    trainer.batch, trainer.log = None, {}
    inputs = trainer.pseudo_inputs
    return [{k: v for k, v in x.items() if k != "padded"} | {"teacher": vars(x["teacher"])} for x in inputs]


if __name__ == "__main__":  # for torchrun
    launch(train_and_save, train_net.parser().parse_args())
