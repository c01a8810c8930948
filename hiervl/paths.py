"""Files that come with HierVL, found from any working directory."""

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]  # holds the package; in a checkout also datasets/ and configs/


def find_file(path: str) -> str:
    """`path` if it exists; else, for a relative path, that file next to the package if it exists there.

    So "hiervl/data/tables/camvid_clip_vit_b16.npz" is found wherever a command is run, and the working directory comes
    first. A path that exists in neither place is returned unchanged.
    """
    if os.path.isabs(path) or os.path.exists(path):
        return path
    beside = _ROOT / path
    return str(beside) if beside.is_file() else path
