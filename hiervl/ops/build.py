"""Build the kernels of the operators: ``python -m hiervl.ops.build``.

The CPU kernel needs a C++20 compiler (``CXX``, else c++). The CUDA kernel is built as well when
torch is a CUDA build, nvcc is there (``CUDA_HOME``, else the PATH), and it is known for which GPUs:
``TORCH_CUDA_ARCH_LIST``, else those of this machine. A CUDA build that fails is reported and leaves
the CPU kernel in place.
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
# The kernel is compiled once for each of these; which one runs is decided at run time. Flags like
# -march=native would make a library that dies on another machine of the same cluster.
X86_INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
# Without the last two a conversion or a comparison in a loop cannot become vector code.
KERNEL_FLAGS = ["-O3", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
STANDARD = "-std=c++20"


class BuildError(RuntimeError):
    """A step of the build failed; the message says which and why."""


class BuildSkipped(RuntimeError):
    """This machine has no use for, or no means of, the build; the message says why."""


def run(command: list[str | Path]) -> str:
    """Run one command of the build and return what it printed; BuildError if it fails."""
    words = [str(word) for word in command]
    try:
        result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError as error:
        raise BuildError(f"{words[0]}: no such program") from error
    if result.returncode:
        raise BuildError(f"{shlex.join(words)}\n{result.stdout}")
    return result.stdout


def run_all(commands: list[list[str | Path]]) -> None:
    """Run commands that do not depend on each other, as many at once as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))


def compiler() -> list[str]:
    """The C++ compiler with the flags that every source gets."""
    # at::parallel_for is a template: without -fopenmp in *this* compilation it runs on one thread.
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = shlex.split(os.environ.get("CXX", "c++"))
    return [*command, STANDARD, "-fPIC", "-fvisibility=hidden", *openmp, abi, "-isystem", str(TORCH / "include")]


def link(objects: list[Path], target: Path, libraries: list[str | Path]) -> None:
    """Link into ``target`` under a temporary name first: running processes keep the file they have open."""
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    torch_libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        run([*compiler(), "-shared", *objects, "-o", partial, *torch_libraries, *libraries])
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    for old in target.parent.glob(target.name.rsplit("-", 1)[0] + "-*.so"):
        if old != target:
            old.unlink()  # the same torch and platform, older sources


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
    """BuildSkipped on a torch for CPUs: it has no CUDA headers."""
    if torch.version.cuda is None:
        raise BuildSkipped("this torch was built without CUDA")


def find_nvcc() -> str:
    """The nvcc to use; BuildSkipped if there is none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        raise BuildSkipped("there is no nvcc (neither CUDA_HOME/bin nor on the PATH)")
    return nvcc


def toolkit_folder(nvcc: str) -> Path:
    """The toolkit that ``nvcc`` belongs to, from its own mouth: on the PATH it may be a script that calls another."""
    found = re.search(r"^#\$ TOP=(.+)$", run([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
    if found is None:
        raise BuildError(f"{nvcc} --dryrun does not say where its toolkit is")
    return Path(found[1].strip()).resolve()


def architectures(text: str) -> list[str]:
    """nvcc's flags for a list like ``"8.0;9.0+PTX"`` (the form of TORCH_CUDA_ARCH_LIST)."""
    flags = []
    for name in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise BuildError(f"'{name}' is not a CUDA architecture; write for example 8.0;9.0+PTX")
        number = match[1] + match[2]
        kinds = [f"sm_{number}"] + ([f"compute_{number}"] if match[3] else [])
        flags += [f"-gencode=arch=compute_{number},code={kind}" for kind in kinds]
    return flags


def wanted_architectures() -> str:
    """The GPUs to build for; BuildSkipped if nobody named any and there are none."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if listed.strip():
        return listed
    if not torch.cuda.is_available():
        raise BuildSkipped("there is no GPU here; name the target in TORCH_CUDA_ARCH_LIST to build for another machine")
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))


def compile_cuda(scratch: Path, nvcc: str, wanted: str) -> tuple[list[Path], Path]:
    """Compile the CUDA kernel and its binding; returns the objects and the toolkit's folder."""
    toolkit = toolkit_folder(nvcc)
    release = re.search(r"release (\d+)\.", run([nvcc, "--version"]))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        raise BuildError(f"nvcc is of CUDA {release and release[1]}, torch of CUDA {torch.version.cuda}")
    kernel, binding = scratch / "cuda_kernel.o", scratch / "binding_cuda.o"
    device = [nvcc, STANDARD, "-O3", "-Xcompiler", "-fPIC", *architectures(wanted)]
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
    objects, toolkit = compile_cuda(scratch, find_nvcc(), wanted_architectures())
    # torch has loaded its own copy of the runtime; it has the same soname and is the one that is used.
    folders = [f"-L{toolkit / name}" for name in ("lib64", "lib") if (toolkit / name).is_dir()]
    link(objects, library_path("cuda"), [*folders, "-lc10_cuda", "-lcudart"])


def build(kind: str, force: bool) -> bool:
    """Build one kernel ("cpu" or "cuda") unless it is up to date, and say so; false if it failed."""
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
        print(f"{kind}: FAILED; ms_deform_attn will use the slow PyTorch path there\n{error}", file=sys.stderr)
        return False
    print(f"{kind}: {target.name} built in {time.perf_counter() - started:.0f} s")
    return True


def main(arguments: list[str] | None = None) -> int:
    """Build what this machine can build; the exit status is 1 only when the CPU kernel failed."""
    parser = argparse.ArgumentParser(prog="python -m hiervl.ops.build", description=__doc__)
    parser.add_argument("--force", action="store_true", help="build also what is up to date")
    parser.add_argument("--cpu-only", action="store_true", help="leave the CUDA kernel out")
    parser.add_argument("--check-cuda", metavar="ARCHS", help='only compile the CUDA sources, e.g. for "8.0;9.0"')
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
