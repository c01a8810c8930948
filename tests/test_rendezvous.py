"""Where torchrun and SLURM put a process, and how processes meet before a run."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from hiervl.errors import UserError
from hiervl.rendezvous import Greeting, Place, connect, find_place, first_host, meet

from .processes import free_port

SHORT = timedelta(seconds=0.3)
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29501",
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
JOB = {"SLURM_JOB_ID": "31007", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NODELIST": "gpu[07-08]"}
BATCH_SCRIPT = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {
    **BATCH_SCRIPT,
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_torchruns_variables():
    place = Place("torchrun", 5, 8, 1, 4, "node1", 29501, hosts_store=False, run="abc.2")
    assert find_place(TORCHRUN) == place
    assert find_place({**SRUN, **TORCHRUN}) == place  # srun torchrun ...
    assert not find_place({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}).hosts_store  # torchrun does
    by_hand = {key: value for key, value in TORCHRUN.items() if "ELASTIC" not in key}
    assert not find_place(by_hand).hosts_store
    assert find_place({**by_hand, "RANK": "0", "LOCAL_RANK": "0"}).hosts_store


def test_sruns_variables():
    port = 15000 + 31007 % 15000
    assert find_place(SRUN) == Place("srun", 5, 8, 1, 4, "gpu07", port, hosts_store=False, run="31007.3")
    assert find_place({**SRUN, "SLURM_PROCID": "0"}).hosts_store
    chosen = find_place({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert chosen.endpoint == "10.0.0.1:4000"
    # A step with fewer tasks than the job.
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "gpu08"}
    place = find_place({**SRUN, **step})
    assert (place.world_size, place.local_size, place.address) == (2, 2, "gpu08")
    assert find_place({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4,3"}).local_size == 0
    few = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "SLURM_NODELIST": "box"}
    assert find_place(few) == Place("srun", 1, 2, 1, 2, "box", 15000, hosts_store=False, run=".")


@pytest.mark.parametrize(
    "env",
    [
        {},
        JOB,  # salloc
        BATCH_SCRIPT,
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "pod-0",
            "MASTER_PORT": "23456",
        },  # Kubernetes: ranks of machines
    ],
)
def test_a_process_of_its_own(env):
    assert find_place(env) is None


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node01", "node01"),
        ("node01,node02", "node01"),
        ("node[01-03,07],gpu5", "node01"),
        ("node[7,9]", "node7"),
        ("rack[1-2]node[08-11]-ib,x", "rack1node08-ib"),
        ("a.example.org,b.example.org", "a.example.org"),
    ],
)
def test_the_first_host(nodes, host):
    assert first_host(nodes) == host


def places(size):
    return [Place("srun", rank, size, rank, size, "box", 1, hosts_store=rank == 0) for rank in range(size)]


def meet_all(greetings, timeout=timedelta(seconds=20)):
    """What each process hears; None in place of a greeting: this one does not come."""
    store = dist.HashStore()
    present = [(place, greeting) for place, greeting in zip(places(len(greetings)), greetings) if greeting]
    with ThreadPoolExecutor(len(greetings)) as pool:
        return list(pool.map(lambda pair: meet(store, *pair, timeout), present))


def test_processes_that_agree():
    assert meet_all([Greeting(), Greeting()]) == [("", 0)] * 2
    assert meet_all([Greeting("a, 1"), Greeting("a, 2"), Greeting("b, 1")]) == [("", 0)] * 3


def test_the_first_problem_is_everybodys():
    answers = meet_all([Greeting("a, 1"), Greeting("", "no GPU"), Greeting("", "no config")])
    assert answers == [("no GPU", 0)] * 3


def test_two_processes_on_one_gpu():
    answers = meet_all([Greeting("a, 1"), Greeting("b, 1"), Greeting("a, 1")])
    assert answers[0] == answers[1] == answers[2]
    assert "processes 0 and 2 would share one GPU (a, 1)" in answers[0][0]


def test_processes_that_do_not_come():
    answers = meet_all([None, Greeting(), Greeting(), None], SHORT)
    assert answers[0] == answers[1] and answers[0][1] == 1  # process 1 reports it
    assert "box:1: only 2 of 4 processes have come there within 0.3 s; missing: 0, 3." in answers[0][0]


def test_a_store_that_is_not_there(monkeypatch):
    port = free_port()
    with pytest.raises(UserError, match=rf"127.0.0.1:{port}: process 1 of 2 .*refused, for 0.3 s.*MASTER_ADDR"):
        connect(Place("srun", 1, 2, 1, 2, "127.0.0.1", port, hosts_store=False), SHORT)
    with pytest.raises(UserError, match="no-such-host.invalid:1: .*MASTER_ADDR"):
        connect(Place("srun", 1, 2, 1, 2, "no-such-host.invalid", 1, hosts_store=False), timedelta(minutes=30))


def test_a_port_that_is_taken():
    place = Place("srun", 0, 2, 0, 2, "127.0.0.1", free_port(), hosts_store=True)
    store = connect(place, SHORT)
    with pytest.raises(UserError, match=f"{place.port}: process 0 of 2 .*address already in use.*MASTER_PORT"):
        connect(place, SHORT)
    del store


def test_runs_on_one_port_do_not_hear_each_other():
    port = free_port()
    first = connect(Place("srun", 0, 2, 0, 2, "127.0.0.1", port, hosts_store=True, run="1.0"), SHORT)
    other = connect(Place("srun", 1, 2, 1, 2, "127.0.0.1", port, hosts_store=False, run="2.0"), SHORT)
    other.set("key", "value")
    assert not first.check(["key"])
