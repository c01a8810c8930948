"""CutMix partners of other processes: every image is loaded and pseudo-labeled once, then sent to who needs it."""

import torch
import torch.distributed
from detectron2.utils import comm

from ..data.partners import remote_partners, slots_of
from .filters import PseudoLabels


def with_remote_partners(unlabeled: list, pseudo: PseudoLabels, weight: torch.Tensor):
    """Append the partners that belong to other processes. To be called by all processes.

    Args:
        unlabeled: this process's B samples; positions from B on in their `partner` mean remote partners, in the order
            of `remote_partners`. pseudo, weight (B, H, W): of the same images.
    Returns:
        the three with the remote partners appended. An appended sample has its strong views, and `extra` True. Without
        strong views nothing is mixed, and nothing appended.
    """
    rank, world_size = comm.get_rank(), comm.get_world_size()
    if not unlabeled[0]["strong"]:
        return unlabeled, pseudo, weight
    total = len(unlabeled) * world_size
    needed = remote_partners(rank, world_size, total)
    own, operations = slots_of(rank, world_size, total), []
    for other in range(world_size):
        for slot in remote_partners(other, world_size, total):
            if slot in own:  # never this process's own need
                sent = _pack(unlabeled, pseudo, weight, slot - own.start)
                operations += [torch.distributed.P2POp(torch.distributed.isend, value, other) for value in sent]
    received = []
    for slot in needed:
        values = [torch.empty_like(value) for value in _pack(unlabeled, pseudo, weight, 0)]
        owner = slot // len(own)
        operations += [torch.distributed.P2POp(torch.distributed.irecv, value, owner) for value in values]
        received.append(values)
    if operations:
        for request in torch.distributed.batch_isend_irecv(operations):
            request.wait()
    return _append(unlabeled, pseudo, weight, received)


def _pack(unlabeled, pseudo, weight, i) -> list:
    """What CutMix takes of image i, as tensors that every backend sends."""
    strong = torch.stack(unlabeled[i]["strong"]).to(weight.device, non_blocking=True)  # (V, 3, H, W) uint8
    maps = [pseudo.labels, pseudo.confidence, pseudo.valid.to(torch.uint8), pseudo.index, pseudo.highest]
    language = [] if pseudo.pixel_text is None else [pseudo.relevance, pseudo.pixel_text]
    return [strong, weight[i].contiguous(), *(value[i : i + 1].contiguous() for value in (*maps, *language))]


def _append(unlabeled, pseudo, weight, received):
    samples, parts, weights = list(unlabeled), [pseudo], [weight]
    for strong, of_pixel, labels, confidence, valid, index, highest, *language in received:
        # Only the device knows whether the partner has padding, and where: assume that it has.
        samples.append({"strong": list(strong), "padded": True, "extra": True})
        parts.append(
            PseudoLabels(
                labels, confidence, valid.bool(), pseudo.class_names, index, highest, *(language or (None, None))
            )
        )
        weights.append(of_pixel[None])
    return samples, PseudoLabels.concatenate(parts), torch.cat(weights)
