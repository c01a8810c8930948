"""The device of a run: a GPU if PyTorch can use one, and otherwise the reason why it cannot."""

import glob
import os
import shutil
import warnings

import torch
from detectron2.config import CfgNode as CN

from ..errors import UserError

_DRIVER = "/proc/driver/nvidia/gpus/*"  # the NVIDIA driver lists its GPUs here; WSL has only nvidia-smi


def use_cpu_without_gpu(cfg: CN) -> str:
    """Change MODEL.DEVICE from Detectron2's default, a GPU, to the CPU on a machine that has no GPU.

    Returns:
        why the CPU is used, for the log; "" if MODEL.DEVICE is left as it is.
    Raises:
        UserError: the machine has an NVIDIA GPU that PyTorch cannot use, or MODEL.DEVICE names a GPU that does not
            exist. Training on the CPU instead would take weeks before anybody noticed.
    """
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        return ""
    reason = why_no_gpu()
    if not reason:
        _check_index(cfg.MODEL.DEVICE)
        return ""
    if has_nvidia_gpu():
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE} and this machine seems to have an NVIDIA GPU, but {reason}; make it "
            "usable, or set MODEL.DEVICE cpu to run on the CPU."
        )
    cfg.MODEL.DEVICE = "cpu"
    return reason


def why_no_gpu() -> str:
    """Why PyTorch can use no GPU, as part of a sentence; "" if it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of an old driver; the reason is returned instead
        if torch.cuda.is_available():
            return ""
    if not torch.backends.cuda.is_built():
        return f"PyTorch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
        reason = "PyTorch finds no GPU"
    except (RuntimeError, AssertionError) as error:
        # The first sentence is the reason; PyTorch goes on with addresses to download drivers from.
        reason = "PyTorch reports: " + " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return reason + visible_devices()


def visible_devices() -> str:
    """What CUDA_VISIBLE_DEVICES hides, as an addition to a reason; "" if it is not set."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if value is None else f" (CUDA_VISIBLE_DEVICES is {value!r})"


def has_nvidia_gpu() -> bool:
    """Whether the machine seems to have an NVIDIA GPU, whatever PyTorch says."""
    return bool(glob.glob(_DRIVER)) or shutil.which("nvidia-smi") is not None


def _check_index(device):
    index, count = torch.device(device).index, torch.cuda.device_count()
    if index is not None and index >= count:
        raise UserError(
            f"MODEL.DEVICE is {device}, but the last GPU is cuda:{count - 1}{visible_devices()}; name one that exists."
        )
