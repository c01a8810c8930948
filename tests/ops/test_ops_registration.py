"""The operator in torch (opcheck, torch.compile, autocast), its fallback without a kernel, and the build."""

import subprocess
import sys
import warnings

import pytest
import torch

from hiervl.ops import build, extension, function, ms_deform_attn


@pytest.mark.usefixtures("kernel")
def test_opcheck(make_inputs):
    inputs = make_inputs(queries=3).map(lambda tensor: tensor.float().requires_grad_())
    sizes = [size for shape in inputs.shapes for size in shape]
    args = (inputs.value, sizes, inputs.starts, inputs.locations, inputs.weights)
    torch.library.opcheck(torch.ops.hiervl.ms_deform_attn.default, args)


@pytest.mark.parametrize("built", [True, False])
def test_compile_without_graph_breaks(make_inputs, monkeypatch, request, built):
    if built:
        request.getfixturevalue("kernel")
    else:
        monkeypatch.setitem(extension._loaded, "cpu", False)
    torch._dynamo.reset()
    compiled = torch.compile(ms_deform_attn, backend="aot_eager", fullgraph=True)
    for queries in (7, 9):  # the second call compiles with a symbolic number of queries
        leaves = make_inputs(queries=queries).map(lambda tensor: tensor.requires_grad_())
        eager, traced = (
            torch.autograd.grad(f(*leaves.args).square().sum(), leaves.tensors) for f in (ms_deform_attn, compiled)
        )
        for expected, result in zip(eager, traced, strict=True):
            assert torch.allclose(result, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("kernel")
def test_autocast_keeps_each_type(make_inputs):
    leaves = make_inputs().map(lambda tensor: tensor.float())
    value = leaves.value.bfloat16().requires_grad_()
    locations, weights = leaves.locations.requires_grad_(), leaves.weights.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = ms_deform_attn(value, leaves.shapes, leaves.starts, locations, weights)
    output.sum().backward()
    assert output.dtype == value.grad.dtype == torch.bfloat16
    assert locations.grad.dtype == weights.grad.dtype == torch.float32


def test_missing_kernel_warns_once(make_inputs, monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "_loaded", {})
    monkeypatch.setattr(extension, "library_path", lambda device: tmp_path / f"_{device}-none.so")
    inputs = make_inputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ms_deform_attn(*inputs.args)
    assert len(caught) == 1
    assert "has not been built" in str(caught[0].message) and extension.BUILD_COMMAND in str(caught[0].message)


def test_invalid_library_file_only_warns(make_inputs, monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "_loaded", {})
    broken = tmp_path / "_cpu-broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(extension, "library_path", lambda device: broken)
    with pytest.warns(UserWarning, match="cannot be loaded"):
        ms_deform_attn(*make_inputs().args)


def test_reference_path_is_reset_after_an_exception():
    with pytest.raises(ValueError), function.reference_path():
        assert function._reference_only
        raise ValueError
    assert not function._reference_only


def test_library_name_depends_on_the_torch_version(monkeypatch):
    current_path = extension.library_path("cpu")
    monkeypatch.setattr(torch, "__version__", "1.2.3")
    assert extension.library_path("cpu") != current_path and "torch1.2.3" in extension.library_path("cpu").name


def test_failed_build_reports_the_reason_and_leaves_no_files(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build, "library_path", lambda kind: tmp_path / f"_{kind}-x.so")
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'raise SystemExit(\"no compiler today\")'")
    assert build.main(["--cpu-only"]) == 1
    assert "no compiler today" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "surely-no-such-compiler")
    assert build.main(["--cpu-only"]) == 1
    assert "surely-no-such-compiler: no such program" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_failed_cuda_build_does_not_change_the_exit_status(monkeypatch, tmp_path, capsys):
    cpu = tmp_path / "_cpu-x.so"
    cpu.touch()
    monkeypatch.setattr(build, "library_path", lambda kind: tmp_path / f"_{kind}-x.so")
    monkeypatch.setattr(build, "require_cuda_torch", lambda: None)
    monkeypatch.setattr(build, "find_nvcc", lambda: "surely-no-such-nvcc")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build.main([]) == 0
    assert "cuda: FAILED" in capsys.readouterr().err and cpu.exists()


def test_toolkit_folder_of_an_nvcc_wrapper_script(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ _HERE_=/usr'\necho '#$ TOP={tmp_path}/bin/..'\n")
    nvcc.chmod(0o755)
    (tmp_path / "bin").mkdir()
    assert build.toolkit_folder(str(nvcc)) == tmp_path.resolve()


def test_architecture_list():
    flags = build.architectures("8.0; 9.0a+PTX")
    assert flags == [f"-gencode=arch=compute_{a},code={b}" for a, b in
                     (("80", "sm_80"), ("90a", "sm_90a"), ("90a", "compute_90a"))]  # fmt: skip
    with pytest.raises(build.BuildError, match="'Ampere' is not a CUDA architecture"):
        build.architectures("Ampere")


def test_build_is_portable_across_machines():
    """A built library must run on other machines, so no weak inline symbol may contain AVX code."""
    flags = " ".join(flag for flags in build.X86_INSTRUCTION_SETS.values() for flag in flags)
    assert "native" not in flags + " ".join(build.KERNEL_FLAGS)
    libraries = list(extension.SOURCES.parent.glob("_cpu-*.so"))
    if not libraries:
        pytest.skip("the CPU kernel is not built")
    symbols = subprocess.run(["nm", "-C", "--defined-only", libraries[0]], capture_output=True, text=True)
    if symbols.returncode:
        pytest.skip("nm not found")
    weak_avx_symbols = [line for line in symbols.stdout.splitlines() if " W " in line and "avx" in line]
    assert not weak_avx_symbols
