#!/usr/bin/env python3
"""Set up HierVL: the packages of requirements.txt, Detectron2, and the compiled kernels of hiervl.ops.

    python3 tools/setup/install.py [--detectron2 wheel|git]    # creates or updates .venv
    python tools/setup/install.py --here                       # completes the environment that runs this script

Returns immediately when everything is up to date, and can be interrupted and restarted at any point. Uses only the
standard library. By default, Detectron2 is the Python files of a wheel whose hash is checked; "git" builds the
official source instead (this needs git and a C++ compiler and takes minutes). The choice is remembered for .venv.

--here is for an environment of your own in which you ran `pip install -e .`. It adds what that command cannot:
Detectron2, which is not on PyPI, and the kernels. A Detectron2 that is already installed there is kept unless
--detectron2 is given. No other package is touched.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements.txt"
OPS = ROOT / "hiervl" / "ops"
STAMP = VENV / "hiervl-install.json"

# Upstream's Python files as of April 2024. The wheel is tagged for CPython 3.10 because of one compiled file that
# semantic segmentation never calls; without it, the rest runs on any Python.
WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
WHEEL_TAGS = ["--python-version", "3.10", "--implementation", "cp", "--abi", "none", "--platform", "any"]
SOURCE = "git+https://github.com/facebookresearch/detectron2.git@e0ec4e189d438848521aee7926f9900e114229f5"

PROBE = """
import sys, torch, torchvision, cv2, scipy, timm, open_clip, PIL
import detectron2.engine, detectron2.model_zoo, detectron2.modeling, detectron2.projects.point_rend
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
      f"detectron2 {detectron2.__version__}, CUDA {'yes' if torch.cuda.is_available() else 'no'}")
