"""Reads what a training has written into its folder: how far it is, and whether it is finished."""

import json
import os
import re

from .definition import Training

_ERROR = re.compile(r"error: |[\w.]+(Error|Exception|Interrupt|Exit)\b")
_TAIL = 65536  # bytes at the end of a log that are searched


def load_results(training: Training) -> dict:
    """Content of results.json, {} without one."""
    try:
        with open(os.path.join(training.folder, "results.json"), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def is_finished(training: Training) -> bool:
    """Whether the results of the last iteration are recorded."""
    return load_results(training).get("last", {}).get("iteration") == training.iterations


def last_iteration(training: Training, start: int = 0) -> int:
    """The last iteration in metrics.json, counting from 1; 0 before the first line.

    Args:
        start: bytes to skip, which an interrupted run has written.
    """
    for line in reversed(_tail(os.path.join(training.folder, "metrics.json"), start)):
        try:
            return min(json.loads(line)["iteration"] + 1, training.iterations)
        except (ValueError, KeyError, TypeError):
            continue  # still being written
    return 0


def last_error(training: Training, start: int = 0) -> str:
    """The last line of the log that names an error, or else the last line that says anything."""
    lines = [line.strip() for line in _tail(training.log, start) if line.strip()]
    named = [line for line in lines if _ERROR.match(line)]
    return (named or lines or ["nothing was printed"])[-1][:300]


def size(path: str) -> int:
    """Bytes of a file, 0 if it is absent."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def drop_partial_line(path: str) -> None:
    """Cut off what a killed training has left of its last line, so that the next one does not continue it."""
    if not os.path.exists(path):
        return
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _tail(path, start):
    """The lines after byte `start`, of a long file only the last ones."""
    try:
        with open(path, "rb") as file:
            file.seek(max(start, size(path) - _TAIL))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
