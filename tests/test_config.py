"""Unknown keys are errors, every key is explained, every key is read."""

import ast
from pathlib import Path

import detectron2.modeling.backbone.resnet as d2_resnet
import pytest
from detectron2.config import CfgNode

from hiervl.config import RENAMED, config_keys, load_config, read_config_file
from hiervl.config.validate import CHOICES, FILTER_NEEDS
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
    files = [
        path
        for path in [*(ROOT / "hiervl").rglob("*.py"), ROOT / "train_net.py", Path(d2_resnet.__file__)]
        if path.parent.name != "config"
    ]
    read = set().union(*(keys_read_by(path.read_text()) for path in files))
    by_detectron2 = {"VERSION", "CUDNN_BENCHMARK", "MODEL.META_ARCHITECTURE"}
    # Read by name, from a table: each filter and regularizer has a test of its own.
    options_of_tables = {
        key for key in config_keys(load_config("", [])) if key.startswith(("SEMI.FILTER.", "MODEL.REGULARIZERS."))
    }
    assert not set(config_keys(load_config("", []))) - read - by_detectron2 - options_of_tables


def keys_read_by(source):
    """Dotted names of what a source reads of `cfg`, directly or by a name for a section (`options = cfg.TEST`)."""
    found = set()
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        sections = {"cfg": ()}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                pairs = [(node.targets[0], node.value)]
                if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(node.targets[0].elts, node.value.elts)
                sections |= {
                    name.id: _path(value, sections)
                    for name, value in pairs
                    if isinstance(name, ast.Name) and _path(value, sections)
                }
        paths = [_path(node, sections) for node in ast.walk(function) if isinstance(node, ast.Attribute)]
        found |= {".".join(path) for path in paths if path}
    return found


def _path(node, sections):
    """("MODEL", "HSQG", "TOP_K") of the expression cfg.MODEL.HSQG.TOP_K; None of one that does not begin with cfg."""
    if isinstance(node, ast.Name):
        return sections.get(node.id)
    if isinstance(node, ast.Attribute):
        if node.attr == "cfg":
            return ()
        before = _path(node.value, sections)
        return None if before is None else (*before, node.attr)
    return None


def test_a_key_is_found_under_its_section_only():
    source = """def f(cfg, other):
    a, b = cfg.MODEL.HSQG, cfg.TEST
    return a.TOP_K, b.MODE, other.SEED, cfg.SEMI.EMA.HORIZON"""
    assert {"MODEL.HSQG.TOP_K", "TEST.MODE", "SEMI.EMA.HORIZON"} <= keys_read_by(source)
    assert not {"SEED", "TOP_K", "MODEL.TOP_K"} & keys_read_by(source)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["SEMI.WIEGHT", "1"], r"SEMI.WIEGHT.*did you mean SEMI.WEIGHT"),
        (["MODEL.RPN.NMS_THRESH", "0.5"], r"unknown config key MODEL.RPN"),
        (["SOLVER.MAX_ITER", "many"], r"command line: .*MAX_ITER|command line: .*str"),
        (["SEED"], r"'SEED' has no value"),
    ],
)
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


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [{proof}]",
        "!!python/object/new:os.mkdir [{proof}]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
    ],
)
@pytest.mark.parametrize("place", ["itself", "_BASE_"])
def test_no_config_runs_code(tmp_path, tag, place):
    proof = tmp_path / "executed"
    (tmp_path / "evil.yaml").write_text("SOLVER: " + tag.format(proof=proof))
    (tmp_path / "mine.yaml").write_text("_BASE_: evil.yaml")
    with pytest.raises(UserError, match="evil.yaml: holds more than plain values") as error:
        load_config(str(tmp_path / ("evil.yaml" if place == "itself" else "mine.yaml")), [])
    assert "\n" not in str(error.value) and not proof.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("_BASE_: https://example.org/evil.yaml", "must name a local file"),
        ("_BASE_: file:///etc/evil.yaml", "must name a local file"),
        ("_BASE_: [mine.yaml]", "is its own _BASE_"),
        ("_BASE_: there/../mine.yaml", "is its own _BASE_"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml: no such config file .*_BASE_ of mine.yaml"),
        ("_BASE_: there", "there: no such config file"),
        ("_BASE_: 3", "must name a local file, not 3"),
        ("_BASE_: [[]]", "must name a local file"),
        ("- a\n- b", "holds a list"),
        ("just words", "holds a str"),
        ("a: &a [*a]", "mine.yaml: "),
        ("SEED: 2020-01-01", "mine.yaml: .*not a valid type"),
        ("a: " + "[" * 3000, "cannot be read as YAML"),
        ("\0", "cannot be read as YAML"),
        ("? [1, 2]\n: 3", "mine.yaml: "),
        ("1: 2", "mine.yaml: "),
        ("MODEL: 3", "mine.yaml: "),
        ("SEED: 1\nSEED: 2", "'SEED' is given twice in .*mine.yaml.*line 2"),
        ("SOLVER: {MAX_ITER: 1, MAX_ITER: 1}", "'MAX_ITER' is given twice"),
    ],
)
def test_what_is_no_config_ends_in_one_line(tmp_path, content, message):
    (tmp_path / "there").mkdir()
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_config(str(path), [])
    assert "\n" not in str(error.value)


