#!/usr/bin/env python3
"""Makes .venv: the packages of requirements.txt, Detectron2, and the compiled kernels of hiervl.ops.

    python3 tools/setup/install.py [--detectron2 wheel|git]

Returns at once when everything is up to date. Can be interrupted and started again at any point. Runs on the
standard library alone. Detectron2 comes by default as the Python files of a wheel whose hash is checked; "git"
builds the official source instead (needs git and a C++ compiler, and takes minutes). The choice is remembered.
"""

import argparse
import contextlib
import hashlib
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
WINDOWS = os.name == "nt"
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
REQUIREMENTS = ROOT / "requirements.txt"
PROJECT = ROOT / "pyproject.toml"
OPS = ROOT / "hiervl" / "ops"
STAMP = VENV / "hiervl-install.json"
LOG = VENV / "install.log"

# Upstream's Python files of April 2024. The wheel is tagged for CPython 3.10 because of one compiled file, which
# semantic segmentation never calls; without it the rest runs on any Python.
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
# Trying again cannot mend these.
HOPELESS = re.compile(r"No matching distribution|ResolutionImpossible|No space left|DO NOT MATCH THE HASHES")
TRIES = 3


class InstallError(Exception):
    """The installation cannot go on; the message says why and what to do."""


def main() -> int:
    if sys.version_info < (3, 10):
        print(
            "error: HierVL needs Python 3.10 or newer, this is %d.%d; choose another with `make PYTHON=python3.11`"
            % sys.version_info[:2],
            file=sys.stderr,
        )
        return 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectron2", choices=["wheel", "git"], help="where Detectron2 comes from (last: remembered)")
    parser.add_argument("--ops", action="store_true", help="build the kernels again even if nothing changed")
    options = parser.parse_args()
    try:
        with one_at_a_time():
            install(options.detectron2, options.ops)
    except InstallError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def install(detectron2: "str | None", build_ops: bool) -> None:
    """Brings .venv up to date, doing only what is not done yet."""
    stamp = read_stamp()
    detectron2 = detectron2 or stamp.get("detectron2", "wheel")
    wanted = fingerprint(detectron2)
    if stamp.get("packages") != wanted:
        started = time.monotonic()
        STAMP.unlink(missing_ok=True)
        make_venv()
        # 24.1 is the first pip that reports its progress in a form that a program can read.
        pip("updating pip", ["install", "--upgrade", "pip>=24.1"], progress=False)
        clear_leftovers()
        # Most modules are never imported: compiling them all would take a third of the time.
        pip("packages of requirements.txt", ["install", "--no-compile", "-r", str(REQUIREMENTS)])
        pip("hiervl itself, editable", ["install", "--no-compile", "--no-build-isolation", "-e", f"{ROOT}[dev]"])
        {"wheel": install_wheel, "git": install_source}[detectron2]()
        probe()
        stamp = {"packages": wanted, "detectron2": detectron2}
        write_stamp(stamp)
        print(f"[install] packages are ready after {time.monotonic() - started:.0f} s", flush=True)
    update_ops(stamp, build_ops)


def fingerprint(detectron2: str) -> str:
    """Changes whenever the packages have to be installed again."""
    digest = hashlib.sha256()
    for part in (
        REQUIREMENTS.read_bytes(),
        PROJECT.read_bytes(),
        Path(__file__).read_bytes(),
        detectron2.encode(),
        "{}.{}".format(*sys.version_info).encode(),
        str(VENV).encode(),
    ):
        digest.update(part + b"\0")
    return digest.hexdigest()


def read_stamp() -> dict:
    """What was installed; empty if nothing was, not to the end, or with a Python that is gone."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8")) if PYTHON.exists() else {}
    except (OSError, ValueError):
        return {}


def write_stamp(stamp: dict) -> None:
    partial = STAMP.with_suffix(".tmp")
    partial.write_text(json.dumps(stamp), encoding="utf-8")
    os.replace(partial, STAMP)


@contextlib.contextmanager
def one_at_a_time():
    """Lets `make demo` and `make test` be started together: the second waits for the first."""
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
    """Makes .venv, or keeps the one there if it is of this Python and its pip works."""
    say = f"import sys, pip; print('%d.%d' % sys.version_info[:2], sys.prefix == {str(VENV)!r})"
    found = subprocess.run([PYTHON, "-c", say], capture_output=True, text=True) if PYTHON.exists() else None
    if found and found.stdout.split() == ["{}.{}".format(*sys.version_info), "True"]:
        return
    print(f"[install] making {VENV} with Python {sys.version.split()[0]}", flush=True)
    # The running Python may be the one in .venv, which is about to be emptied.
    base = getattr(sys, "_base_executable", None) or sys.executable
    made = subprocess.run([base, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        raise InstallError(
            f"no virtual environment could be made with {base}:\n{made.stdout}{made.stderr}"
            "On Debian and Ubuntu, install python3-venv; elsewhere, choose another Python with "
            "`make PYTHON=...`."
        )


def site_packages() -> Path:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return Path(subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def clear_leftovers() -> None:
    """Removes what an interrupted pip left: packages it would take for installed although files are missing."""
    site = site_packages()
    for info in site.glob("*.dist-info"):
        if not (info / "INSTALLER").exists():  # pip writes this one last
            shutil.rmtree(info)
    for old in site.glob("~*"):
        shutil.rmtree(old, ignore_errors=True)


def install_wheel() -> None:
    """Unpacks Detectron2's Python files from the wheel, after checking its hash."""
    site = site_packages()
    pip("removing other builds of detectron2", ["uninstall", "-y", "detectron2", "sal-detectron2"], progress=False)
    with tempfile.TemporaryDirectory(dir=VENV) as folder:
        pip("detectron2", ["download", "--no-deps", "--only-binary=:all:", *WHEEL_TAGS, "-d", folder, WHEEL])
        (wheel,) = Path(folder).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise InstallError(
                f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: the package index serves "
                "another file. Use the official source: `make install DETECTRON2=git`."
            )
        with zipfile.ZipFile(wheel) as archive:
            # Left out: a top-level package called "tools", and a library compiled for one old torch.
            names = [n for n in archive.namelist() if n.startswith("detectron2/") and not n.endswith(".so")]
            archive.extractall(folder, names)
            (license,) = (n for n in archive.namelist() if n.endswith(".dist-info/LICENSE"))
            (Path(folder) / "detectron2" / "LICENSE").write_bytes(archive.read(license))
        shutil.rmtree(site / "detectron2", ignore_errors=True)
        os.replace(Path(folder) / "detectron2", site / "detectron2")


