"""Operator inputs, and the CUDA source compiled for the host (once per session)."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hiervl.ops.extension import SOURCES, has_kernel

HERE = Path(__file__).parent


@dataclass
class Inputs:
    """The arguments of one call."""

    value: Tensor
    shapes: list[tuple[int, int]]
    starts: list[int]
    locations: Tensor
    weights: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.locations, self.weights

    @property
    def args(self) -> tuple:
        return self.value, self.shapes, self.starts, self.locations, self.weights

    def map(self, f: Callable[[Tensor], Tensor]) -> "Inputs":
        return Inputs(f(self.value), self.shapes, self.starts, f(self.locations), f(self.weights))


@pytest.fixture(autouse=True)
def one_thread():
    """Uses one thread, because the problems are small. Tests of multithreading set the number themselves."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def make_inputs() -> Callable[..., Inputs]:
    """Returns a function that makes random float64 inputs, some with locations outside, near and far."""

    def make(batch=2, shapes=((3, 5), (6, 4)), heads=2, width=8, queries=7, points=3, seed=0) -> Inputs:
        shapes = [tuple(shape) for shape in shapes]
        starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
        rows = sum(h * w for h, w in shapes)
        generator = torch.Generator().manual_seed(seed)
        value = torch.randn(batch, rows, heads, width, generator=generator, dtype=torch.float64)
        sizes = (batch, queries, heads, len(shapes), points)
        locations = torch.rand(*sizes, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
        locations = torch.where(torch.rand(*sizes, 1, generator=generator) < 0.05, locations * 1e4, locations)
        weights = torch.rand(sizes, generator=generator, dtype=torch.float64)
        return Inputs(value, shapes, starts, locations, weights)

    return make


@pytest.fixture
def kernel() -> None:
    """Skips the test if the CPU kernel is not built."""
    if not has_kernel("cpu"):
        pytest.skip("the CPU kernel is not built: python -m hiervl.ops.build")


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory) -> Callable[..., ctypes.CDLL]:
    """Returns a function that compiles the CUDA source for the host, after applying ``bugs``: (text, replacement)."""
    compiler = shutil.which("c++")
    built: dict[tuple, ctypes.CDLL] = {}

    def build(bugs: tuple[tuple[str, str], ...] = ()) -> ctypes.CDLL:
        if compiler is None:
            pytest.skip("no C++ compiler found")
        if bugs not in built:
            folder = tmp_path_factory.mktemp("shim")
            text = (SOURCES / "cuda_kernel.cu").read_text()
            for old, new in bugs:
                assert text.count(old) == 1, f"the code to plant the bug in has changed: {old}"
                text = text.replace(old, new)
            if bugs:  # float32 is sufficient, and takes a quarter of the time to compile
                for scalar_type in ("double", "Half", "BFloat16"):
                    text = text.replace(f"ward<{scalar_type}>(problem", "ward<float>(problem")
            source, library = folder / "cuda_kernel.cu", folder / "shim.so"
            source.write_text(text)
            flags = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-I{HERE}", f"-I{SOURCES}"]
            define = f'-DHIERVL_CUDA_SOURCE="{source}"'
            subprocess.run([compiler, *flags, define, HERE / "cuda_on_host.cpp", "-o", library], check=True)
            built[bugs] = ctypes.CDLL(str(library))
            built[bugs].run.restype = built[bugs].simt_error.restype = ctypes.c_char_p
        return built[bugs]

    return build
