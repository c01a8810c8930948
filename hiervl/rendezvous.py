"""How the processes that torchrun or srun has started find each other."""

import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from .errors import UserError

_POLL = 0.1  # seconds
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """The place of this process in a run whose processes torchrun or srun has started.

    Attributes:
        launcher: "torchrun" or "srun", for messages.
        rank, world_size: number of this process in the run, and number of processes.
        local_rank, local_size: the same within this machine; local_size is 0 if the machines differ in it.
        address, port: of the store through which the processes meet.
        hosts_store: whether this process serves the store. torchrun does that itself.
        run: distinguishes this run, and torchrun's attempt at it, from others that might use the same port.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    hosts_store: bool
    run: str = ""

    @property
    def endpoint(self) -> str:
        return f"{self.address}:{self.port}"


def find_place(env: Mapping[str, str]) -> Place | None:
    """The place that environment variables assign; None for a process that was started alone.

    torchrun's variables come first, because on clusters it is srun that starts torchrun.
    """
    if all(name in env for name in _TORCHRUN):
        return _place_from_torchrun(env)
    return _place_from_srun(env) if _num_srun_tasks(env) > 1 else None


def _place_from_torchrun(env):
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    return Place(
        "torchrun",
        rank,
        size,
        int(env["LOCAL_RANK"]),
        int(env.get("LOCAL_WORLD_SIZE", size)),
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        hosts_store=rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        run=f"{env.get('TORCHELASTIC_RUN_ID', '')}.{env.get('TORCHELASTIC_RESTART_COUNT', '')}",
    )


def _num_srun_tasks(env):
    """Number of tasks that srun started together with this one; 1 without srun.

    A batch script, and what it starts without srun, sees SLURM_PROCID 0 and the SLURM_NTASKS of the whole job although
    it is a single process. Only srun sets SLURM_STEP_NUM_TASKS. Where SLURM_JOB_ID is absent too, somebody has passed
    on a few variables by hand, such as into a container.
    """
    if "SLURM_PROCID" not in env or ("SLURM_JOB_ID" in env and "SLURM_STEP_NUM_TASKS" not in env):
        return 1
    return int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)


def _place_from_srun(env):
    rank, size = int(env["SLURM_PROCID"]), _num_srun_tasks(env)
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(size)  # "8(x4)" or "4,3"
    sizes = {part.split("(")[0] for part in per_node.split(",")}
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "localhost"
    # The port depends on the job, because jobs may share a machine. From 32768 on, Linux uses ports for connections.
    port = 15000 + int(env.get("SLURM_JOB_ID") or 0) % 15000
    return Place(
        "srun",
        rank,
        size,
        int(env["SLURM_LOCALID"]),
        int(sizes.pop()) if len(sizes) == 1 else 0,
        env.get("MASTER_ADDR") or first_host(nodes),
        int(env.get("MASTER_PORT") or port),
        hosts_store=rank == 0,
        run=f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_STEP_ID', '')}",
    )


def first_host(nodes: str) -> str:
    """The first host of a list in SLURM's notation: node01 of "node[01-03,07],gpu5"."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])+", nodes).group()  # up to the first comma outside of brackets
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def connect(place: Place, timeout: timedelta) -> dist.Store:
    """The store of the run.

    Raises:
        UserError: it cannot be served, or nobody serves it within the timeout.
    """
    try:
        if not place.hosts_store:
            wait_for_server(place.address, place.port, timeout)
        store = dist.TCPStore(
            place.address,
            place.port,
            place.world_size,
            is_master=place.hosts_store,
            timeout=timeout,
            wait_for_workers=False,  # meet() waits, and says who is missing
        )
    except (OSError, dist.DistError) as error:
        raise UserError(
            f"{place.endpoint}: process {place.rank} of {place.world_size} cannot meet the others there "
            f"({str(error).splitlines()[0]}); set MASTER_ADDR to the address of process 0's machine, and MASTER_PORT "
            "to a free port that no firewall blocks."
        ) from None
    return dist.PrefixStore(f"hiervl/{place.run}", store)


def wait_for_server(address: str, port: int, timeout: timedelta) -> None:
    """Return as soon as a server accepts connections. PyTorch's own attempts end in pages of stack frames.

    Raises:
        OSError: the address is unknown, or nobody answers within the timeout.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except socket.gaierror:
            raise
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(f"{error.strerror or error}, for {timeout.total_seconds():g} s") from None
        time.sleep(_POLL)


@dataclass(frozen=True)
class Greeting:
    """What a process tells the others when they meet: what identifies its GPU ("" without one), and the mistake of the
    user that it has found, in one line ("" if none)."""

    gpu: str = ""
    problem: str = ""


def meet(store: dist.Store, place: Place, greeting: Greeting, timeout: timedelta) -> tuple[str, int]:
    """Wait for the greetings of all processes.

    Returns:
        what is wrong with the run, in one line, or ""; and the rank of the process that should report it. All processes
        get the same answer.
    Raises:
        UserError: the process that serves the store has ended.
    """
    keys = [f"greeting/{rank}" for rank in range(place.world_size)]
    try:
        store.set(keys[place.rank], json.dumps([greeting.gpu, greeting.problem]))
        deadline = time.monotonic() + timeout.total_seconds()
        while not store.check(keys):
            if time.monotonic() > deadline:
                present = [rank for rank, key in enumerate(keys) if store.check([key])]
                return _missing(place, present, timeout), present[0]
            time.sleep(_POLL)
        greetings = [Greeting(*json.loads(store.get(key))) for key in keys]
    except dist.DistError:
        raise UserError(
            f"{place.endpoint}: process {place.rank} has lost the connection to process 0, whose output says why."
        ) from None
    return _first_problem(greetings), 0


def _missing(place, present, timeout):
    missing = sorted(set(range(place.world_size)) - set(present))
    return (
        f"{place.endpoint}: only {len(present)} of {place.world_size} processes have come there within "
        f"{timeout.total_seconds():g} s; missing: {', '.join(map(str, missing[:8]))}{', ...' * (len(missing) > 8)}. "
        "Look for their errors, and whether their machines can reach that address."
    )


def _first_problem(greetings):
    """The mistake of the first process that has one, or a GPU that two processes use."""
    for greeting in greetings:
        if greeting.problem:
            return greeting.problem
    user = {}
    for rank, greeting in enumerate(greetings):
        if greeting.gpu and greeting.gpu in user:
            return (
                f"processes {user[greeting.gpu]} and {rank} would share one GPU ({greeting.gpu}); start as many "
                "processes per machine as it has GPUs, or set MODEL.DEVICE cpu."
            )
        user[greeting.gpu] = rank
    return ""