def install_source() -> None:
    """Builds Detectron2 from its official repository, against the torch just installed."""
    if not shutil.which("git"):
        raise InstallError("git is not installed; install it, or use `make install DETECTRON2=wheel`")
    with tempfile.TemporaryDirectory(dir=VENV) as folder:
        pip(
            "building detectron2 from source (minutes)",
            ["wheel", "--no-build-isolation", "--no-deps", "-w", folder, f"detectron2 @ {SOURCE}"],
        )
        (wheel,) = Path(folder).glob("*.whl")
        shutil.rmtree(site_packages() / "detectron2", ignore_errors=True)
        pip("detectron2", ["install", "--no-deps", "--force-reinstall", str(wheel)])


def probe() -> None:
    """Imports what HierVL uses, so that a broken package is found here and not in training."""
    print("[install] checking the imports", flush=True)
    done = subprocess.run([PYTHON, "-W", "ignore", "-c", PROBE], capture_output=True, text=True, cwd=VENV)
    if done.returncode:
        raise InstallError(
            f"the packages are installed but do not work together:\n{done.stderr.strip()}\n"
            "Delete .venv and run again; if it stays, choose other versions in requirements.txt."
        )
    print(f"[install] {done.stdout.strip()}", flush=True)


def update_ops(stamp: dict, force: bool) -> None:
    """Compiles hiervl.ops if its sources changed; a failure leaves the slower PyTorch path and stops nothing."""
    if not (OPS / "build.py").exists():
        return
    digest = hashlib.sha256()
    for source in sorted([OPS / "build.py", OPS / "extension.py", *OPS.glob("csrc/*")]):
        if source.is_file():
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    there = not stamp.get("ops_built") or any(OPS.glob("*.so"))
    if stamp.get("ops") == digest.hexdigest() and there and not force:
        return
    print("[install] building hiervl.ops (about a minute)", flush=True)
    command = [PYTHON, "-W", "ignore", "-m", "hiervl.ops.build", *(["--force"] if force else [])]
    built = subprocess.run(command, cwd=ROOT).returncode == 0
    if not built:
        print(
            "[install] hiervl.ops was not built: everything works, more slowly. With a C++ compiler installed, "
            "`make ops` tries again.",
            flush=True,
        )
    write_stamp({**stamp, "ops": digest.hexdigest(), "ops_built": built})


def pip(what: str, arguments: list, progress: bool = True) -> None:
    """Runs pip, shows what it is doing and for how long, and tries again when the network fails."""
    command = [str(PYTHON), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    if progress:
        command += ["--progress-bar", "raw", "--retries", "10"]
    for attempt in range(1, TRIES + 1):
        print(f"[install] {what}", flush=True)
        status, lines = run(command)
        if status == 0:
            return
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-5:]
        hopeless = HOPELESS.search("\n".join(errors))
        if attempt == TRIES or hopeless:
            way_out = "Correct this first." if hopeless else "Run the same command again to go on from here."
            raise InstallError("\n".join([f"pip failed: {what}", *errors, f"All its output is in {LOG}. {way_out}"]))
        print(f"[install] pip failed ({errors[-1]}); trying again", flush=True)
        time.sleep(5 * attempt)


def run(command: list) -> "tuple[int, list]":
    """Runs a command, its output into the log and a digest of it onto the screen. Returns (status, lines)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    output: queue.Queue = queue.Queue()

    def read():
        for line in process.stdout:
            output.put(line.rstrip())
        output.put(None)

    threading.Thread(target=read, daemon=True).start()
    lines, display = [], Display()
    try:
        with open(LOG, "a", encoding="utf-8") as log:
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
    """One line that says what pip is at, rewritten in a terminal, printed now and then elsewhere."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.started = self.printed = time.monotonic()
        self.state, self.share = "starting", ""

    def show(self, line: str = "") -> None:
        words = line.split()
        if line.startswith("Progress "):  # of the raw progress bar: "Progress 1024 of 4096"
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
            print(
                f"\r{text[: columns - 1]:<{columns - 1}}" if self.live else text,
                end="" if self.live else "\n",
                flush=True,
            )

    def clear(self) -> None:
        if self.live:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
