"""Inputs of the operator, and the CUDA source compiled for the host (once a session)."""

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
    """Small problems: threads would only wait for each other. Tests of threads set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_inputs() -> Callable[..., Inputs]:
    """Random inputs in float64; a share of the locations lies outside, at the border and far away."""

    def make(batch=2, shapes=((3, 5), (6, 4)), heads=2, width=8, queries=7, points=3, seed=0) -> Inputs:
        shapes = [tuple(shape) for shape in shapes]
        starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
        rows = sum(h * w for h, w in shapes)
        random = torch.Generator().manual_seed(seed)
        value = torch.randn(batch, rows, heads, width, generator=random, dtype=torch.float64)
        places = (batch, queries, heads, len(shapes), points)
        locations = torch.rand(*places, 2, generator=random, dtype=torch.float64) * 1.6 - 0.3
        locations = torch.where(torch.rand(*places, 1, generator=random) < 0.05, locations * 1e4, locations)
        weights = torch.rand(places, generator=random, dtype=torch.float64)
        return Inputs(value, shapes, starts, locations, weights)

    return make


@pytest.fixture
def kernel() -> None:
    """Skip where the CPU kernel is not built."""
    if not has_kernel("cpu"):
        pytest.skip("the CPU kernel is not built: python -m hiervl.ops.build")


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory) -> Callable[..., ctypes.CDLL]:
    """Compile the CUDA source for the host; ``bugs`` maps a text in it to what replaces it."""
    compiler = shutil.which("c++")
    built: dict[tuple, ctypes.CDLL] = {}

    def build(bugs: tuple[tuple[str, str], ...] = ()) -> ctypes.CDLL:
        if compiler is None:
            pytest.skip("there is no C++ compiler")
        if bugs not in built:
            folder = tmp_path_factory.mktemp("shim")
            text = (SOURCES / "cuda_kernel.cu").read_text()
            for before, after in bugs:
                assert text.count(before) == 1, f"the place of the planted bug has changed: {before}"
                text = text.replace(before, after)
            if bugs:  # float32 will do: a quarter of the compile time
                for other in ("double", "Half", "BFloat16"):
                    text = text.replace(f"ward<{other}>(problem", "ward<float>(problem")
            source, library = folder / "cuda_kernel.cu", folder / "shim.so"
            source.write_text(text)
            flags = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-I{HERE}", f"-I{SOURCES}"]
            define = f'-DHIERVL_CUDA_SOURCE="{source}"'
            subprocess.run([compiler, *flags, define, HERE / "cuda_on_host.cpp", "-o", library], check=True)
            built[bugs] = ctypes.CDLL(str(library))
            built[bugs].run.restype = built[bugs].simt_error.restype = ctypes.c_char_p
        return built[bugs]

    return build
