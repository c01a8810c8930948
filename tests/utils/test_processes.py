"""Two processes over gloo: one downloads first, and a mistake on any of them ends both with one line."""

import time

import pytest
import torch
from detectron2.utils import comm

import train_net
from hiervl.config import load_config
from hiervl.download import local_weights
from hiervl.errors import UserError
from hiervl.launch import launch
from hiervl.utils.processes import end_together, main_process_first
from tests.processes import error_lines, free_port, run_processes, srun


def run_two(body, tmp_path, *overrides):
    """[(exit status, stderr)] of two processes that end together after body(args)."""
    port, args = free_port(), train_net.parser().parse_args(["MODEL.DEVICE", "cpu", *overrides])
    return run_processes(launch, (body, args), [srun(port, 0), srun(port, 1)], tmp_path)


def fetch(args):
    url = load_config("", args.opts).MODEL.BACKBONE.WEIGHTS
    with main_process_first():
        path = local_weights(url, "KEY")
    with open(path, "rb") as file:
        assert file.read() == b"weights"


def fetch_together(args):
    end_together(fetch, args)


def test_the_first_process_downloads_and_the_other_finds_the_file(server, tmp_path):
    address, files, requests = server
    files["/net.pth"] = b"weights"
    results = run_two(fetch_together, tmp_path, "MODEL.BACKBONE.WEIGHTS", f"{address}/net.pth")
    assert [status for status, _ in results] == [0, 0], results
    assert requests == ["/net.pth"] * 2  # whether the server answers, and the file


def test_a_download_that_fails_ends_both_with_one_line(server, tmp_path):
    address, _, requests = server
    start = time.monotonic()
    results = run_two(fetch_together, tmp_path, "MODEL.BACKBONE.WEIGHTS", f"{address}/none.pth")
    assert [status for status, _ in results] == [2, 2]
    (line,) = error_lines(results)
    assert f"{address}/none.pth: cannot be fetched" in line
    assert len(requests) == 2 and time.monotonic() - start < 60  # the second process has not asked


def fail(args):
    with main_process_first():
        raise ValueError("a bug")


def test_a_bug_on_the_first_process_does_not_keep_the_other_waiting(tmp_path):
    first, second = run_two(fail, tmp_path)
    assert first[0] == 1 and "ValueError: a bug" in first[1]
    assert second[0] == 1 and "RuntimeError: process 0 failed: ValueError('a bug')" in second[1]


def sleep_on_rank_0(args):
    """Process 1 has a mistake, and process 0 does nothing in which it would notice that."""
    if comm.get_rank() == 1:
        raise UserError("a mistake")
    time.sleep(60)


def sleep_together(args):
    end_together(sleep_on_rank_0, args)


def exchange_on_rank_0(args):
    """Process 1 has a mistake, and process 0 is cut off in the middle of an exchange."""
    if comm.get_rank() == 1:
        raise UserError("a mistake")
    torch.distributed.barrier()


def exchange_together(args):
    end_together(exchange_on_rank_0, args)


@pytest.mark.parametrize("body", [sleep_together, exchange_together])
def test_a_mistake_of_one_process_ends_the_other(tmp_path, body):
    start = time.monotonic()
    results = run_two(body, tmp_path)
    assert [status for status, _ in results] == [2, 2] and time.monotonic() - start < 50
    assert error_lines(results) == ["error: a mistake"]


def different(args):
    if comm.get_rank() == 0:
        raise ValueError("a bug")
    torch.distributed.barrier()


def different_together(args):
    end_together(different, args)


def test_a_bug_keeps_its_stack_trace(tmp_path):
    (status, stderr), _ = run_two(different_together, tmp_path)
    assert status == 1 and "ValueError: a bug" in stderr


def test_alone_nothing_is_waited_for(capsys):
    assert end_together(lambda args: args + 1, 1) == 2
    with main_process_first():
        pass

    def mistake(args):
        raise UserError("a mistake")

    with pytest.raises(SystemExit) as exit_:
        end_together(mistake, None)
    assert exit_.value.code == 2 and capsys.readouterr().err == "error: a mistake\n"
    with pytest.raises(ZeroDivisionError):
        end_together(lambda args: 1 / args, 0)
