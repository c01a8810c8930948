"""Helpers shared by all tests: seeds, and the optional data next to the project."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("HIERVL_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_file(name: str) -> str:
    """Path of a file of ../shared; the test is skipped, with the reason, where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {path} (set HIERVL_SHARED to the folder that holds it)")
    return str(path)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
