"""Registers the operators with torch and loads their compiled kernels.

Schemas, output shapes (fake tensors) and derivatives are declared here, so they are the same for all
devices. The kernels are in shared libraries next to this file, one for each device type. Library
names contain torch's version and a digest of the sources, so a kernel that was built for another
version of torch or from older sources is treated as missing.
"""

import hashlib
import sysconfig
import warnings
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "csrc"
BUILD_COMMAND = "python -m hiervl.ops.build"

torch.library.define(
    "hiervl::ms_deform_attn",
    "(Tensor value, SymInt[] spatial_shapes, SymInt[] level_start, Tensor sampling_locations, "
    "Tensor attention_weights) -> Tensor",
)
torch.library.define(
    "hiervl::ms_deform_attn_backward",
    "(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, SymInt[] level_start, Tensor sampling_locations, "
    "Tensor attention_weights) -> (Tensor, Tensor, Tensor)",
)
# Returns (K + 2, K + 1) int64: row K counts ignored pixels, row K + 1 and column K values out of range. CPU only.
torch.library.define(
    "hiervl::confusion_counts", "(Tensor label, Tensor prediction, int num_classes, int ignore_label) -> Tensor"
)
torch.library.define("hiervl::cpu_instruction_set", "(str request='') -> str")


@torch.library.register_fake("hiervl::ms_deform_attn")
def _fake_forward(value: Tensor, spatial_shapes, level_start, sampling_locations: Tensor, attention_weights) -> Tensor:
    batch, _, heads, width = value.shape
    return value.new_empty((batch, sampling_locations.shape[1], heads * width))


@torch.library.register_fake("hiervl::ms_deform_attn_backward")
def _fake_backward(grad_output, value, spatial_shapes, level_start, sampling_locations, attention_weights):
    inputs = (value, sampling_locations, attention_weights)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


def _save_for_backward(ctx, inputs, output) -> None:
    value, ctx.spatial_shapes, ctx.level_start, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx, grad_output: Tensor):
    value, locations, weights = ctx.saved_tensors
    grads = torch.ops.hiervl.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, ctx.level_start, locations, weights
    )
    return grads[0], None, None, grads[1], grads[2]


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("ms_deform_attn has no second derivative")


torch.library.register_autograd("hiervl::ms_deform_attn", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("hiervl::ms_deform_attn_backward", _no_second_derivative)


def library_path(device_type: str) -> Path:
    """Path of the kernel library for ``device_type`` ("cpu" or "cuda"), the installed torch and current sources."""
    other_device = "cuda" if device_type == "cpu" else "cpu"
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        if other_device not in source.name:
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    tags = (device_type, f"torch{torch.__version__}", sysconfig.get_platform(), digest.hexdigest()[:12])
    return Path(__file__).parent / f"_{'-'.join(tags)}.so"


_loaded: dict[str, bool] = {}  # device type -> whether its kernel is available


def _load(device_type: str) -> bool:
    path = library_path(device_type)
    if path.exists():
        try:
            torch.ops.load_library(path)
            return True
        except OSError as error:
            reason = f"{path.name} cannot be loaded ({error})"
    else:
        outdated = list(path.parent.glob(f"_{device_type}-*.so"))
        if outdated:
            reason = "the existing library was built from other sources or for another version of torch"
        else:
            reason = "it has not been built"
    warnings.warn(
        f"the {device_type} kernel of hiervl.ops is not available: {reason}. The much slower PyTorch path is used; "
        f"build the kernel with `{BUILD_COMMAND}`.",
        stacklevel=2,
    )
    return False


@torch.compiler.assume_constant_result
def has_kernel(device_type: str) -> bool:
    """Whether a compiled kernel is available for ``device_type``. The first call loads it, or warns if it cannot."""
    if device_type not in _loaded:
        _loaded[device_type] = _load(device_type) if device_type in ("cpu", "cuda") else False
    return _loaded[device_type]
