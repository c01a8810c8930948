"""Trainings run side by side, survive interruptions, and fail alone. Most of them are a stand-in for train_net.py."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from tools.analysis.campaign import report, running
from tools.analysis.campaign.__main__ import main
from tools.analysis.campaign.checks import check_folders
from tools.analysis.campaign.definition import read_campaign

TINY = {
    "MODEL.BACKBONE.TIMM.NAME": "lcnet_050",
    "MODEL.PIXEL_DECODER": {"CONV_DIM": 32, "MASK_DIM": 32},
    "MODEL.DECODER": {"HIDDEN_DIM": 32, "NUM_QUERIES": 8},
    "MODEL.CRITERION.NUM_POINTS": 128,
    "DATASETS.SPLIT": "shapes/splits/seed0/4",
    "SOLVER": {"MAX_ITER": 2, "IMS_PER_BATCH": 2, "LOG_PERIOD": 1},
}


def states(campaign):
    return {t.label: json.loads((Path(t.folder) / "state.json").read_text()) for t in campaign.trainings}


def facts(campaign):
    return json.loads(Path(report.files(campaign)[1]).read_text())


def send(number, campaign, iteration):
    """Signal this process as soon as the first training has reached this iteration."""
    state = Path(campaign.trainings[0].folder) / "state.json"

    def wait():
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if state.exists() and json.loads(state.read_text())["iteration"] >= iteration:
                break
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_campaign_from_start_to_end(write, stand_in, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(running, "cores", lambda: 5)
    campaign = read_campaign(write(jobs=2))
    assert main([campaign.path]) == 0
    out = capsys.readouterr().out
    assert {(state["starts"], state["threads"]) for state in states(campaign).values()} == {(1, "2")}
    # 6 iterations: 6 times the length of the name and the seed, and 1 + 2 + 0 + 1 + 2 + 0.
    assert facts(campaign)["runs"]["plain"]["seeds"]["1"]["teacher"]["last"] == 6 * (5 + 1) + 6
    assert facts(campaign)["differences"]["changed"]["teacher"]["last"]["mean"] == 6 * 2
    assert re.search(r"4 trainings; 0 finished before; 2 at a time; 2 threads each", out)
    assert "0 of 4 done, 2 running, 2 waiting; plain/seed_0" in out and "4 of 4 done, 0 running, 0 waiting" in out
    assert main([campaign.path]) == 0  # nothing is trained again
    assert "4 trainings; 4 finished before\n" in capsys.readouterr().out
    assert {state["starts"] for state in states(campaign).values()} == {1}


@pytest.mark.parametrize("jobs, at_once", [(1, False), (2, True)])
def test_trainings_run_side_by_side(write, stand_in, jobs, at_once):
    stand_in(seconds=0.1)
    campaign = read_campaign(write(runs={"plain": {}}))
    assert main([campaign.path, "--jobs", str(jobs)]) == 0
    first, second = (state["from_to"] for state in states(campaign).values())
    assert (second[0] < first[1]) == at_once


@pytest.fixture
def heard():
    """``heard(number)``: this process does not ignore a signal, as it may where the tests run in the background."""
    before = {}

    def hear(number, handler=signal.default_int_handler):
        before[number] = signal.signal(number, handler)

    yield hear
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_campaign_goes_on(write, stand_in, capsys, heard, number):
    heard(number)
    campaign = read_campaign(write(jobs=2))
    assert main([campaign.path]) == 0
    expected = Path(report.files(campaign)[0]).read_text()
    for training in campaign.trainings:
        for name in ("state.json", "results.json", "metrics.json"):
            (Path(training.folder) / name).unlink()
    stand_in(seconds=0.15)
    thread = send(number, campaign, iteration=2)
    assert main([campaign.path]) == 128 + number
    thread.join()
    assert "The same command resumes" in capsys.readouterr().out
    assert signal.getsignal(number) is signal.default_int_handler
    with running.one_at_a_time(campaign.output):  # so no training is left
        pass
    with open(os.path.join(campaign.trainings[0].folder, "metrics.json"), "a") as file:
        file.write('{"iteration": ')  # killed while it wrote a line
    stand_in()
    assert main([campaign.path]) == 0
    assert states(campaign)["plain/seed_0"]["starts"] == 2 and states(campaign)["plain/seed_1"]["starts"] == 1
    assert Path(report.files(campaign)[0]).read_text() == expected


def test_a_signal_that_is_ignored_stays_ignored(write, stand_in, heard):
    heard(signal.SIGHUP, signal.SIG_IGN)  # nohup
    stand_in(seconds=0.05)
    campaign = read_campaign(write(seeds=[0]))
    thread = send(signal.SIGHUP, campaign, iteration=2)
    assert main([campaign.path]) == 0
    thread.join()


def test_a_training_that_fails_stops_no_other(write, stand_in, capsys):
    campaign = read_campaign(write(jobs=2))
    stand_in(fail="changed/0", die="plain/1")
    assert main([campaign.path]) == 1
    out = capsys.readouterr().out
    assert "2 of 4 done, 0 running, 0 waiting, 2 failed" in out
    ending = out.split("2 of 4 trainings failed")[1]
    assert re.search(r"changed/seed_0: RuntimeError: the disk is full \(log: .*changed/seed_0/campaign.log\)", ending)
    assert re.search(r"plain/seed_1: ended by signal 9 \(Killed\), perhaps for lack of memory", ending)
    assert facts(campaign)["differences"]["changed"]["unpaired"] == [0, 1]
    stand_in()
    assert main([campaign.path]) == 0
    assert facts(campaign)["differences"]["changed"]["unpaired"] == []


def test_a_training_that_ends_too_early(write, stand_in, capsys, monkeypatch, tmp_path):
    empty = tmp_path / "empty.py"
    empty.write_text("")
    monkeypatch.setattr(running, "TRAIN_NET", empty)
    campaign = read_campaign(write(seeds=[0]))
    assert main([campaign.path]) == 1
    assert "plain/seed_0: ended without results for its last iteration" in capsys.readouterr().out


def test_what_is_finished_needs_no_data(write, stand_in, monkeypatch, capsys, tmp_path):
    campaign = read_campaign(write())
    assert main([campaign.path]) == 0
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert main([campaign.path]) == 0
    os.remove(os.path.join(campaign.trainings[3].folder, "results.json"))
    assert main([campaign.path]) == 2
    assert "changed/seed_1: " in capsys.readouterr().err
    assert states(campaign)["changed/seed_1"]["starts"] == 1


def test_a_folder_is_locked_as_long_as_anything_runs_there(write, stand_in, capsys):
    campaign = read_campaign(write(seeds=[0]))
    stand_in(seconds=60)
    with running.one_at_a_time(campaign.output) as lock:
        assert main([campaign.path]) == 2
        assert "another campaign, or a training that it started, is still running" in capsys.readouterr().err
        output = check_folders(campaign, report.files(campaign))
        output.add([training.log for training in campaign.trainings])
        orphan = running.Runner(campaign, 1, lock)._start(campaign.trainings[0], slot=0).process
    try:
        assert main([campaign.path]) == 2  # the campaign has ended, its training has not
    finally:
        orphan.kill()
        orphan.wait()
    stand_in()
    assert main([campaign.path]) == 0


def test_trainings_are_spread_over_gpus(write, stand_in, monkeypatch):
    stand_in(seconds=0.05)
    monkeypatch.setattr(running, "why_no_gpu", lambda: "")
    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    campaign = read_campaign(write(jobs=4))
    assert running.visible_gpus(campaign) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-abc")
    assert main([campaign.path]) == 0
    assert [state["gpu"] for state in states(campaign).values()] == ["5", "GPU-abc"] * 2
    named = read_campaign(write(runs={"plain": {"overrides": {"MODEL.DEVICE": "cuda:1"}}}))
    assert running.visible_gpus(named) == []


def test_the_users_number_of_threads_counts(write, stand_in, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    campaign = read_campaign(write(seeds=[0]))
    assert main([campaign.path]) == 0
    assert {state["threads"] for state in states(campaign).values()} == {"3"}


def test_more_jobs_than_cores(monkeypatch):
    monkeypatch.setattr(running, "cores", lambda: 2)
    assert [running.threads(jobs) for jobs in (1, 2, 3)] == [2, 1, 1]


def test_the_time_that_is_left(write, monkeypatch):
    campaign = read_campaign(write(jobs=2))
    runner = running.Runner(campaign, 2, lock=-1)
    assert runner.seconds_left() is None
    runner._pace = {"plain": 10.0, "changed": 20.0}  # seconds per iteration; 6 iterations each
    assert runner.seconds_left() == (60 + 120 + 60 + 120) / 2
    runner.waiting = campaign.trainings[1:2]  # one is left: there is no help in the second job
    assert runner.seconds_left() == 120
    runner._pace = {"plain": 10.0}
    assert runner.seconds_left() == 60


@pytest.mark.parametrize(
    "seconds, text", [(45, "about 45 s"), (600, "about 10 min"), (3599, "about 1 h 0 min"), (7500, "about 2 h 5 min")]
)
def test_durations(seconds, text):
    assert running.duration(seconds) == text


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_a_wrong_number_of_jobs(write, capsys, jobs):
    assert main([write(), "--jobs", jobs]) == 2
    assert f"--jobs {jobs}: must be at least 1" in capsys.readouterr().err


def test_a_config_that_is_edited_while_the_campaign_runs(write, stand_in, capsys, monkeypatch):
    campaign = read_campaign(write(seeds=[0]))
    other = read_campaign(write(seeds=[0], overrides={"SOLVER.MAX_ITER": 7})).trainings[0]
    write(seeds=[0])
    finish = running.Runner.run

    def run(self):
        finish(self)
        (Path(other.folder) / "config.yaml").write_text(other.cfg.dump())

    monkeypatch.setattr(running.Runner, "run", run)
    assert main([campaign.path]) == 2
    assert "plain/seed_0: contains a run with" in capsys.readouterr().err


def test_the_real_trainer(write, capsys):
    """Its files are those that the campaign reads, and its config is that of the definition."""
    campaign = read_campaign(write(runs={"plain": {}}, overrides=TINY, seeds=[0]))
    assert main([campaign.path]) == 0, capsys.readouterr().out
    seeds = facts(campaign)["runs"]["plain"]["seeds"]
    assert set(seeds) == {"0"} and set(seeds["0"]) == {"student", "teacher"}
    assert main([campaign.path]) == 0
    assert "1 training; 1 finished before" in capsys.readouterr().out
