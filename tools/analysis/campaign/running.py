"""Runs the trainings of a campaign as processes, several at a time; every one of them can be resumed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hiervl.config import why_no_gpu
from hiervl.data.prepare.parallel import cores
from hiervl.errors import UserError

from .definition import Campaign, Training
from .records import drop_partial_line, is_finished, last_error, last_iteration, size

TRAIN_NET = Path(__file__).resolve().parents[3] / "train_net.py"
PERIOD = 60.0  # seconds between lines of progress
POLL = 0.5
PATIENCE = 10.0  # seconds that a training may take to end
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def say(line: str) -> None:
    print(line, flush=True)


@dataclass
class Job:
    """A training in a process group of its own: Ctrl-C reaches only the campaign, which then ends all trainings.

    Attributes:
        slot: number from 0 to jobs - 1, different from those of the other running trainings.
        log_start, metrics_start: sizes of campaign.log and metrics.json before it was started.
        signs: (iteration, time) of the first and the last progress seen.
    """

    training: Training
    slot: int
    process: subprocess.Popen
    log_start: int
    metrics_start: int
    signs: list = field(default_factory=list)

    def iteration(self) -> int:
        return last_iteration(self.training, self.metrics_start)

    def state(self) -> str:
        """What it is doing, for the progress line."""
        done, total = self.iteration(), self.training.iterations
        return "starting" if not done else "evaluating" if done == total else f"{done}/{total}"

    def look(self) -> None:
        """Update `signs`."""
        found = self.iteration()
        if found and (not self.signs or found > self.signs[-1][0]):
            self.signs = [*self.signs[:1], (found, time.monotonic())]

    def seconds_per_iteration(self) -> float | None:
        """None until progress has been seen twice."""
        if len(self.signs) < 2:
            return None
        (first, start), (last, end) = self.signs
        return (end - start) / (last - first)


class Runner:
    """Runs the unfinished trainings of a campaign.

    Args:
        lock: descriptor of the output folder's lock, see `one_at_a_time`.
        say: called with each line of progress.

    Attributes:
        failures: {training's label: what went wrong}.
        interrupted: number of the signal that ended it, 0 for none.
    """

    def __init__(self, campaign: Campaign, jobs: int, lock: int, say=say):
        self.campaign, self.lock, self.say = campaign, lock, say
        self.waiting = [training for training in campaign.trainings if not is_finished(training)]
        self.jobs = min(jobs, len(self.waiting)) or 1
        self.running: list[Job] = []
        self.failures: dict[str, str] = {}
        self.interrupted = 0
        self._pace: dict[str, float] = {}  # run -> seconds per iteration
        self._gpus = visible_gpus(campaign)

    def run(self) -> None:
        """Returns when all trainings have ended by themselves or been ended by a signal."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._catch_signals())
            stack.callback(self._end_all)
            self.say(self.plan())
            reported = 0.0
            while (self.waiting or self.running) and not self.interrupted:
                changed = self._collect_ended() + self._fill_slots()
                for job in self.running:
                    job.look()
                if changed or time.monotonic() - reported >= PERIOD:
                    self.say(self.progress())
                    reported = time.monotonic()
                time.sleep(POLL)

    def plan(self) -> str:
        """One line, before anything is started."""
        total = len(self.campaign.trainings)
        parts = [f"{total} training{'s' * (total != 1)}", f"{total - len(self.waiting)} finished before"]
        if self.waiting:
            parts += [f"{self.jobs} at a time"]
            threads = self._environment(0)["OMP_NUM_THREADS"]
            parts += [f"{threads} thread{'s' * (threads != '1')} each"]
            parts += [f"GPU {', '.join(self._gpus)}"] if self._gpus else []
        return f"{self.campaign.output}: {'; '.join(parts)}"

    def _fill_slots(self):
        """Start trainings while there are free slots. Returns how many."""
        count = 0
        while self.waiting and len(self.running) < self.jobs and not self.interrupted:
            slot = min(set(range(self.jobs)) - {job.slot for job in self.running})
            self.running.append(self._start(self.waiting.pop(0), slot))
            count += 1
        return count

    def _start(self, training, slot):
        os.makedirs(training.folder, exist_ok=True)
        metrics = os.path.join(training.folder, "metrics.json")
        drop_partial_line(metrics)
        log_start, metrics_start = size(training.log), size(metrics)
        with open(training.log, "a") as log:
            process = subprocess.Popen(
                command(training),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                start_new_session=True,
                pass_fds=[self.lock],  # the folder stays locked as long as a training writes into it
            )
        return Job(training, slot, process, log_start, metrics_start)

    def _environment(self, slot):
        result = {"OMP_NUM_THREADS": str(threads(self.jobs))} | os.environ
        if self._gpus:
            result["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        return result

    def _collect_ended(self):
        """Record the trainings that have ended. Returns how many."""
        ended = [job for job in self.running if job.process.poll() is not None]
        for job in ended:
            self._note_pace(job)
            self.running.remove(job)
            kill_group(job.process)  # data workers may outlive it
            if reason := failure(job):
                self.failures[job.training.label] = reason
                self.say(f"{job.training.label} failed: {reason}")
        return len(ended)

    def _note_pace(self, job):
        if pace := job.seconds_per_iteration():
            self._pace[job.training.run] = pace

    def progress(self) -> str:
        """One line: counts, the state of each running training, and the remaining time."""
        done = len(self.campaign.trainings) - len(self.waiting) - len(self.running) - len(self.failures)
        failed = f", {len(self.failures)} failed" if self.failures else ""
        each = [f"{job.training.label} {job.state()}" for job in self.running]
        line = (
            f"{time.strftime('%H:%M:%S')}  {done} of {len(self.campaign.trainings)} done, {len(self.running)} "
            f"running, {len(self.waiting)} waiting{failed}"
        )
        left = self.seconds_left()
        return "; ".join([line, *([", ".join(each)] if each else []), *([f"{duration(left)} left"] if left else [])])

    def seconds_left(self) -> float | None:
        """Estimated from the pace of each run; for a run without one, from the mean of the others.

        None if no pace is known yet.
        """
        for job in self.running:
            self._note_pace(job)
        if not self._pace:
            return None
        usual = sum(self._pace.values()) / len(self._pace)
        unfinished = [*(job.training for job in self.running), *self.waiting]
        seconds = [(t.iterations - last_iteration(t)) * self._pace.get(t.run, usual) for t in unfinished]
        return max([sum(seconds) / self.jobs, *seconds])

    @contextlib.contextmanager
    def _catch_signals(self):
        """Make signals set `interrupted`, which ends the loop. Ignored signals (SIGHUP under nohup) stay ignored."""

        def note(number, frame):
            self.interrupted = number

        before = {number: signal.getsignal(number) for number in SIGNALS}
        caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        for number in caught:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number in caught:
                signal.signal(number, before[number])

    def _end_all(self):
        """End the running trainings. They write checkpoints and results atomically, so a kill damages nothing."""
        for job in self.running:
            signal_group(job.process, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        for job in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(max(0.0, deadline - time.monotonic()))
            kill_group(job.process)
            job.process.wait()


def command(training: Training) -> list[str]:
    """The command that starts or resumes a training: without a checkpoint, --resume starts from the beginning."""
    start = [sys.executable, "-W", "ignore", str(TRAIN_NET), "--config-file", training.config, "--resume"]
    return [*start, *training.overrides]


def threads(jobs: int) -> int:
    """Threads of each training if OMP_NUM_THREADS is not set."""
    return max(1, cores() // jobs)


def visible_gpus(campaign: Campaign) -> list[str]:
    """The GPUs over which the trainings are spread, as in CUDA_VISIBLE_DEVICES; [] on a CPU or where the config names
    one (cuda:1)."""
    if why_no_gpu() or any(t.cfg.MODEL.DEVICE != "cuda" for t in campaign.trainings):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",") if name.strip()] or [
        str(index) for index in range(torch.cuda.device_count())
    ]


@contextlib.contextmanager
def one_at_a_time(output: str):
    """Yields the descriptor of a lock on the output folder. Processes that inherit it keep the folder locked.

    Raises:
        UserError: another campaign, or a training left behind by a killed one, is running there.
    """
    import fcntl  # not on Windows, where collecting works

    os.makedirs(output, exist_ok=True)
    with open(os.path.join(output, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{output}: another campaign, or a training that it started, is still running there; wait for it, "
                "or look with --collect-only."
            ) from None
        yield file.fileno()


def failure(job: Job) -> str:
    """What went wrong in a training that has ended, "" if nothing did."""
    code, place = job.process.returncode, f"(log: {job.training.log})"
    if is_finished(job.training):
        return ""
    if code == 0:
        return f"ended without results for its last iteration {place}"
    if code < 0:
        memory = ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
        return f"ended by signal {-code} ({signal.strsignal(-code)}){memory} {place}"
    return f"{last_error(job.training, job.log_start)} {place}"


def signal_group(process: subprocess.Popen, number: int) -> None:
    """Signal a training and its data workers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of one that has ended
        os.killpg(process.pid, number)


def kill_group(process: subprocess.Popen) -> None:
    signal_group(process, signal.SIGKILL)


def duration(seconds: float) -> str:
    """Such as "about 2 h 5 min"."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min"
