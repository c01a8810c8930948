"""DistributedDataParallel over one process: losses and gradients are those of the network without it.

The process group is NCCL's on a GPU and gloo's on a CPU. Two steps, because a parameter without a gradient stops the
second one.
"""

import copy
import os
import tempfile

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from hiervl.semi.trainer import may_lack_gradients

from . import networks
from .findings import Findings, Settings
from .parity import gradient_errors, loss_errors, worst

LIMIT = 1e-4  # sums on a GPU come in no fixed order
STEPS = 2


def run(settings: Settings, findings: Findings) -> None:
    cfg = networks.config("shapes", settings)
    network = networks.build(cfg)
    networks.leave_pixel_centers(network)
    alone = copy.deepcopy(network)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # the machine may have no other
    backend = "nccl" if settings.on_gpu else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            findings.check("process group", distributed.get_backend() == backend, distributed.get_backend(), backend)
            wrapped = DistributedDataParallel(
                network,
                device_ids=[torch.cuda.current_device()] if settings.on_gpu else None,
                broadcast_buffers=False,
                find_unused_parameters=may_lack_gradients(cfg),
            )
            images = 1 if settings.tiny else 4
            inputs = networks.training_inputs(images, images, networks.TINY_SIZE, network)
            for step in range(STEPS):
                compare(wrapped, network, alone, inputs, f"step {step + 1}", findings)
        finally:
            distributed.destroy_process_group()


def compare(
    wrapped: DistributedDataParallel,
    network: torch.nn.Module,
    alone: torch.nn.Module,
    inputs: list[dict],
    step: str,
    findings: Findings,
) -> None:
    """Checks of one step. The weights do not change between the steps."""
    losses, gradients = networks.losses_and_gradients(wrapped, network, inputs)
    true_losses, true_gradients = networks.losses_and_gradients(alone, alone, inputs)
    lost = true_gradients.keys() ^ gradients.keys()
    findings.check(f"{step}: the same parameters have gradients", not lost, ", ".join(sorted(lost)[:3]))
    name, error = worst(loss_errors(losses, true_losses))
    findings.at_most(f"{step}: {name}, relative", error, LIMIT)
    part, error = worst(gradient_errors(gradients, true_gradients))
    findings.at_most(f"{step}: gradients of {part}, relative", error, LIMIT)
