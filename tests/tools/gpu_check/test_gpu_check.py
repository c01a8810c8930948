"""The check goes on after a part that fails, keeps its time, reports what it knows; and its parts pass on a CPU."""

import json
import time

import pytest

from tools.gpu_check import __main__ as check
from tools.gpu_check import report
from tools.gpu_check import tests as gpu_tests
from tools.gpu_check.findings import Findings, Settings
from tools.gpu_check.parts import PARTS, Part

MODULES = {
    "good": "findings.check('one is one', True, 1, 1); findings.fact('card', 'Imaginary 9000'); print('hello')",
    "measuring": "findings.row('Speeds', {'what': 'x', 'ms': 1.5}); time.sleep(60)",
    "wrong": "findings.at_most('a difference', float('nan'), 0.5)",
    "raising": "findings.check('before the error', True); raise ValueError('out of luck')",
    "dying": "os.kill(os.getpid(), signal.SIGSEGV)",
    "hanging": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
    "impossible": "from tools.gpu_check.findings import Skipped; raise Skipped('no such card')",
    "empty": "pass",
}


@pytest.fixture
def part(tmp_path, monkeypatch):
    """part("raising") -> a part that does that."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, seconds=30.0, benchmark=False):
        text = f"import os, signal, time\n\n\ndef run(settings, findings):\n    {MODULES[name]}\n"
        (tmp_path / f"part_{name}.py").write_text(text)
        return Part(name, f"a part that is {name}", seconds, benchmark, f"part_{name}")

    return make


def run(parts, tmp_path, seconds=120.0):
    """{part: outcome}."""
    settings = Settings("cpu", tmp_path / "out")
    outcomes = check.run_parts(parts, settings, time.monotonic() + seconds, lambda *_: None)
    assert [outcome.part for outcome in outcomes] == [part.name for part in parts]
    return {outcome.part: outcome for outcome in outcomes}


def test_a_part_that_fails_does_not_stop_the_others(part, tmp_path, monkeypatch, capsys):
    parts = [part("raising"), part("wrong"), part("dying"), part("impossible"), part("good"), part("empty")]
    monkeypatch.setattr(check, "PARTS", parts)
    output = tmp_path / "out"
    assert check.main(["--device", "cpu", "--output", str(output)]) == 1
    found = {item["part"]: item for item in json.loads((output / "gpu_check.json").read_text())["parts"]}
    assert {name: item["status"] for name, item in found.items()} == {
        "raising": "error",
        "wrong": "failed",
        "dying": "error",
        "impossible": "skipped",
        "good": "passed",
        "empty": "failed",
    }
    assert found["raising"]["checks"] and "out of luck" in found["raising"]["message"]
    assert found["wrong"]["checks"] == [{"check": "a difference", "found": "nan", "limit": 0.5, "passed": False}]
    assert "SIGSEGV" in found["dying"]["message"]
    text = (output / "gpu_check.md").read_text()
    for expected in ("card Imaginary 9000", "--device cpu", "no such card", "ValueError: out of luck", "| NO |"):
        assert expected in text
    assert (output / "logs" / "good.log").read_text() == "hello\n"
    printed = capsys.readouterr().out
    assert "ValueError: out of luck" in printed and "hello" not in printed
    monkeypatch.setattr(check, "PARTS", parts[3:5])
    assert check.main(["--device", "cpu", "--parts", "good", "--output", str(output)]) == 0


def test_time_limits(part, tmp_path):
    parts = [part("hanging", 2), part("measuring", 2, benchmark=True), part("good")]
    started = time.monotonic()
    found = run(parts, tmp_path)
    assert time.monotonic() - started < 60  # the parts would sleep for two minutes
    assert [o.status for o in found.values()] == [report.TIMED_OUT, report.STOPPED, report.PASSED]
    assert found["measuring"].tables == {"Speeds": [{"what": "x", "ms": 1.5}]}


def test_the_deadline_of_all_parts(part, tmp_path):
    # The first part is cut short. Of its time, the second would have less than a quarter.
    found = run([part("measuring", 10, benchmark=True), part("good", 60)], tmp_path, seconds=5)
    assert found["measuring"].status == report.STOPPED and found["measuring"].seconds < 9
    assert found["good"].status == report.OUT_OF_TIME and not found["good"].checks


def test_an_interruption_leaves_a_report(part, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "PARTS", [part("good"), part("hanging")])

    def stop(outcomes, *_):
        write(outcomes, *_)
        if outcomes[0].status == report.PASSED and not stops:
            stops.append(1)
            raise KeyboardInterrupt

    stops, write = [], report.write
    monkeypatch.setattr(report, "write", stop)
    assert check.main(["--device", "cpu", "--output", str(tmp_path / "out")]) == 130
    parts = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["parts"]
    assert [item["status"] for item in parts] == [report.PASSED, report.INTERRUPTED]


def test_which_parts_run():
    names = [part.name for part in check.choose("", quick=True)]
    assert "parity" in names and "step_speed" not in names
    names = [part.name for part in check.choose("step_speed,parity", quick=True)]
    assert names == ["environment", "parity", "step_speed"]
    assert len(check.choose("", quick=False)) == len(PARTS)
    with pytest.raises(SystemExit, match="there is no part parties"):
        check.choose("parties", quick=False)
    assert 60 * check.MINUTES < 480 and all(part.seconds < 240 for part in PARTS)


def test_the_checks_pass_on_a_cpu(tmp_path):
    parts = ["environment", "kernel_build", "parity", "resume", "ddp", "precision", "synchronizations"]
    status = check.main(["--device", "cpu", "--quick", "--parts", ",".join(parts), "--output", str(tmp_path)])
    found = {item["part"]: item for item in json.loads((tmp_path / "gpu_check.json").read_text())["parts"]}
    assert {name: item["message"] for name, item in found.items()} == dict.fromkeys(parts, "")
    assert status == 0 and list(found) == parts
    assert [item["status"] for item in found.values()] == 6 * ["passed"] + ["measured"]
    (waits,) = found["synchronizations"]["tables"]["Waits per iteration"]
    assert waits["iterations"] == 2 and waits["most"] > 0  # the matching is solved on the host
    places = [row["place"] for row in found["synchronizations"]["tables"]["Places"]]
    assert any("losses/matcher.py" in place for place in places)


def test_tests_that_fail_are_found(tmp_path, monkeypatch):
    assert [path.name for path in gpu_tests.gpu_tests()] == ["test_ops_gpu.py"]
    (tmp_path / "test_it.py").write_text("def test_a():\n    assert 1\n\ndef test_b():\n    assert 0\n")
    monkeypatch.setattr(gpu_tests, "gpu_tests", lambda: [tmp_path / "test_it.py"])
    events = []
    gpu_tests.run(Settings("cpu", tmp_path), Findings(events.append, 60))
    (row,), (check_,) = ([event[-1] for event in events if event[0] == kind] for kind in ("row", "check"))
    assert (row["tests"], row["failures"], row["skipped"], check_["passed"]) == (2, 1, 0, False)


def test_the_benchmarks_run_on_a_cpu(tmp_path):
    parts = ["kernel_speed", "step_speed", "inference_speed", "evaluation_speed"]
    assert check.main(["--device", "cpu", "--parts", ",".join(parts), "--output", str(tmp_path)]) == 0
    found = {item["part"]: item for item in json.loads((tmp_path / "gpu_check.json").read_text())["parts"]}
    assert [item["status"] for item in found.values()] == ["passed"] + 4 * ["measured"]
    kernel = found["kernel_speed"]["tables"]["Deformable attention"]
    assert [(row["type"], row["pass"]) for row in kernel[:2]] == [
        ("float32", "forward"),
        ("float32", "forward + backward"),
    ]
    assert len(kernel) == 6 and kernel[1]["L2 bound ms"] == pytest.approx(3 * kernel[0]["L2 bound ms"])
    tables = found["step_speed"]["tables"]
    assert [row["type"] for row in tables["Training step"]] == ["bfloat16", "TF32", "float32"]
    assert all(row["images"] == "1 + 1 x 3" for row in tables["Training step"])
    shares = {row["part"]: row["share %"] for row in tables["Parts of a step in bfloat16"]}
    assert sum(shares.values()) == pytest.approx(100) and all(share > 0 for share in shares.values())
    assert {"teacher, filters", "forward: backbone", "backward", "clipping, AdamW", "EMA"} < set(shares)
    everything, own = tables["Kernels of a step in bfloat16"][:2]
    assert everything["ms"] > own["ms"] > 0
    assert len(found["inference_speed"]["tables"]["Inference"]) == 6
    assert found["evaluation_speed"]["tables"]["Evaluation without the network"][0]["images/s"] > 0


def test_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no GPU"):
        check.main(["--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
