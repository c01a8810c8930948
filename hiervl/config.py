"""The one place for every config key; each is explained in configs/Base-HierVL.yaml.

Detectron2's default config carries hundreds of keys that a semantic segmenter never reads. They are removed
here, so that setting one is an error ("unknown key") rather than a switch that silently does nothing.
"""

import difflib
import os
import re

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from fvcore.common.config import BASE_KEY

from .errors import UserError

# What is kept of detectron2's own tree; everything else is dropped.
_KEPT_MODEL = ("DEVICE", "META_ARCHITECTURE", "WEIGHTS", "BACKBONE", "RESNETS")
_KEPT_SOLVER = (
    "MAX_ITER",
    "BASE_LR",
    "WEIGHT_DECAY",
    "WEIGHT_DECAY_NORM",
    "WARMUP_FACTOR",
    "WARMUP_ITERS",
    "CHECKPOINT_PERIOD",
    "IMS_PER_BATCH",
    "AMP",
)


def add_hiervl_config(cfg: CN) -> None:
    """Turn detectron2's default config into HierVL's, in place."""
    _prune(cfg)
    _add_model(cfg)
    _add_data(cfg)
    _add_semi(cfg)
    _add_solver(cfg)
    cfg.SEED = 0


def _prune(cfg):
    for key in [k for k in cfg.MODEL if k not in _KEPT_MODEL]:
        del cfg.MODEL[key]
    for key in [k for k in cfg.SOLVER if k not in _KEPT_SOLVER]:
        del cfg.SOLVER[key]
    for key in ("INPUT", "DATASETS", "DATALOADER", "TEST", "GLOBAL", "VIS_PERIOD"):
        del cfg[key]


