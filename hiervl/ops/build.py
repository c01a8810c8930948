"""Build the kernels of the operators: ``python -m hiervl.ops.build``.

The CPU kernel needs a C++20 compiler (``CXX``, or c++ by default). The CUDA kernel is also built if
torch is a CUDA build, nvcc is found (in ``CUDA_HOME``, or on the PATH) and the target GPUs are known
(from ``TORCH_CUDA_ARCH_LIST``, or those of this machine). If the CUDA build fails, the error is
reported and the CPU kernel remains available.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .extension import SOURCES, library_path

TORCH = Path(torch.__file__).parent
# The kernel is compiled once for each instruction set, and the one to use is selected at run time.
# With flags like -march=native, the library could crash on another machine of the same cluster.
X86_INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
# Loops with conversions or comparisons are not vectorized without the last two flags.
KERNEL_FLAGS = ["-O3", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
STANDARD = "-std=c++20"


class BuildError(RuntimeError):
    """A step of the build failed; the message names the step and the reason."""


class BuildSkipped(RuntimeError):
    """The build is impossible or pointless on this machine; the message says why."""


def run(command: list[str | Path]) -> str:
    """Run one build command and return its output. Raises BuildError if it fails."""
    arguments = [str(argument) for argument in command]
    try:
        result = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError as error:
        raise BuildError(f"{arguments[0]}: no such program") from error
    if result.returncode:
        raise BuildError(f"{shlex.join(arguments)}\n{result.stdout}")
    return result.stdout


def run_all(commands: list[list[str | Path]]) -> None:
    """Run independent commands in parallel, one per processor."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))


def compiler() -> list[str]:
    """The C++ compiler command with the flags common to all sources."""
    # at::parallel_for is a template, so it is single-threaded unless *this* compilation uses -fopenmp.
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = shlex.split(os.environ.get("CXX", "c++"))
    return [*command, STANDARD, "-fPIC", "-fvisibility=hidden", *openmp, abi, "-isystem", str(TORCH / "include")]


def link(objects: list[Path], target: Path, libraries: list[str | Path]) -> None:
    """Link to a temporary name, then rename to ``target``, so that running processes keep the old file.

    Libraries for the same torch and platform from older sources are deleted.
    """
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    torch_libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        run([*compiler(), "-shared", *objects, "-o", partial, *torch_libraries, *libraries])
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    for old in target.parent.glob(target.name.rsplit("-", 1)[0] + "-*.so"):
        if old != target:
            old.unlink()


def build_cpu(scratch: Path) -> None:
    """Compile and link the CPU kernels."""
    sets: dict[str, list[str]] = {"baseline": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        sets |= X86_INSTRUCTION_SETS
    x86 = ["-DHIERVL_X86_OBJECTS"] if len(sets) > 1 else []
    objects = [scratch / "binding_cpu.o"]
    commands = [[*compiler(), "-O2", *x86, "-c", SOURCES / "binding_cpu.cpp", "-o", objects[0]]]
    objects.append(scratch / "confusion_cpu.o")
    commands.append([*compiler(), "-O3", "-c", SOURCES / "confusion_cpu.cpp", "-o", objects[-1]])
    for name, flags in sets.items():
        objects.append(scratch / f"cpu_kernel_{name}.o")
        isa = [*flags, f"-DHIERVL_ISA={name}"]
        commands.append([*compiler(), *KERNEL_FLAGS, *isa, "-c", SOURCES / "cpu_kernel.cpp", "-o", objects[-1]])
    run_all(commands)
    link(objects, library_path("cpu"), [])


def require_cuda_torch() -> None:
    """Raise BuildSkipped for a CPU-only torch, which has no CUDA headers."""
    if torch.version.cuda is None:
        raise BuildSkipped("this torch was built without CUDA")


def find_nvcc() -> str:
    """Path of nvcc. Raises BuildSkipped if there is none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        raise BuildSkipped("nvcc not found in CUDA_HOME/bin or on the PATH")
    return nvcc


def toolkit_folder(nvcc: str) -> Path:
    """The toolkit folder that nvcc itself reports, because nvcc may be a wrapper script outside its toolkit."""
    match = re.search(r"^#\$ TOP=(.+)$", run([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
    if match is None:
        raise BuildError(f"{nvcc} --dryrun does not print the path of its toolkit (TOP=...)")
    return Path(match[1].strip()).resolve()


def architectures(text: str) -> list[str]:
    """nvcc flags for a list in the format of TORCH_CUDA_ARCH_LIST, like ``"8.0;9.0+PTX"``."""
    flags = []
    for name in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise BuildError(f"'{name}' is not a CUDA architecture; use the format 8.0;9.0+PTX")
        number = match[1] + match[2]
        targets = [f"sm_{number}"] + ([f"compute_{number}"] if match[3] else [])
        flags += [f"-gencode=arch=compute_{number},code={target}" for target in targets]
    return flags


def target_architectures() -> str:
    """The GPU architectures to build for. Raises BuildSkipped if none are specified and there is no GPU."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if listed.strip():
        return listed
    if not torch.cuda.is_available():
        raise BuildSkipped("no GPU found; set TORCH_CUDA_ARCH_LIST to build for another machine")
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))


