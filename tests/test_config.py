"""Unknown keys are errors, every key is explained, every key is read."""
import re
from pathlib import Path

import detectron2.modeling.backbone.resnet as d2_resnet
import pytest
from detectron2.config import CfgNode

from hiervl.config import config_keys, load_config
from hiervl.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "Base-HierVL.yaml"
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads(path):
    load_config(str(path), [])


def test_the_base_config_holds_every_key_with_its_default_and_a_comment():
    defaults = load_config("", [])
    written = CfgNode.load_yaml_with_base(str(BASE))
    base = load_config(str(BASE), [])
    resnets = {key for key in config_keys(defaults) if key.startswith("MODEL.RESNETS.")}  # detectron2's own
    missing = set(config_keys(defaults)) - set(config_keys(CfgNode(written))) - resnets
    assert not missing
    for key in set(config_keys(defaults)) - {"MODEL.RESNETS.STRIDE_IN_1X1"}:
        assert _get(base, key) == _get(defaults, key), key


def _get(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def test_every_key_is_read_by_some_code():
    sources = [p.read_text() for p in [*(ROOT / "hiervl").rglob("*.py"), ROOT / "train_net.py"]
               if p.name != "config.py"]
    code = "\n".join(sources) + Path(d2_resnet.__file__).read_text()
    by_detectron2 = {"VERSION", "CUDNN_BENCHMARK", "MODEL.META_ARCHITECTURE"}
    # Read by name, from a table: each filter and regularizer has a test of its own.
    options_of_tables = {key for key in config_keys(load_config("", []))
                         if key.startswith(("SEMI.FILTER.", "MODEL.REGULARIZERS."))}
    unread = [key for key in config_keys(load_config("", []))
              if key not in by_detectron2 | options_of_tables
              and not re.search(rf"\.{key.split('.')[-1]}\b", code)]
    assert not unread


@pytest.mark.parametrize("overrides, message", [
    (["SEMI.WIEGHT", "1"], r"SEMI.WIEGHT.*did you mean SEMI.WEIGHT"),
    (["MODEL.RPN.NMS_THRESH", "0.5"], r"unknown config key MODEL.RPN"),
    (["SOLVER.MAX_ITER", "many"], r"command line: .*MAX_ITER|command line: .*str"),
    (["SEED"], r"'SEED' has no value"),
])
def test_a_wrong_override_ends_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load_config("", overrides)
    assert "\n" not in str(error.value)


def test_a_misspelt_key_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("SOLVER:\n  MAXITER: 5\n")
    with pytest.raises(UserError, match=r"mine.yaml.*SOLVER.MAXITER.*SOLVER.MAX_ITER"):
        load_config(str(path), [])


@pytest.mark.parametrize("content, message", [(None, "no such config file"), ("a: [1", "broken.yaml")])
def test_a_missing_or_broken_file(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(str(path), [])