def _add_model(cfg):
    cfg.MODEL.META_ARCHITECTURE = "HierVL"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.MODEL.SIZE_DIVISIBILITY = 32

    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.BACKBONE.FREEZE_BN = True
    cfg.MODEL.BACKBONE.WEIGHTS = ""
    cfg.MODEL.BACKBONE.FREEZE = False
    cfg.MODEL.BACKBONE.ATTENTION_ONLY = False
    cfg.MODEL.BACKBONE.TIMM = CN()
    cfg.MODEL.BACKBONE.TIMM.NAME = "resnet50"
    cfg.MODEL.BACKBONE.TIMM.PRETRAINED = False
    cfg.MODEL.BACKBONE.TIMM.DROP_PATH = 0.0
    cfg.MODEL.BACKBONE.CLIP = CN()
    cfg.MODEL.BACKBONE.CLIP.MODEL = "ViT-B-16"
    cfg.MODEL.BACKBONE.CLIP.PRETRAINED = "openai"
    cfg.MODEL.BACKBONE.CLIP.DROP_PATH = 0.0

    cfg.MODEL.PIXEL_DECODER = CN()
    cfg.MODEL.PIXEL_DECODER.CONV_DIM = 256
    cfg.MODEL.PIXEL_DECODER.MASK_DIM = 256
    cfg.MODEL.PIXEL_DECODER.ENC_LAYERS = 6
    cfg.MODEL.PIXEL_DECODER.NUM_HEADS = 8
    cfg.MODEL.PIXEL_DECODER.NUM_POINTS = 4
    cfg.MODEL.PIXEL_DECODER.FEEDFORWARD_DIM = 1024
    cfg.MODEL.PIXEL_DECODER.TEXT_AWARE = False

    cfg.MODEL.DECODER = CN()
    cfg.MODEL.DECODER.HIDDEN_DIM = 256
    cfg.MODEL.DECODER.NUM_QUERIES = 100
    cfg.MODEL.DECODER.NUM_HEADS = 8
    cfg.MODEL.DECODER.NUM_LAYERS = 9
    cfg.MODEL.DECODER.FEEDFORWARD_DIM = 2048
    cfg.MODEL.DECODER.CLASSIFIER = "text"
    cfg.MODEL.DECODER.SEMANTIC = True

    cfg.MODEL.TEXT = CN()
    cfg.MODEL.TEXT.EMBEDDINGS = ""
    cfg.MODEL.TEXT.EXTRA_EMBEDDINGS = ()
    cfg.MODEL.TEXT.MODEL = "ViT-B-16"
    cfg.MODEL.TEXT.PRETRAINED = "openai"
    cfg.MODEL.TEXT.TEMPLATES = ("a photo of a {}",)
    cfg.MODEL.TEXT.CACHE = ""
    cfg.MODEL.TEXT.CONTEXT_TOKENS = 0
    cfg.MODEL.TEXT.DEFINITIONS = ""
    cfg.MODEL.TEXT.DISTRACTORS = ""
    cfg.MODEL.TEXT.CENTER = True
    cfg.MODEL.TEXT.ADAPTER = False
    cfg.MODEL.TEXT.ABLATION = "none"

    cfg.MODEL.HSQG = CN()
    cfg.MODEL.HSQG.ENABLED = True
    cfg.MODEL.HSQG.TOP_K = 48
    cfg.MODEL.HSQG.MIN_RELEVANCE = 0.05

    cfg.MODEL.CMSAM = CN()
    cfg.MODEL.CMSAM.ENABLED = True
    cfg.MODEL.CMSAM.FEATURE_EXCHANGE = True
    cfg.MODEL.CMSAM.GUIDED_UPSAMPLING = True
    cfg.MODEL.CMSAM.BOUNDARY_WEIGHT = 1.0
    cfg.MODEL.CMSAM.BOUNDARY_WIDTH = 3

    cfg.MODEL.REGULARIZERS = CN()
    cfg.MODEL.REGULARIZERS.LANGUAGE = 0.1
    cfg.MODEL.REGULARIZERS.VISION_LANGUAGE = 1.0
    cfg.MODEL.REGULARIZERS.RELEVANCE = 1.0
    cfg.MODEL.REGULARIZERS.DIVERSITY = 0.1
    cfg.MODEL.REGULARIZERS.CONTRASTIVE = 0.1
    cfg.MODEL.REGULARIZERS.VISION = 0.0
    cfg.MODEL.REGULARIZERS.CONSISTENCY = 1.0
    cfg.MODEL.REGULARIZERS.GUIDANCE = 0.0

    cfg.MODEL.CRITERION = CN()
    cfg.MODEL.CRITERION.CLASS_WEIGHT = 2.0
    cfg.MODEL.CRITERION.MASK_WEIGHT = 5.0
    cfg.MODEL.CRITERION.DICE_WEIGHT = 5.0
    cfg.MODEL.CRITERION.PIXEL_WEIGHT = 2.0
    cfg.MODEL.CRITERION.PRESENCE_WEIGHT = 2.0
    cfg.MODEL.CRITERION.NO_OBJECT_WEIGHT = 0.1
    cfg.MODEL.CRITERION.NUM_POINTS = 12544
    cfg.MODEL.CRITERION.OVERSAMPLE_RATIO = 3.0
    cfg.MODEL.CRITERION.IMPORTANCE_RATIO = 0.75
    cfg.MODEL.CRITERION.DEEP_SUPERVISION = True
    cfg.MODEL.CRITERION.SEGMENTS = "class_regions"
    cfg.MODEL.CRITERION.SEMANTIC_MATCHING = "fixed"
    cfg.MODEL.CRITERION.MIN_AREA = 64


def _add_data(cfg):
    cfg.DATASETS = CN()
    cfg.DATASETS.TRAIN = ("camvid_train",)
    cfg.DATASETS.TEST = ("camvid_val",)
    cfg.DATASETS.SPLIT_ROOT = "datasets/splits"
    cfg.DATASETS.SPLIT = ""

    cfg.DATALOADER = CN()
    cfg.DATALOADER.NUM_WORKERS = 2

    cfg.INPUT = CN()
    cfg.INPUT.CROP_SIZE = (512, 512)
    cfg.INPUT.SCALE_RANGE = (0.5, 2.0)
    cfg.INPUT.FLIP_PROB = 0.5
    cfg.INPUT.CAT_MAX_RATIO = 1.0
    cfg.INPUT.COLOR_JITTER = (0.5, 0.5, 0.5, 0.25)
    cfg.INPUT.GRAYSCALE_PROB = 0.2
    cfg.INPUT.TEST_SHORT_SIDE = 0

    cfg.TEST = CN()
    cfg.TEST.EVAL_PERIOD = 0
    cfg.TEST.MODE = "whole"
    cfg.TEST.WINDOW = (512, 512)
    cfg.TEST.STRIDE = (341, 341)
    cfg.TEST.SCALES = (1.0,)
    cfg.TEST.FLIP = False
    cfg.TEST.SELECTED_ONLY = False
    cfg.TEST.BOUNDARY_IOU = False
    cfg.TEST.COMPARE = ""


