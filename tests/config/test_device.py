"""The device of a run: whether a GPU can be used, and the words for why not."""

import pytest
import torch

from hiervl.config import device, load_config, use_cpu_without_gpu
from hiervl.errors import UserError

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"


@pytest.fixture
def machine(monkeypatch):
    """machine(gpus=..., ...): what PyTorch and the system say about GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def set_up(gpus=0, built=True, error=NO_DRIVER, hardware=False, visible=None):
        def init():
            raise RuntimeError(error)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(device, "has_nvidia_gpu", lambda: hardware)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return set_up


def config(name="cuda"):
    return load_config("", ["MODEL.DEVICE", name])


REASONS = [
    ({"built": False}, f"PyTorch {torch.__version__} is built without CUDA"),
    ({}, "PyTorch reports: Found no NVIDIA driver on your system"),
    ({"error": OLD_DRIVER}, "PyTorch reports: The NVIDIA driver on your system is too old (found version 11040)"),
    (
        {"error": "No CUDA GPUs are available", "visible": ""},
        "PyTorch reports: No CUDA GPUs are available (CUDA_VISIBLE_DEVICES is '')",
    ),
]


@pytest.mark.parametrize("facts, reason", REASONS)
def test_without_a_gpu_the_cpu_is_used_and_the_reason_returned(machine, facts, reason):
    machine(**facts)
    cfg = config()
    assert use_cpu_without_gpu(cfg) == reason and cfg.MODEL.DEVICE == "cpu"


@pytest.mark.parametrize("facts, reason", REASONS)
def test_a_gpu_that_pytorch_cannot_use_is_an_error(machine, facts, reason):
    machine(hardware=True, **facts)
    cfg = config()
    with pytest.raises(UserError) as error:
        use_cpu_without_gpu(cfg)
    assert reason in str(error.value) and "set MODEL.DEVICE cpu" in str(error.value) and "\n" not in str(error.value)
    cfg = config("cpu")
    assert use_cpu_without_gpu(cfg) == "" and cfg.MODEL.DEVICE == "cpu"


def test_a_gpu_is_used(machine):
    machine(gpus=2, hardware=True)
    for name in ("cuda", "cuda:1"):
        cfg = config(name)
        assert use_cpu_without_gpu(cfg) == "" and cfg.MODEL.DEVICE == name
    with pytest.raises(UserError, match="MODEL.DEVICE is cuda:2, but the last GPU is cuda:1"):
        use_cpu_without_gpu(config("cuda:2"))


def test_a_gpu_is_seen_by_its_driver_or_by_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_DRIVER", str(tmp_path / "gpus" / "*"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not device.has_nvidia_gpu()
    (tmp_path / "nvidia-smi").touch(0o755)
    assert device.has_nvidia_gpu()
    (tmp_path / "nvidia-smi").unlink()
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert device.has_nvidia_gpu()
