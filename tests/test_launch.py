"""How a run starts: as the environment says, with a device for each process, or with one line that says why not."""

import os
import re
from datetime import timedelta

import pytest
import torch
from detectron2.utils import comm

import train_net
from hiervl import launch as module
from hiervl.errors import UserError
from hiervl.launch import check_device, launch

from .processes import error_lines, free_port, run_processes, srun

SHORT = timedelta(seconds=3)
ON_CPU = ["MODEL.DEVICE", "cpu"]


def arguments(*command_line):
    return train_net.parser().parse_args(command_line)


def torchrun(rank=0, size=1, port=29500, **more):
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {**{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "localhost", **more}


def mistake(capsys, *command_line):
    """The one line with which launch ends."""
    with pytest.raises(SystemExit) as exit_:
        launch(pytest.fail, arguments(*command_line), SHORT)
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): PyTorch finds n GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def set_up(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return set_up


@pytest.mark.parametrize(
    "env",
    [{}, {**srun(1, 0, size=1), "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, torchrun()],
    ids=["alone", "one SLURM task", "one process of torchrun"],
)
def test_a_process_of_its_own_is_a_plain_run(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    seen = []
    launch(lambda args: seen.append((args.num_gpus, comm.get_world_size())), arguments())
    assert seen == [(1, 1)]


@pytest.mark.parametrize(
    "command_line, expected",
    [
        (["--num-gpus", "0"], "--num-gpus is 0; it must be at least 1"),
        (["--num-machines", "-1"], "--num-machines is -1"),
        (["--machine-rank", "1"], "--machine-rank is 1; with --num-machines 1, it must be from 0 to 0"),
        (["--num-machines", "2", "--dist-url", "auto"], "--dist-url is auto; .*tcp://ADDRESS:PORT"),
        (["--num-machines", "2", "--dist-url", "tcp://box"], "--dist-url is tcp://box"),
        (["--num-gpus", "2", "SOLVER.MAXITER", "2"], "did you mean SOLVER.MAX_ITER"),
        (["--num-gpus", "2", "MODEL.DEVICE", "cuda:1"], "MODEL.DEVICE is cuda:1, which several processes would share"),
    ],
)
def test_a_command_line_that_starts_nothing(capsys, command_line, expected):
    assert re.search(expected, mistake(capsys, *command_line))


def test_the_launcher_and_the_command_line_agree(capsys, monkeypatch):
    for name, value in torchrun().items():
        monkeypatch.setenv(name, value)
    line = mistake(capsys, "--num-gpus", "8")
    assert "--num-gpus is 8, but torchrun has started 1 processes, 1 per machine; leave the option out" in line
    assert "--num-machines is 2" in mistake(capsys, "--num-machines", "2")


def test_a_gpu_for_each_process(gpus, monkeypatch):
    gpus(2)
    check_device("cuda", 2, "--num-gpus 2")
    with pytest.raises(UserError, match="^--num-gpus 3: every process .* 3 on this machine, but PyTorch finds 2;"):
        check_device("cuda", 3, "--num-gpus 3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="PyTorch finds 2 .CUDA_VISIBLE_DEVICES is '0,1'.; .*MODEL.DEVICE cpu"):
        check_device("cuda", 3, "--num-gpus 3")
    gpus(0)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(UserError, match="1 on this machine, but PyTorch .* is built without CUDA"):
        check_device("cuda", 1, "srun")
    check_device("cpu", 3, "--num-gpus 3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # as NVML says, whatever PyTorch can use
    with pytest.raises(UserError, match="is built without CUDA"):
        check_device("cuda", 2, "--num-gpus 2")


@pytest.mark.parametrize("visible, chosen", [(4, 3), (1, 0)], ids=["all GPUs of the machine", "its own GPU"])
def test_the_gpu_of_a_process(gpus, monkeypatch, visible, chosen):
    gpus(visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: monkeypatch.setattr(torch.cuda, "now", index, False))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.cuda.now)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: type("Properties", (), {"uuid": f"GPU-{index}"})
    )
    place = module.Place("srun", 3, 4, 3, 4, "box", 1, hosts_store=False)
    assert module._take_gpu("cuda", place).endswith(f", GPU-{chosen}")
    assert module._take_gpu("cpu", place) == ""


def test_processes_on_the_cpu_see_no_gpu(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    calls = []
    monkeypatch.setattr(
        module.engine,
        "launch",
        lambda main, num, **options: calls.append((num, options["timeout"], os.environ["CUDA_VISIBLE_DEVICES"])),
    )
    launch(pytest.fail, arguments("--num-gpus", "3", *ON_CPU), SHORT)
    launch(pytest.fail, arguments("--num-gpus", "3", *ON_CPU))
    assert calls == [(3, SHORT, ""), (3, module.TIMEOUT, "")]


def test_detectron2s_processes_that_do_not_come_together(capfd):
    port = free_port()
    command_line = ["--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{port}", *ON_CPU]
    line = mistake(capfd, "--machine-rank", "1", *command_line)
    assert f"--dist-url tcp://127.0.0.1:{port}: the 2 processes" in line and "refused, for 3 s" in line
    line = mistake(capfd, *command_line)
    assert f"--dist-url tcp://127.0.0.1:{port}: the 2 processes" in line and "1/2 clients joined" in line


@pytest.mark.parametrize("variables", [srun, lambda port, rank: torchrun(rank, 2, port)], ids=["srun", "torchrun"])
def test_a_process_that_does_not_come(tmp_path, variables):
    port = free_port()
    for rank, words in (
        (0, "only 1 of 2 processes have come there within 3 s; missing: 1"),
        (1, "process 1 of 2 cannot"),
    ):
        results = run_processes(launch, (print, arguments(*ON_CPU), SHORT), [variables(port, rank)], tmp_path)
        assert [status for status, _ in results] == [2]
        (line,) = error_lines(results)
        assert f"localhost:{port}" in line and words in line


@pytest.mark.parametrize(
    "command_line, more, expected",
    [
        (["--num-gpus", "3", *ON_CPU], {}, "--num-gpus is 3, but srun has started 2 processes, 2 per machine"),
        (["--config-file", "none.yaml"], {}, "none.yaml: no such config file"),
        (ON_CPU, {"SLURM_TASKS_PER_NODE": "1(x2)"}, "numbered machine by machine; use --ntasks-per-node"),
        (ON_CPU, {"SLURM_TASKS_PER_NODE": "2,1"}, "the same number of processes"),
    ],
)
def test_what_one_process_finds_wrong_ends_all_with_one_line(tmp_path, command_line, more, expected):
    port = free_port()
    places = [srun(port, rank, **more) for rank in (0, 1)]
    results = run_processes(launch, (print, arguments(*command_line), SHORT), places, tmp_path)
    assert [status for status, _ in results] == [2, 2]
    (line,) = error_lines(results)
    assert expected in line


def test_the_process_with_the_store_stays_until_the_others_know(capsys, monkeypatch):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    monkeypatch.setattr(module, "connect", lambda place, timeout: None)
    monkeypatch.setattr(module, "meet", lambda *arguments: ("a problem", 0))
    for name, value in srun(1, 0).items():
        monkeypatch.setenv(name, value)
    assert mistake(capsys, *ON_CPU) == "error: a problem" and pauses == [module.LINGER]
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(SystemExit):
        launch(pytest.fail, arguments(*ON_CPU))
    assert capsys.readouterr().err == "" and pauses == [module.LINGER]
