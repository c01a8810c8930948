"""A campaign of two runs on a tiny dataset, with a stand-in for train_net.py that takes milliseconds."""

import contextlib
import json
from pathlib import Path

import pytest
import yaml

from hiervl.data.shapes import generate
from tools.analysis.campaign import running
from tools.analysis.campaign.definition import read_campaign

CONFIG = "configs/shapes_supervised.yaml"
# Counts from its last checkpoint to SOLVER.MAX_ITER, one iteration per line of metrics.json, and saves every iteration.
# The mIoU of an iteration is a sum over all iterations before, so that a training that starts anew in the middle, or
# twice at once, ends with another one. `behavior.json`, beside the output folder, makes trainings slow or fail.
STAND_IN = """
import json, os, sys, time
arguments = sys.argv[1:]
assert arguments[0] == "--config-file" and "--resume" in arguments
pairs = arguments[3:]
options = dict(zip(pairs[::2], pairs[1::2]))
folder, seed, total = options["OUTPUT_DIR"], int(options["SEED"]), int(options["SOLVER.MAX_ITER"])
run = os.path.basename(os.path.dirname(folder))
behavior = json.load(open(os.path.join(folder, "../../../behavior.json")))
state = {"iteration": 0, "sum": 0, "starts": 0}
if os.path.exists(folder + "/state.json"):
    state = json.load(open(folder + "/state.json"))
state["starts"] += 1
state["from_to"] = [time.time()]
state["threads"] = os.environ["OMP_NUM_THREADS"]
state["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES")
print("loading", flush=True)
def save():
    with open(folder + "/state.tmp", "w") as file:
        json.dump(state, file)
    os.replace(folder + "/state.tmp", folder + "/state.json")
def evaluation():
    teacher = {"mIoU": state["sum"], "IoU-a": 2.0 * state["sum"], "IoU-b": 1.0}
    return {"teacher": teacher, "student": {**teacher, "mIoU": state["sum"] - 1}}
save()
while state["iteration"] < total:
    time.sleep(behavior.get("seconds", 0))
    state["iteration"] += 1
    state["sum"] += len(run) + seed + state["iteration"] % 3
    with open(folder + "/metrics.json", "a") as file:
        flat = {f"shapes_val/{m}/{k}": v for m, metrics in evaluation().items() for k, v in metrics.items()}
        file.write(json.dumps({"iteration": state["iteration"] - 1, **flat}) + "\\n")
    save()
    if behavior.get("fail") == f"{run}/{seed}":
        raise RuntimeError("the disk is full")
state["from_to"].append(time.time())
save()
if behavior.get("die") == f"{run}/{seed}":
    os.kill(os.getpid(), 9)
entry = {"iteration": total, "shapes_val": evaluation()}
with open(folder + "/results.tmp", "w") as file:
    json.dump({"last": entry, "best": entry}, file)
os.replace(folder + "/results.tmp", folder + "/results.json")
print("done")
"""


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    generate(str(root / "shapes"), num_train=8, num_val=2, size=64, seed=0, labeled=(4,))
    return root


@pytest.fixture
def write(tmp_path, data_root, monkeypatch):
    """``write(**changes)`` -> path of a campaign file with these keys changed; None removes one."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_root))

    def write(**changes):
        content = {
            "output": str(tmp_path / "campaigns/test"),
            "config": CONFIG,
            "overrides": {"DATASETS.SPLIT": "shapes/splits/seed0/4", "SOLVER.MAX_ITER": 6},
            "seeds": [0, 1],
            "baseline": "plain",
            "runs": {"plain": {}, "changed": {"overrides": {"SOLVER.BASE_LR": 0.01}}},
        } | changes
        path = tmp_path / "test.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
        )
        return str(path)

    return write


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """``stand_in(seconds=..., fail="run/seed", die="run/seed")`` sets how the stand-in behaves from now on."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(running, "TRAIN_NET", script)
    monkeypatch.setattr(running, "POLL", 0.02)

    def behave(**behavior):
        (tmp_path / "campaigns").mkdir(exist_ok=True)
        (tmp_path / "campaigns/behavior.json").write_text(json.dumps(behavior))

    behave()
    return behave


@pytest.fixture
def make_results(write):
    """``make_results({"plain": {0: (teacher, student, classes)}})`` -> a campaign with these finished trainings.

    teacher, student: mIoU of the last evaluation; the best is one point higher. classes: {name: the teacher's IoU}.
    A training with None in place of the tuple has got to iteration 3 of 6.
    """

    def make(results, **changes):
        campaign = read_campaign(write(**changes))
        for training in campaign.trainings:
            with contextlib.suppress(KeyError):
                _fill(training, results[training.run][training.seed])
        return campaign

    return make


def _fill(training, values):
    folder = Path(training.folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(training.cfg.dump())
    if values is None:
        (folder / "metrics.json").write_text('{"iteration": 1}\n{"iteration": 2}\n')
        return
    teacher, student, classes = values

    def entry(iteration, gain):
        each = {f"IoU-{name}": iou for name, iou in classes.items()}
        return {
            "iteration": iteration,
            "shapes_val": {"teacher": {"mIoU": teacher + gain, **each}, "student": {"mIoU": student + gain}},
        }

    (folder / "results.json").write_text(json.dumps({"last": entry(6, 0), "best": entry(3, 1)}))
    lines = [
        {"iteration": 2, "shapes_val/teacher/mIoU": teacher + 1},
        {"iteration": 6, "shapes_val/teacher/mIoU": teacher},
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
