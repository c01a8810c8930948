"""Runs the tests that are skipped on a machine without a GPU."""

import importlib.util
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path

from .findings import ROOT, Findings, Settings, Skipped

_CONDITION = "torch.cuda.is_available()"  # by which such tests know that they can run


def run(settings: Settings, findings: Findings) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    files = gpu_tests()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        options = ["-p", "no:cacheprovider", f"--junitxml={result}"]
        command = [sys.executable, "-m", "pytest", *options, *(str(file) for file in files)]
        status = subprocess.run(command, cwd=ROOT).returncode
        counts = xml.etree.ElementTree.parse(result).getroot().find("testsuite").attrib
    row = {"files": ", ".join(file.name for file in files)}
    row |= {name: int(counts[name]) for name in ("tests", "failures", "errors", "skipped")}
    findings.row("Tests", row)
    findings.check("no test fails", status == 0, f"exit status {status}", 0)
    if settings.on_gpu and row["skipped"]:
        findings.note(f"{row['skipped']} tests were skipped; the log says why.")


def gpu_tests() -> list[Path]:
    """Files of tests that ask whether there is a GPU."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _CONDITION in path.read_text()]
