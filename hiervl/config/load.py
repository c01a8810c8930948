"""Reading config files and command-line overrides; every mistake in them is one line."""

import difflib
import os
import re

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from fvcore.common.config import BASE_KEY

from ..errors import UserError
from .defaults import add_hiervl_config
from .validate import validate

RENAMED = {  # keys of version 0.0
    "INPUT.GREY_PROB": "INPUT.GRAYSCALE_PROB",
    "MODEL.CMSAM.FLOWS": "MODEL.CMSAM.FEATURE_EXCHANGE",
    "MODEL.CMSAM.GUIDED": "MODEL.CMSAM.GUIDED_UPSAMPLING",
    "MODEL.HSQG.KEEP": "MODEL.HSQG.TOP_K",
    "MODEL.TEXT.CONTROL": "MODEL.TEXT.ABLATION",
    "SEMI.ABSENT_BELOW": "SEMI.ABSENCE_THRESHOLD",
    "SEMI.MEASURE": "SEMI.LOG_PSEUDO_LABEL_ACCURACY",
    "TEST.KEPT_ONLY": "TEST.SELECTED_ONLY",
}


def load_config(config_file: str, overrides: list) -> CN:
    """Read a config file and command-line overrides.

    Args:
        config_file: path of a YAML file; "" for the defaults.
        overrides: flat list KEY VALUE KEY VALUE ...
    Raises:
        UserError: a missing file, broken YAML, an unknown key, a value of the wrong type, or values that do not go
            together (see validate).
    """
    cfg = get_cfg()
    add_hiervl_config(cfg)
    if config_file:
        content = read_config_file(config_file)
        _merge(cfg, config_file, lambda: cfg.merge_from_other_cfg(CN(content)))
    if len(overrides) % 2:
        raise UserError(f"command line: {overrides[-1]!r} has no value; options are given as KEY VALUE pairs.")
    _merge(cfg, "command line", lambda: cfg.merge_from_list(overrides))
    validate(cfg)
    return cfg


def read_config_file(path: str, derived: tuple = ()) -> dict:
    """Content of a YAML config file, on top of the files that its `_BASE_` names (a path, or a list of paths).

    Detectron2's own reader falls back to a YAML loader that runs code, and follows `_BASE_` to URLs. A config may come
    from anybody: here it is plain data, from local files.

    Args:
        path: of the file; a relative `_BASE_` is relative to its folder.
        derived: the files that lead to this one through `_BASE_`.
    Raises:
        UserError: a file that is missing, unreadable, not YAML, not plain data or no mapping; a `_BASE_` that is a URL
            or leads back to the file itself.
    """
    if os.path.realpath(path) in derived:
        raise UserError(f"{path}: is its own _BASE_, directly or through other files; remove one of the links.")
    content = _read_yaml(path, derived)
    bases = content.pop(BASE_KEY, [])
    result = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "://" in base:
            raise UserError(f"{path}: {BASE_KEY} must name a local file, not {base!r}; download it and name the copy.")
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        _merge_dicts(read_config_file(base, (*derived, os.path.realpath(path))), result)
    _merge_dicts(content, result)
    return result


class _SafeLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a key that is given twice: YAML would silently take the later one."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _read_yaml(path, derived):
    if not os.path.isfile(path):
        what = f"{BASE_KEY} of {os.path.basename(derived[-1])}" if derived else "--config-file"
        raise UserError(f"{path}: no such config file ({what}); the ones that come with HierVL are in configs/.")
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _SafeLoader)
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{path}: holds more than plain values ({error.problem}), which HierVL does not load since it "
            "may run code; write the values out."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:200]}).") from None
    if not isinstance(content or {}, dict):
        raise UserError(f"{path}: needs lines `KEY: value`, but holds a {type(content).__name__}.")
    return content or {}


def _merge_dicts(content, result):
    """Write nested `content` over `result`, in place."""
    for key, value in content.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            _merge_dicts(value, result[key])
        else:
            result[key] = value


def _merge(cfg, source, merge):
    """Run one merge and turn yacs' errors into one line that names the key and its nearest neighbor."""
    try:
        merge()
    except (KeyError, AssertionError) as error:  # yacs raises the one for files, the other for lists
        reason = " ".join(str(error.args[0]).split())
        if "Non-existent" not in reason:
            raise UserError(f"{source}: {reason}") from None
        key = re.sub(r".*Non-existent (config )?key: *", "", reason)
        if key in RENAMED:
            raise UserError(f"{source}: the config key {key} is now called {RENAMED[key]}.") from None
        near = difflib.get_close_matches(key, list(config_keys(cfg)), n=1, cutoff=0.8)
        hint = f"did you mean {near[0]}?" if near else "the keys are explained in configs/Base-HierVL.yaml."
        raise UserError(f"{source}: unknown config key {key}; {hint}") from None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None


def config_keys(cfg: CN, prefix: str = ""):
    """Yield the dotted name of every leaf key."""
    for key, value in cfg.items():
        if isinstance(value, CN):
            yield from config_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
