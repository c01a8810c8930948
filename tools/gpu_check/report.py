"""What the parts have found, as Markdown and JSON."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.benchmark import tables

PASSED, FAILED, MEASURED, SKIPPED = "passed", "failed", "measured", "skipped"
ERROR, TIMED_OUT, STOPPED = "error", "timed out", "stopped: out of time"
OUT_OF_TIME, INTERRUPTED = "not run: out of time", "not run: interrupted"
BAD = (FAILED, ERROR, TIMED_OUT)
TITLE = "gpu_check"


@dataclass
class Outcome:
    """What is known of a part.

    Attributes:
        about: what the part does. status: one of the constants above. seconds: how long it ran.
        checks: rows {"check", "found", "limit", "passed"}. tables: name -> rows. facts: of the machine.
        notes: sentences. message: why it was skipped or went wrong. log: file with what it printed.
    """

    part: str
    about: str
    status: str = INTERRUPTED
    seconds: float = 0.0
    checks: list[dict] = field(default_factory=list)
    tables: dict[str, list[dict]] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    message: str = ""
    log: str = ""

    def take(self, event: tuple) -> None:
        """Add an event of `Findings`."""
        kind, *values = event
        if kind == "check":
            self.checks.append(values[0])
        elif kind == "row":
            self.tables.setdefault(values[0], []).append(values[1])
        elif kind == "fact":
            self.facts[values[0]] = values[1]
        else:
            self.notes.append(values[0])

    def conclude(self) -> None:
        """The status of a part that came to its end."""
        if self.checks:
            self.status = PASSED if all(row["passed"] for row in self.checks) else FAILED
        else:
            self.status = MEASURED if self.tables else FAILED
            self.message = "" if self.tables else "it found nothing"

    @property
    def headline(self) -> str:
        """In a few words, why it is not fine; "" if it is."""
        failed = [row["check"] for row in self.checks if not row["passed"]]
        last_line = self.message.strip().splitlines()[-1:]
        return "; ".join([*failed, *last_line])


def markdown(outcomes: list[Outcome], command: str) -> str:
    """The report: all parts in one table, then each by itself."""
    facts = {name: value for outcome in outcomes for name, value in outcome.facts.items()}
    overview = [
        {"part": o.part, "status": o.status, "seconds": f"{o.seconds:.0f}", "what": o.headline or o.about}
        for o in outcomes
    ]
    lines = tables.heading(TITLE, command, facts) + tables.sections({"Parts": overview})
    for outcome in outcomes:
        if outcome.checks or outcome.tables or outcome.notes or outcome.message:
            lines += [f"## {outcome.part}: {outcome.status}", ""]
            if outcome.checks:
                rows = [row | {"passed": "yes" if row["passed"] else "NO"} for row in outcome.checks]
                lines += [tables.markdown_table(rows), ""]
            lines += tables.sections(outcome.tables, level=3)
            lines += [line for note in outcome.notes for line in (note, "")]
            if outcome.message:
                lines += ["```", outcome.message.strip(), "```", ""]
    return "\n".join(lines)


def write(outcomes: list[Outcome], command: str, folder: Path) -> None:
    """Write gpu_check.md and gpu_check.json; each is replaced as a whole, so that a kill leaves the last ones."""
    content = {"command": command, "parts": [asdict(outcome) for outcome in outcomes]}
    for suffix, text in (("md", markdown(outcomes, command)), ("json", json.dumps(content, indent=1, default=str))):
        path = folder / f"{TITLE}.{suffix}"
        path.with_suffix(".tmp").write_text(text)
        os.replace(path.with_suffix(".tmp"), path)
