"""Copies from the host to a device that the host does not wait for."""

import torch


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """Copy a tensor that is on the host. To a GPU it goes through pinned memory, so that the copy is asynchronous."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def stack_on_device(tensors, device) -> torch.Tensor:
    """Stack tensors of one shape on the device.

    Each is copied on its own: what the data loader has pinned is copied asynchronously, a stack of it would not be.
    """
    return torch.stack([tensor.to(device, non_blocking=True) for tensor in tensors])