"""
# pip errors that a retry cannot fix.
PERMANENT_ERROR = re.compile(r"No matching distribution|ResolutionImpossible|No space left|DO NOT MATCH THE HASHES")
MAX_ATTEMPTS = 3


class InstallError(Exception):
    """The installation cannot continue; the message says why and what to do."""


class Environment:
    """A Python environment to install into.

    Args:
        python: its interpreter. log: file that receives all of pip's output.
        raw_progress: whether its pip is 24.1 or newer, the first that reports progress in machine-readable form.
        way_out: what to do when its packages do not work together.
    """

    def __init__(self, python: Path, log: Path, raw_progress: bool, way_out: str):
        self.python, self.log, self.raw_progress, self.way_out = python, log, raw_progress, way_out

    def site_packages(self) -> Path:
        code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True)
        return Path(done.stdout.strip())

    def pip(self, what: str, arguments: list, progress: bool = True) -> None:
        """Runs pip, shows what it is doing and for how long, and retries when the network fails."""
        command = [str(self.python), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
        if progress:
            command += [*(["--progress-bar", "raw"] if self.raw_progress else []), "--retries", "10"]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            print(f"[install] {what}", flush=True)
            status, lines = run(command, self.log)
            if status == 0:
                return
            errors = [line for line in lines if line.startswith("ERROR")] or lines[-5:]
            permanent = PERMANENT_ERROR.search("\n".join(errors))
            if attempt == MAX_ATTEMPTS or permanent:
                way_out = "Fix this first." if permanent else "Run the same command again to continue from here."
                message = [f"pip failed: {what}", *errors, f"The full output is in {self.log}. {way_out}"]
                raise InstallError("\n".join(message))
            print(f"[install] pip failed ({errors[-1]}); trying again", flush=True)
            time.sleep(5 * attempt)

    def probe(self) -> None:
        """Imports what HierVL uses, so that a broken package is found now and not during training."""
        print("[install] checking the imports", flush=True)
        command = [self.python, "-W", "ignore", "-c", PROBE]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.log.parent)
        if done.returncode:
            problem = "the packages are installed but do not work together"
            raise InstallError(f"{problem}:\n{done.stderr.strip()}\n{self.way_out}")
        print(f"[install] {done.stdout.strip()}", flush=True)


VENV_ENVIRONMENT = Environment(
    python=VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"),
    log=VENV / "install.log",
    raw_progress=True,
    way_out="Delete .venv and run again; if the problem persists, choose other versions in requirements.txt.",
)


def current_environment() -> Environment:
    """The environment that runs this script; InstallError if it has no torch or no pip, or is not writable."""
    for package, way_out in (
        ("torch", f"run `{sys.executable} -m pip install -e {ROOT}` first"),
        ("pip", f"add it with `{sys.executable} -m ensurepip`"),
    ):
        if importlib.util.find_spec(package) is None:
            raise InstallError(f"--here: {package} is not installed in the environment of {sys.executable}; {way_out}")
    environment = Environment(
        python=Path(sys.executable),
        log=Path(sys.prefix) / "hiervl-install.log",
        raw_progress=False,  # this pip may be older, and is not ours to update
        way_out="Run `pip install -e .` again; if the problem persists, replace Detectron2: --here --detectron2 wheel.",
    )
    for folder in (environment.site_packages(), environment.log.parent):
        if not os.access(folder, os.W_OK):
            raise InstallError(f"--here: {folder} is not writable; use a virtual environment of your own")
    return environment


def parse_args(argv: "list[str] | None" = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectron2", choices=["wheel", "git"], help="source of Detectron2 (default: see above)")
    parser.add_argument("--ops", action="store_true", help="rebuild the kernels even if nothing changed")
    parser.add_argument("--here", action="store_true", help="complete the environment that runs this script")
    return parser.parse_args(argv)


def main(argv: "list[str] | None" = None) -> int:
    if sys.version_info < (3, 10):
        message = "error: HierVL needs Python 3.10 or newer, but this is %d.%d; choose another: make PYTHON=python3.11"
        print(message % sys.version_info[:2], file=sys.stderr)
        return 1
    options = parse_args(argv)
    try:
        environment = current_environment() if options.here else VENV_ENVIRONMENT
        with one_at_a_time():
            (install_here if options.here else install_venv)(environment, options.detectron2, options.ops)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def install_here(environment: Environment, detectron2: "str | None", rebuild_ops: bool) -> None:
    """Adds Detectron2 and the kernels to the user's own environment; an installed Detectron2 is kept by default."""
    if detectron2 is None and importlib.util.find_spec("detectron2"):
        print("[install] keeping the installed detectron2 (--detectron2 wheel replaces it)", flush=True)
    else:
        DETECTRON2_INSTALLERS[detectron2 or "wheel"](environment)
    environment.probe()
    build_ops(environment, rebuild_ops)


def install_venv(environment: Environment, detectron2: "str | None", rebuild_ops: bool) -> None:
    """Brings .venv up to date, doing only what has not been done yet."""
    stamp = read_stamp()
    detectron2 = detectron2 or stamp.get("detectron2", "wheel")
    current = fingerprint(detectron2)
    if stamp.get("packages") != current:
        started = time.monotonic()
        STAMP.unlink(missing_ok=True)
        make_venv()
        environment.pip("updating pip", ["install", "--upgrade", "pip>=24.1"], progress=False)
        clear_leftovers(environment)
        # Most modules are never imported; compiling them all would take a third of the time.
        environment.pip("packages of requirements.txt", ["install", "--no-compile", "-r", str(REQUIREMENTS)])
        editable = ["install", "--no-compile", "--no-build-isolation", "-e", f"{ROOT}[dev]"]
        environment.pip("hiervl itself, editable", editable)
        DETECTRON2_INSTALLERS[detectron2](environment)
        environment.probe()
        stamp = {"packages": current, "detectron2": detectron2}
        write_stamp(stamp)
        print(f"[install] packages are ready after {time.monotonic() - started:.0f} s", flush=True)
    update_ops(stamp, rebuild_ops)


