"""Starts a run on one process or on many.

torchrun and srun start the processes themselves, and each of them joins the others here. For `--num-gpus N`,
Detectron2's launch() starts them.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from detectron2 import engine
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from .config import load_config, visible_devices, why_no_gpu
from .errors import UserError
from .rendezvous import Greeting, Place, connect, find_place, meet, wait_for_server
from .utils.processes import LINGER, report

# How long a process waits for the others, at the start and in every collective. One process may be busy alone for
# minutes (downloading weights, writing an evaluation), but a lost machine must not cost a night.
TIMEOUT = timedelta(minutes=30)


def launch(main: Callable, args, timeout: timedelta = TIMEOUT) -> None:
    """Call main(args) in every process of the run; after a user's mistake, exit with status 2.

    Args:
        main: handles its own mistakes; see end_together.
        args: of Detectron2's command line.
        timeout: see TIMEOUT.
    """
    try:
        place = find_place(os.environ)
        if place is None:
            _spawn(main, args, timeout)
        elif place.world_size == 1:
            _check_options(args, place)
            main(args)
        else:
            _join(place, args, timeout)
            main(args)
            dist.destroy_process_group()
    except UserError as error:
        report(str(error))
        sys.exit(2)


def check_device(device: str, processes: int, what: str) -> None:
    """Check that each process of this machine has a device of its own.

    Args:
        device: MODEL.DEVICE.
        processes: number of processes on this machine.
        what: has asked for them, such as "--num-gpus 8".
    Raises:
        UserError: fewer GPUs than processes, or a MODEL.DEVICE that they would share.
    """
    if device == "cpu":
        return
    if device != "cuda":
        raise UserError(f"MODEL.DEVICE is {device}, which several processes would share; set it to cuda (or cpu).")
    reason = why_no_gpu()
    count = 0 if reason else torch.cuda.device_count()  # device_count() also counts GPUs that cannot be used
    if processes > count:
        reason = reason or f"PyTorch finds {count}{visible_devices()}"
        raise UserError(
            f"{what}: every process needs a GPU of its own, {processes} on this machine, but {reason}; start fewer "
            "processes, or set MODEL.DEVICE cpu to run on the CPU."
        )


def _spawn(main, args, timeout):
    """Detectron2's launch, with the failures of its processes in one line."""
    _check_machines(args)
    if args.num_gpus * args.num_machines > 1:
        device = load_config(args.config_file, args.opts).MODEL.DEVICE
        check_device(device, args.num_gpus, f"--num-gpus {args.num_gpus}")
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Detectron2 takes NCCL wherever it sees a GPU
        _await_machine_0(args, timeout)
    try:
        engine.launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
            timeout=timeout,
        )
    except ProcessExitedException as error:
        if error.exit_code == 2:  # it has reported a mistake
            sys.exit(2)
        raise
    except ProcessRaisedException as error:
        failure = re.search(r"in init_process_group\n.*?^[\w.]*Dist\w*Error: ([^\n]*)", str(error), re.M | re.S)
        if failure is None:
            raise
        raise _not_together(args, failure.group(1)) from None


def _await_machine_0(args, timeout):
    """Wait until machine 0 answers, on the others; PyTorch's own attempts end in pages of stack frames."""
    server = urlparse(args.dist_url)
    if args.machine_rank > 0 and server.scheme == "tcp":
        try:
            wait_for_server(server.hostname, server.port, timeout)
        except OSError as error:
            raise _not_together(args, error) from None


def _not_together(args, reason):
    return UserError(
        f"--dist-url {args.dist_url}: the {args.num_gpus * args.num_machines} processes have not come together there "
        f"({reason}); it must name the address of machine 0 and a free port that no firewall blocks, and be the same "
        f"on all machines (--num-machines {args.num_machines})."
    )


def _check_machines(args):
    for option, value in (("--num-gpus", args.num_gpus), ("--num-machines", args.num_machines)):
        if value < 1:
            raise UserError(f"{option} is {value}; it must be at least 1.")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank is {args.machine_rank}; with --num-machines {args.num_machines}, it must be from 0 to "
            f"{args.num_machines - 1}."
        )
    if args.num_machines > 1 and not re.fullmatch(r"tcp://.+:\d{1,5}|file:///.+", args.dist_url):
        raise UserError(f"--dist-url is {args.dist_url}; with several machines, name machine 0 as tcp://ADDRESS:PORT.")


def _join(place: Place, args, timeout):
    """Join the process group.

    What a process finds wrong before, it tells the others through the store; otherwise they would wait for it.
    """
    store = connect(place, timeout)
    device, gpu, problem = "", "", ""
    try:
        _check_options(args, place)
        device = load_config(args.config_file, args.opts).MODEL.DEVICE
        gpu = _take_gpu(device, place)
    except UserError as error:
        problem = str(error)
    problem, reporter = meet(store, place, Greeting(gpu, problem), timeout)
    if problem:
        if place.rank == reporter:
            report(problem)
        if place.hosts_store:
            time.sleep(LINGER)
        sys.exit(2)
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    comm.create_local_process_group(place.local_size)
    comm.synchronize()


def _check_options(args, place):
    """Check that the launcher's numbers agree with each other and with the command line."""
    if not place.local_size or place.world_size % place.local_size or place.rank % place.local_size != place.local_rank:
        raise UserError(
            f"{place.launcher}: every machine must run the same number of processes, numbered machine by machine; use "
            "--ntasks-per-node and --distribution=block with srun, and set LOCAL_WORLD_SIZE without torchrun."
        )
    machines = place.world_size // place.local_size
    for option, value, expected in (
        ("--num-gpus", args.num_gpus, place.local_size),
        ("--num-machines", args.num_machines, machines),
    ):
        if value not in (1, expected):
            raise UserError(
                f"{option} is {value}, but {place.launcher} has started {place.world_size} processes, "
                f"{place.local_size} per machine; leave the option out."
            )


def _take_gpu(device, place):
    """Choose the GPU of this process. Returns what identifies it among all machines; "" on the CPU."""
    # A process sees either all GPUs of its machine, or only its own (srun --gpus-per-task=1), which is then GPU 0.
    only_one = torch.cuda.device_count() == 1
    check_device(device, 1 if only_one else place.local_size, place.launcher)
    if device == "cpu":
        return ""
    torch.cuda.set_device(0 if only_one else place.local_rank)
    return f"{socket.gethostname()}, {torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
