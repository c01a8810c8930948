"""The machine: card, driver, versions, and the number formats that it computes in."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

from tools.benchmark import common

from .findings import Findings, Settings

_QUERY = "driver_version,memory.total,power.limit,clocks.max.sm,pcie.link.gen.current"


def run(settings: Settings, findings: Findings) -> None:
    if settings.on_gpu:
        findings.check("torch finds a GPU", torch.cuda.is_available(), torch.cuda.device_count(), 1)
    facts = {"torch": torch.__version__, "CUDA of torch": torch.version.cuda or "none"}
    if torch.cuda.is_available():
        facts = card() | facts
    facts |= {"nvcc": nvcc_release() or "not found", "python": platform.python_version()}
    facts |= {"processor": common.processor_name(), "cores": os.cpu_count(), "platform": sys.platform}
    for name, value in facts.items():
        findings.fact(name, value)
    if facts["nvcc"] != "not found" and torch.version.cuda:
        fits = facts["nvcc"].split(".")[0] == torch.version.cuda.split(".")[0]
        findings.note(f"nvcc {facts['nvcc']} {'fits' if fits else 'does NOT fit'} torch's CUDA {torch.version.cuda}.")
    # A product in a number format is worth more than a flag that claims it.
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ones = torch.ones(64, 64, device=settings.device, dtype=dtype)
        findings.check(f"products in {str(dtype)[6:]}", bool((ones @ ones == 64).all()))


def card() -> dict:
    """What torch and, if it is installed, nvidia-smi say of the first GPU."""
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    facts = {
        "card": properties.name,
        "GPUs": torch.cuda.device_count(),
        "memory GiB": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "compute capability": f"{major}.{minor}",
        "L2 cache MiB": l2_bytes() / 2**20,
        "bfloat16": "yes" if torch.cuda.is_bf16_supported(including_emulation=False) else "no",
        "TF32": "yes" if major >= 8 else "no",
        "cuDNN": torch.backends.cudnn.version(),
    }
    return facts | nvidia_smi()


def l2_bytes() -> int:
    """Size of the first GPU's L2 cache; 4 MiB where torch does not say."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 4 * 2**20)


def nvidia_smi() -> dict:
    """Driver, power limit and clock of the first GPU; nothing without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    values = [value.strip() for value in result.stdout.strip().split(",")]
    names = _QUERY.split(",")
    return dict(zip(names, values)) if len(values) == len(names) else {}


def toolkit() -> str | None:
    """Folder of the CUDA toolkit, from CUDA_HOME, the PATH or where it usually is; None if there is none."""
    home = cpp_extension.CUDA_HOME
    return home if home and Path(home, "bin", "nvcc").exists() else None


def nvcc_release() -> str:
    """Such as "13.0"; "" without nvcc."""
    if toolkit() is None:
        return ""
    output = subprocess.run([f"{toolkit()}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", output)
    return found[1] if found else ""
