"""Reads from a training's folder how far it is, whether it is finished, and why it failed."""

import json
import os
import re

from .definition import Training

_ERROR = re.compile(r"error: |[\w.]+(Error|Exception|Interrupt|Exit)\b")
_TAIL = 65536  # bytes that are searched at the end of a file


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
        start: number of bytes to skip, written by an earlier, interrupted process.
    """
    for line in reversed(_tail(os.path.join(training.folder, "metrics.json"), start)):
        try:
            return min(json.loads(line)["iteration"] + 1, training.iterations)
        except (ValueError, KeyError, TypeError):
            continue  # still being written
    return 0


def last_error(training: Training, start: int = 0) -> str:
    """The last line of the log that names an error, or else the last line that is not empty."""
    lines = [line.strip() for line in _tail(training.log, start) if line.strip()]
    named = [line for line in lines if _ERROR.match(line)]
    return (named or lines or ["nothing was printed"])[-1][:300]


def size(path: str) -> int:
    """Bytes of a file, 0 if it is absent."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def drop_partial_line(path: str) -> None:
    """Remove an incomplete last line, left by a killed training, so that the next line does not continue it."""
    if not os.path.exists(path):
        return
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _tail(path, start):
    """The lines after byte `start`; only the last ones if the file is long."""
    try:
        with open(path, "rb") as file:
            file.seek(max(start, size(path) - _TAIL))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
