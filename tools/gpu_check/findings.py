"""What a part of the check finds, sent on at once: a part that is stopped keeps what it has found so far."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """What all parts are told.

    Attributes:
        device: "cuda", or "cpu" to exercise the check itself, with tiny sizes.
        output: folder of the reports, absolute.
    """

    device: str
    output: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def tiny(self) -> bool:
        return not self.on_gpu


class Skipped(Exception):
    """This machine cannot run a part; the message says why."""


class Findings:
    """Given to a part, which reports through it.

    Args:
        send: called with each event, a tuple whose first item names its kind.
        seconds: time limit of the part.
    """

    def __init__(self, send: Callable[[tuple], None], seconds: float):
        self._send, self._end = send, time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Until the part is stopped."""
        return self._end - time.monotonic()

    def check(self, what: str, passed: bool, found: object = "", limit: object = "") -> None:
        """Something that must hold. found, limit: numbers or words for the report."""
        self._send(("check", {"check": what, "found": found, "limit": limit, "passed": bool(passed)}))

    def at_most(self, what: str, found: float, limit: float) -> None:
        """A number that must not be above the limit, nor NaN."""
        self.check(what, found <= limit, found if math.isfinite(found) else str(found), limit)

    def row(self, table: str, row: dict) -> None:
        """A row of a table; all rows of a table have the same keys."""
        self._send(("row", table, row))

    def fact(self, name: str, value: object) -> None:
        """A property of the machine, for the head of the report."""
        self._send(("fact", name, value))

    def note(self, text: str) -> None:
        """A sentence for the report."""
        self._send(("note", text))