def test_a_merged_mapping_may_be_overridden(tmp_path):
    lines = ["MODEL:", "  HSQG: &a {ENABLED: True, TOP_K: 3}", "  CMSAM: {<<: *a, ENABLED: False}"]
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    content = read_config_file(str(tmp_path / "mine.yaml"))
    assert content["MODEL"]["CMSAM"] == {"ENABLED": False, "TOP_K": 3}


def test_later_bases_and_the_file_itself_win(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 1\nSOLVER: {MAX_ITER: 1, BASE_LR: 1.0}")
    (tmp_path / "b.yaml").write_text("SEED: 2\nSOLVER: {MAX_ITER: 2}")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]\nSEED: 3")
    cfg = load_config(str(tmp_path / "c.yaml"), [])
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (3, 2, 1.0)


def test_every_renamed_key_is_refused_with_its_new_name(tmp_path):
    known = set(config_keys(load_config("", [])))
    for old, new in RENAMED.items():
        assert new in known and old not in known
        with pytest.raises(UserError, match=f"the config key {old} is now called {new}") as error:
            load_config("", [old, "1"])
        assert "\n" not in str(error.value)
    (tmp_path / "old.yaml").write_text("MODEL: {HSQG: {KEEP: 4}}")
    with pytest.raises(UserError, match="old.yaml: the config key MODEL.HSQG.KEEP is now called MODEL.HSQG.TOP_K"):
        load_config(str(tmp_path / "old.yaml"), [])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER is 0; it must be at least 1"),
        (["SOLVER.LOG_PERIOD", "0"], "SOLVER.LOG_PERIOD is 0"),
        (["DATALOADER.NUM_WORKERS", "-1"], "DATALOADER.NUM_WORKERS is -1"),
        (["SEED", "-1"], "SEED is -1"),
        (["SOLVER.BASE_LR", "0.0"], "SOLVER.BASE_LR is 0.0; it must be above 0"),
        (["INPUT.FLIP_PROB", "1.5"], "INPUT.FLIP_PROB is 1.5; it is a share"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE: 'gpu' is no device"),
        (["OUTPUT_DIR", ""], "OUTPUT_DIR is empty"),
        (["DATASETS.TRAIN", "('a', 'b')"], "DATASETS.TRAIN is .*name one dataset"),
        (["MODEL.SIZE_DIVISIBILITY", "48"], "multiple of 32"),
        (["MODEL.HSQG.TOP_K", "0"], "MODEL.HSQG.TOP_K is 0"),
        (["MODEL.HSQG.ENABLED", "False"], "MODEL.CMSAM.ENABLED is True but needs MODEL.HSQG.ENABLED True"),
        (["MODEL.DECODER.CLASSIFIER", "linear"], "MODEL.HSQG.ENABLED is True but needs MODEL.DECODER.CLASSIFIER text"),
        (["SEMI.FILTERS", "('surest',)"], "no filter called 'surest'; known are adaptive, boundary, confidence"),
        (["INPUT.SCALE_RANGE", "(2.0, 0.5)"], "INPUT.SCALE_RANGE"),
        (["INPUT.CROP_SIZE", "(0, 8)"], "INPUT.CROP_SIZE"),
        (["INPUT.CAT_MAX_RATIO", "0.0"], "INPUT.CAT_MAX_RATIO"),
        (["TEST.MODE", "tiled"], "TEST.MODE: 'tiled' is not one of whole, sliding"),
        (["TEST.MODE", "sliding", "TEST.STRIDE", "(600, 341)"], "TEST.STRIDE"),
        (["TEST.MODE", "sliding", "TEST.STRIDE", "(0, 341)"], "TEST.STRIDE"),
        (["TEST.SCALES", "()"], "TEST.SCALES"),
        (["TEST.SCALES", "(1.0, 0.0)"], "TEST.SCALES"),
        (["TEST.SELECTED_ONLY", "True", "TEST.FLIP", "True"], "TEST.SELECTED_ONLY"),
        (["TEST.SELECTED_ONLY", "True", "TEST.SCALES", "(0.5, 1.0)"], "TEST.SELECTED_ONLY"),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_is_loaded(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load_config("", overrides)
    assert "\n" not in str(error.value)


def test_the_tables_of_checks_fit_the_code():
    from hiervl.losses.targets import SEGMENTS
    from hiervl.semi.filters import FILTERS

    assert CHOICES["MODEL.CRITERION.SEGMENTS"] == SEGMENTS
    assert {key.lower() for key in load_config("", []).SEMI.FILTER} == set(FILTERS)
    assert set(FILTER_NEEDS) <= set(FILTERS)
