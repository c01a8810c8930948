"""Fixtures that run the scripts of datasets/ like a user, but in this process."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "datasets"


@pytest.fixture
def run(capsys):
    """``run("prepare_coco", "--check", ...)`` returns an object with status, out and err."""

    def call(script, *argv):
        spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        capsys.readouterr()
        status = module.main([str(arg) for arg in argv])
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return call


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    """An empty data root."""
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    return root
