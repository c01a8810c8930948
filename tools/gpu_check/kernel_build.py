"""Compiles the kernel of hiervl.ops for this machine, and runs it once against the PyTorch path."""

import os
import tempfile
import time
from pathlib import Path

import torch

from hiervl.ops import build, ms_deform_attn
from hiervl.ops.extension import has_kernel, library_path
from hiervl.ops.function import reference_path
from tools.benchmark import op

from .environment import nvcc_release, toolkit
from .findings import Findings, Settings, Skipped

_LIMIT = 1e-9


def run(settings: Settings, findings: Findings) -> None:
    for kind in dict.fromkeys(("cpu", settings.device)):
        if library_path(kind).exists():
            findings.note(f"{library_path(kind).name} is up to date.")
        elif kind == "cuda":
            build_for_this_card(findings)
        else:
            findings.check("CPU kernel", build.build("cpu", force=False))
    findings.check("the kernel loads", has_kernel(settings.device))
    findings.at_most("kernel against grid_sample, relative", difference(settings.device), _LIMIT)


def build_for_this_card(findings: Findings) -> None:
    """
    Raises:
        Skipped: there is no nvcc, or none that fits torch.
        BuildError: the compiler failed.
    """
    release, version = nvcc_release(), torch.version.cuda or ""
    if release and release.split(".")[0] != version.split(".")[0]:
        raise Skipped(f"nvcc is for CUDA {release}, but torch for CUDA {version}")
    if toolkit():
        os.environ["CUDA_HOME"] = toolkit()
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)  # for this card only, which takes a fraction of the time
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            build.build_cuda(Path(scratch))
    except build.BuildSkipped as reason:
        raise Skipped(str(reason)) from None
    findings.check("CUDA kernel compiles", True, f"{time.perf_counter() - started:.0f} s with nvcc {release}")


def difference(device: str) -> float:
    """Greatest difference of output and gradients to the PyTorch path, relative to the greatest value.

    In float64: with fewer digits, places at the edge of two pixels have either pixel's gradient.
    """
    inputs = op.make_inputs(2, 64, device=device)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            inputs[name] = value.detach().double().requires_grad_(value.requires_grad)
    results = []
    with reference_path():
        results.append(output_and_gradients(inputs))
    results.append(output_and_gradients(inputs))
    return max(float((a - b).abs().max() / b.abs().max()) for b, a in zip(*results))


def output_and_gradients(inputs: dict) -> list[torch.Tensor]:
    output = ms_deform_attn(**{name: value for name, value in inputs.items() if name != "grad_output"})
    return [output.detach(), *torch.autograd.grad(output, op.leaves(inputs), inputs["grad_output"])]
