"""The installer without a network: its options, what it refuses, and how it unpacks the wheel."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.setup import install as tool

SCRIPT = str(tool.ROOT / "tools/setup/install.py")
FILES = ("detectron2/__init__.py", "detectron2/_C.so", "tools/__init__.py", "sal_detectron2-0.7.2.dist-info/LICENSE")


class FakeEnvironment(tool.Environment):
    """Records pip's commands; `pip download` produces a small wheel."""

    def __init__(self, folder: Path):
        super().__init__(Path(sys.executable), folder / "pip.log", raw_progress=False, way_out="")
        self.folder, self.commands = folder, []

    def site_packages(self):
        return self.folder

    def pip(self, what, arguments, progress=True):
        self.commands.append(arguments[0])
        if arguments[0] == "download":
            target = Path(arguments[arguments.index("-d") + 1]) / "sal_detectron2-0.7.2-cp310-none-any.whl"
            with zipfile.ZipFile(target, "w") as archive:
                for name in FILES:
                    archive.writestr(zipfile.ZipInfo(name), name)

    def probe(self):
        self.commands.append("probe")


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A fake environment with an older Detectron2, and the hash of its wheel as the expected one."""
    environment = FakeEnvironment(tmp_path / "site")
    (environment.folder / "detectron2").mkdir(parents=True)
    (environment.folder / "detectron2/old.py").touch()
    environment.pip("", ["download", "-d", str(tmp_path)])
    (wheel,) = tmp_path.glob("*.whl")
    monkeypatch.setattr(tool, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(tool, "build_ops", lambda environment, force: environment.commands.append("ops"))
    environment.commands.clear()
    return environment


def test_options():
    options = tool.parse_args([])
    assert (options.detectron2, options.ops, options.here) == (None, False, False)
    options = tool.parse_args(["--here", "--detectron2", "git", "--ops"])
    assert (options.detectron2, options.ops, options.here) == ("git", True, True)
    with pytest.raises(SystemExit):
        tool.parse_args(["--detectron2", "conda"])


def test_here_refuses_an_environment_without_torch():
    # -I -S: a Python that sees its standard library only.
    done = subprocess.run([sys.executable, "-I", "-S", SCRIPT, "--here"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "torch is not installed" in done.stderr and "pip install -e" in done.stderr


@pytest.mark.parametrize("package, way_out", [("torch", "pip install -e"), ("pip", "-m ensurepip")])
def test_here_names_the_missing_package(monkeypatch, capsys, package, way_out):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None if name == package else object())
    assert tool.main(["--here"]) == 1
    error = capsys.readouterr().err
    assert f"{package} is not installed" in error and way_out in error and error.count("\n") == 1


def test_here_refuses_a_folder_that_is_not_writable(monkeypatch, capsys):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert tool.main(["--here"]) == 1
    error = capsys.readouterr().err
    assert "is not writable" in error and "virtual environment" in error and error.count("\n") == 1


def test_the_current_environment_is_the_running_python(monkeypatch):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: object())
    environment = tool.current_environment()
    assert str(environment.python) == sys.executable and environment.site_packages().is_dir()


def test_here_keeps_an_installed_detectron2_unless_a_source_is_given(environment, monkeypatch):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: object())
    tool.install_here(environment, None, False)
    assert environment.commands == ["probe", "ops"] and (environment.folder / "detectron2/old.py").exists()
    tool.install_here(environment, "wheel", False)
    assert environment.commands[2:] == ["download", "uninstall", "probe", "ops"]
    assert not (environment.folder / "detectron2/old.py").exists()


def test_here_adds_a_missing_detectron2(environment, monkeypatch):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    tool.install_here(environment, None, False)
    assert environment.commands == ["download", "uninstall", "probe", "ops"]
    installed = {path.relative_to(environment.folder).as_posix() for path in environment.folder.rglob("*.*")}
    assert installed == {"detectron2/__init__.py"} and (environment.folder / "detectron2/LICENSE").exists()


def test_a_wheel_with_another_hash_is_refused_and_nothing_changes(environment, monkeypatch):
    monkeypatch.setattr(tool, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(tool.InstallError, match="serves a different file"):
        tool.install_wheel(environment)
    assert environment.commands == ["download"]
    assert [path.name for path in environment.folder.rglob("*")] == ["detectron2", "old.py"]