def compile_cuda(scratch: Path, nvcc: str, arch_list: str) -> tuple[list[Path], Path]:
    """Compile the CUDA kernel and its binding. Returns the object files and the toolkit's folder."""
    toolkit = toolkit_folder(nvcc)
    release = re.search(r"release (\d+)\.", run([nvcc, "--version"]))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        raise BuildError(f"nvcc is for CUDA {release and release[1]}, but torch for CUDA {torch.version.cuda}")
    kernel, binding = scratch / "cuda_kernel.o", scratch / "binding_cuda.o"
    device = [nvcc, STANDARD, "-O3", "-Xcompiler", "-fPIC", *architectures(arch_list)]
    host = [*compiler(), "-O2", "-isystem", toolkit / "include"]
    run_all(
        [
            [*device, "-c", SOURCES / "cuda_kernel.cu", "-o", kernel],
            [*host, "-c", SOURCES / "binding_cuda.cpp", "-o", binding],
        ]
    )
    return [kernel, binding], toolkit


def build_cuda(scratch: Path) -> None:
    """Compile and link the CUDA kernel."""
    require_cuda_torch()
    objects, toolkit = compile_cuda(scratch, find_nvcc(), target_architectures())
    # At run time, the CUDA runtime that torch has already loaded is used, because it has the same soname.
    folders = [f"-L{toolkit / name}" for name in ("lib64", "lib") if (toolkit / name).is_dir()]
    link(objects, library_path("cuda"), [*folders, "-lc10_cuda", "-lcudart"])


def build(kind: str, force: bool) -> bool:
    """Build one kernel ("cpu" or "cuda") unless it is up to date, and print the outcome. Returns False on failure."""
    target = library_path(kind)
    if target.exists() and not force:
        print(f"{kind}: {target.name} is up to date")
        return True
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            {"cpu": build_cpu, "cuda": build_cuda}[kind](Path(scratch))
    except BuildSkipped as reason:
        print(f"{kind}: not built: {reason}")
        return True
    except (BuildError, OSError) as error:
        print(f"{kind}: FAILED; ms_deform_attn will use the slow PyTorch path on this device\n{error}", file=sys.stderr)
        return False
    print(f"{kind}: {target.name} built in {time.perf_counter() - started:.0f} s")
    return True


def main(arguments: list[str] | None = None) -> int:
    """Build all kernels that this machine can build. Returns the exit status, 1 only if the CPU build failed."""
    parser = argparse.ArgumentParser(prog="python -m hiervl.ops.build", description=__doc__)
    parser.add_argument("--force", action="store_true", help="rebuild kernels that are up to date")
    parser.add_argument("--cpu-only", action="store_true", help="do not build the CUDA kernel")
    parser.add_argument(
        "--check-cuda", metavar="ARCHS", help='only check that the CUDA sources compile, e.g. for "8.0;9.0"'
    )
    options = parser.parse_args(arguments)
    if options.check_cuda:
        try:
            require_cuda_torch()
            with tempfile.TemporaryDirectory() as scratch:
                compile_cuda(Path(scratch), find_nvcc(), options.check_cuda)
        except BuildSkipped as reason:
            print(f"cuda: not checked: {reason}")
        except BuildError as error:
            print(f"cuda: FAILED\n{error}", file=sys.stderr)
            return 1
        else:
            print(f"cuda: compiles for {options.check_cuda}")
        return 0
    built = build("cpu", options.force)
    if not options.cpu_only:
        build("cuda", options.force)
    return 0 if built else 1


if __name__ == "__main__":
    sys.exit(main())