def _add_semi(cfg):
    cfg.SEMI = CN()
    cfg.SEMI.UNLABELED_PER_BATCH = 0
    cfg.SEMI.STRONG_VIEWS = 2
    cfg.SEMI.FEATURE_DROPOUT = 0.5
    cfg.SEMI.CUTMIX_PROB = 0.5
    cfg.SEMI.WEIGHT = 1.0
    cfg.SEMI.BURN_IN = 0
    cfg.SEMI.RAMP = 0
    cfg.SEMI.LOG_PSEUDO_LABEL_ACCURACY = False
    cfg.SEMI.ABSENCE_THRESHOLD = 0.05

    cfg.SEMI.EMA = CN()
    cfg.SEMI.EMA.HORIZON = 1000
    cfg.SEMI.EMA.MAX_SHARE = 0.05

    cfg.SEMI.FILTERS = ("confidence",)
    cfg.SEMI.FILTER = CN()
    cfg.SEMI.FILTER.CONFIDENCE = CN({"THRESHOLD": 0.95})
    cfg.SEMI.FILTER.ADAPTIVE = CN({"QUANTILE": 0.2, "FLOOR": 0.6, "CEILING": 0.95, "MOMENTUM": 0.99})
    cfg.SEMI.FILTER.REGION = CN({"MIN_AREA": 64})
    cfg.SEMI.FILTER.TEXT_AGREEMENT = CN({"MARGIN": 0.1})
    cfg.SEMI.FILTER.RELEVANCE = CN({"THRESHOLD": 0.1})
    cfg.SEMI.FILTER.BOUNDARY = CN({"MARGIN": 2})
    cfg.SEMI.FILTER.IMAGE_AVERAGE = CN({"THRESHOLD": 0.95})

    cfg.SEMI.RARE_CLASS = CN()
    cfg.SEMI.RARE_CLASS.ENABLED = False
    cfg.SEMI.RARE_CLASS.TEMPERATURE = 0.1
    cfg.SEMI.RARE_CLASS.MIN_PIXELS = 100


def _add_solver(cfg):
    cfg.SOLVER.BASE_LR = 1e-4
    cfg.SOLVER.WEIGHT_DECAY = 1e-4
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    cfg.SOLVER.WARMUP_ITERS = 1500
    cfg.SOLVER.POLY_POWER = 0.9
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.CLIP_NORM = 0.01
    cfg.SOLVER.ACCUMULATE = 1
    cfg.SOLVER.LOG_PERIOD = 20


def load_config(config_file: str, overrides: list) -> CN:
    """Read a config file and command-line overrides.

    Args:
        config_file: path of a YAML file; "" for the defaults.
        overrides: flat list KEY VALUE KEY VALUE ...
    Raises:
        UserError: a missing file, broken YAML, an unknown key or a value of the wrong type.
    """
    cfg = get_cfg()
    add_hiervl_config(cfg)
    if config_file:
        content = read_config_file(config_file)
        _merge(cfg, config_file, lambda: cfg.merge_from_other_cfg(CN(content)))
    if len(overrides) % 2:
        raise UserError(f"command line: {overrides[-1]!r} has no value; options are given as KEY VALUE pairs.")
    _merge(cfg, "command line", lambda: cfg.merge_from_list(overrides))
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


def _read_yaml(path, derived):
    if not os.path.isfile(path):
        what = f"{BASE_KEY} of {os.path.basename(derived[-1])}" if derived else "--config-file"
        raise UserError(f"{path}: no such config file ({what}); the ones that come with HierVL are in configs/.")
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
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


def use_cpu_without_gpu(cfg: CN) -> None:
    """Detectron2's default device is a GPU; change it in place on a machine that has none."""
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"


def _merge(cfg, source, merge):
    """Run one merge and turn yacs' errors into one line that names the key and its nearest neighbor."""
    try:
        merge()
    except (KeyError, AssertionError) as error:  # yacs raises the one for files, the other for lists
        reason = " ".join(str(error.args[0]).split())
        if "Non-existent" not in reason:
            raise UserError(f"{source}: {reason}") from None
        key = re.sub(r".*Non-existent (config )?key: *", "", reason)
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