def fingerprint(detectron2: str) -> str:
    """Hash that changes whenever the packages have to be installed again."""
    parts = [path.read_bytes() for path in (REQUIREMENTS, ROOT / "pyproject.toml", Path(__file__))]
    parts += [text.encode() for text in (detectron2, "{}.{}".format(*sys.version_info), str(VENV))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def read_stamp() -> dict:
    """Record of the last complete installation; empty if there is none or its Python no longer exists."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8")) if VENV_ENVIRONMENT.python.exists() else {}
    except (OSError, ValueError):
        return {}


def write_stamp(stamp: dict) -> None:
    partial = STAMP.with_suffix(".tmp")
    partial.write_text(json.dumps(stamp), encoding="utf-8")
    os.replace(partial, STAMP)


@contextlib.contextmanager
def one_at_a_time():
    """Allows `make demo` and `make test` to be started together: the second waits for the first to install."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(ROOT / ".venv.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("[install] waiting for another installation into this folder", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_venv() -> None:
    """Creates .venv, or keeps the existing one if it has this Python version and a working pip."""
    python = VENV_ENVIRONMENT.python
    code = f"import sys, pip; print('%d.%d' % sys.version_info[:2], sys.prefix == {str(VENV)!r})"
    if python.exists():
        existing = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if existing.stdout.split() == ["{}.{}".format(*sys.version_info), "True"]:
            return
    print(f"[install] creating {VENV} with Python {sys.version.split()[0]}", flush=True)
    # The running Python may be the one in .venv, which is about to be cleared.
    base = getattr(sys, "_base_executable", None) or sys.executable
    done = subprocess.run([base, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if done.returncode:
        raise InstallError(
            f"{base} could not create a virtual environment:\n{done.stdout}{done.stderr}"
            "On Debian and Ubuntu, install python3-venv; elsewhere, choose another Python with `make PYTHON=...`."
        )


def clear_leftovers(environment: Environment) -> None:
    """Removes what an interrupted pip left behind: packages it would consider installed although files are missing."""
    site = environment.site_packages()
    for info in site.glob("*.dist-info"):
        if not (info / "INSTALLER").exists():  # pip writes this file last
            shutil.rmtree(info)
    for leftover in site.glob("~*"):
        shutil.rmtree(leftover, ignore_errors=True)


def install_wheel(environment: Environment) -> None:
    """Unpacks Detectron2's Python files from the wheel after checking its hash."""
    site = environment.site_packages()
    # A folder in site-packages, so that the package can be moved into place in one step.
    with tempfile.TemporaryDirectory(dir=site, prefix="~detectron2-") as folder:
        download = ["download", "--no-deps", "--only-binary=:all:", *WHEEL_TAGS, "-d", folder, WHEEL]
        environment.pip("detectron2", download)
        (wheel,) = Path(folder).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise InstallError(
                f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: the package index serves a different "
                "file. Use the official source instead: --detectron2 git, or `make install DETECTRON2=git`."
            )
        with zipfile.ZipFile(wheel) as archive:
            # Skipped: a top-level package named "tools", and a library compiled for one old torch.
            names = [n for n in archive.namelist() if n.startswith("detectron2/") and not n.endswith(".so")]
            archive.extractall(folder, names)
            (license,) = (n for n in archive.namelist() if n.endswith(".dist-info/LICENSE"))
            (Path(folder) / "detectron2" / "LICENSE").write_bytes(archive.read(license))
        uninstall = ["uninstall", "-y", "detectron2", "sal-detectron2"]
        environment.pip("removing other builds of detectron2", uninstall, progress=False)
        shutil.rmtree(site / "detectron2", ignore_errors=True)
        os.replace(Path(folder) / "detectron2", site / "detectron2")


def install_source(environment: Environment) -> None:
    """Builds Detectron2 from its official repository against the installed torch."""
    if not shutil.which("git"):
        raise InstallError("git is not installed; install it, or use the wheel: --detectron2 wheel")
    with tempfile.TemporaryDirectory(dir=environment.log.parent) as folder:
        build = ["wheel", "--no-build-isolation", "--no-deps", "-w", folder, f"detectron2 @ {SOURCE}"]
        environment.pip("building detectron2 from source (minutes)", build)
        (wheel,) = Path(folder).glob("*.whl")
        shutil.rmtree(environment.site_packages() / "detectron2", ignore_errors=True)
        environment.pip("detectron2", ["install", "--no-deps", "--force-reinstall", str(wheel)])


DETECTRON2_INSTALLERS = {"wheel": install_wheel, "git": install_source}


def update_ops(stamp: dict, force: bool) -> None:
    """Compiles hiervl.ops for .venv if its sources changed, and records the result."""
    digest = hashlib.sha256()
    for source in sorted([OPS / "build.py", OPS / "extension.py", *OPS.glob("csrc/*")]):
        if source.is_file():
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    complete = not stamp.get("ops_built") or any(OPS.glob("*.so"))
    if stamp.get("ops") == digest.hexdigest() and complete and not force:
        return
    built = build_ops(VENV_ENVIRONMENT, force)
    write_stamp({**stamp, "ops": digest.hexdigest(), "ops_built": built})


def build_ops(environment: Environment, force: bool) -> bool:
    """Compiles hiervl.ops; returns whether that succeeded. If not, the slower PyTorch path is used."""
    print("[install] building hiervl.ops (about a minute)", flush=True)
    command = [environment.python, "-W", "ignore", "-m", "hiervl.ops.build", *(["--force"] if force else [])]
    built = subprocess.run(command, cwd=ROOT).returncode == 0
    if not built:
        print(
            "[install] hiervl.ops was not built: everything works, but more slowly. Install a C++ compiler and run "
            f"`{environment.python} -m hiervl.ops.build` to try again.",
            flush=True,
        )
    return built


def run(command: list, log_path: Path) -> "tuple[int, list]":
    """Runs a command with its output in the log and its progress on the screen. Returns (exit status, lines)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    output: queue.Queue = queue.Queue()

    def read():
        for line in process.stdout:
            output.put(line.rstrip())
        output.put(None)

    threading.Thread(target=read, daemon=True).start()
    lines, display = [], Display()
    try:
        with open(log_path, "a", encoding="utf-8") as log:
            print("\n$ " + " ".join(command), file=log)
            while True:
                try:
                    line = output.get(timeout=1)
                except queue.Empty:
                    display.show()
                    continue
                if line is None:
                    break
                if not line.startswith("Progress "):
                    lines.append(line)
                    print(line, file=log, flush=True)
                display.show(line)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        display.clear()
    return process.wait(), lines


class Display:
    """One line with what pip is doing; updated in place on a terminal, printed every 15 seconds otherwise."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.started = self.printed = time.monotonic()
        self.state, self.share = "starting", ""

    def show(self, line: str = "") -> None:
        words = line.split()
        if line.startswith("Progress "):  # raw progress: "Progress 1024 of 4096"
            self.share = f" {100 * int(words[1]) // max(int(words[3]), 1)}%" if words[3].isdigit() else ""
        elif len(words) > 1 and words[0] in ("Collecting", "Downloading", "Building", "Cloning", "Processing"):
            self.state, self.share = f"{words[0].lower()} {os.path.basename(words[1])}", ""
        elif line.startswith("Installing collected packages:"):
            self.state, self.share = f"unpacking {len(words) - 3} packages", ""
        now = time.monotonic()
        if now - self.printed >= (0.2 if self.live else 15):
            self.printed = now
            text = f"[install]   {now - self.started:4.0f} s  {self.state}{self.share}"
            columns = shutil.get_terminal_size().columns
            if self.live:
                print(f"\r{text[: columns - 1]:<{columns - 1}}", end="", flush=True)
            else:
                print(text, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
