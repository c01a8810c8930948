"""Reports of measurements: rows as Markdown tables, and as JSON. Needs no torch."""

import json
from pathlib import Path


def markdown_table(rows: list[dict]) -> str:
    """The rows as a Markdown table; the keys of the first row are its columns."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row[column]) for column in columns) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    """Three digits, or all those before the point."""
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def heading(title: str, command: str, facts: dict) -> list[str]:
    """The first lines of a report: title, command, and the facts about the machine in one paragraph."""
    values = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()]
    return [f"# {title}", "", f"`{command}`", "", ", ".join(values), ""]


def sections(tables: dict[str, list[dict]], level: int = 2) -> list[str]:
    """The lines of the tables, each under its name."""
    lines = []
    for name, rows in tables.items():
        lines += [f"{'#' * level} {name}", "", markdown_table(rows), ""]
    return lines


def report(title: str, command: str, tables: dict[str, list[dict]], facts: dict, folder: Path) -> None:
    """Print the tables and write ``<title>.json`` and ``<title>.md`` into ``folder``."""
    text = "\n".join(heading(title, command, facts) + sections(tables))
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{title}.md").write_text(text)
    (folder / f"{title}.json").write_text(
        json.dumps({"command": command, "machine": facts, "tables": tables}, indent=1)
    )
