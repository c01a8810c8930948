"""Checks of a whole config, so that a mistake ends a run before anything is loaded.

What depends on data, weights, or the number of processes is checked where these are known.
"""

import torch

from ..errors import UserError, check_choice

CHOICES = {
    "MODEL.DECODER.CLASSIFIER": ("text", "linear"),
    "MODEL.TEXT.ABLATION": ("none", "random", "permuted"),
    "MODEL.CRITERION.SEGMENTS": ("class_regions", "components", "instances"),
    "MODEL.CRITERION.SEMANTIC_MATCHING": ("fixed", "hungarian"),
    "SOLVER.AMP.DTYPE": ("auto", "bfloat16", "float16"),
    "TEST.MODE": ("whole", "sliding"),
}
CHECKPOINTED_PARTS = ("backbone", "pixel_decoder", "decoder")
AT_LEAST = {
    "SEED": 0,  # every random draw is a function of it
    "SOLVER.MAX_ITER": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.ACCUMULATE": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.LOG_PERIOD": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "MODEL.HSQG.TOP_K": 1,
    "MODEL.DECODER.NUM_QUERIES": 1,
    "MODEL.DECODER.NUM_LAYERS": 1,
    "MODEL.CRITERION.NUM_POINTS": 1,
    "SEMI.UNLABELED_PER_BATCH": 0,
    "SEMI.STRONG_VIEWS": 0,
    "SEMI.BURN_IN": 0,
    "SEMI.RAMP": 0,
    "TEST.EVAL_PERIOD": 0,
    "INPUT.TEST_SHORT_SIDE": 0,
}
ABOVE_ZERO = (
    "SOLVER.BASE_LR",
    "SOLVER.CLIP_NORM",
    "MODEL.CRITERION.OVERSAMPLE_RATIO",
    "SEMI.EMA.HORIZON",
    "SEMI.EMA.MAX_SHARE",
    "SEMI.RARE_CLASS.TEMPERATURE",
)
SHARES = (  # from 0 to 1
    "INPUT.FLIP_PROB",
    "INPUT.GRAYSCALE_PROB",
    "MODEL.CRITERION.IMPORTANCE_RATIO",
    "SEMI.CUTMIX_PROB",
)
# A switch, what it needs, and how to say that.
NEEDS = (
    ("MODEL.HSQG.ENABLED", "MODEL.DECODER.CLASSIFIER", "text"),
    ("MODEL.CMSAM.ENABLED", "MODEL.HSQG.ENABLED", True),
    ("MODEL.PIXEL_DECODER.TEXT_AWARE", "MODEL.HSQG.ENABLED", True),
    ("MODEL.DECODER.SEMANTIC", "MODEL.HSQG.ENABLED", True),
)
FILTER_NEEDS = {"text_agreement": "MODEL.CMSAM.ENABLED", "relevance": "MODEL.HSQG.ENABLED"}


def validate(cfg) -> None:
    """
    Raises:
        UserError: a value out of its range, or values that do not go together.
    """
    _check_ranges(cfg)
    _check_solver(cfg.SOLVER)
    _check_environment(cfg)
    _check_text(cfg.MODEL)
    _check_modules(cfg)
    _check_criterion(cfg.MODEL)
    _check_semi(cfg)
    _check_input(cfg.INPUT)
    _check_test(cfg.TEST)


def get(cfg, key: str):
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _check_ranges(cfg):
    for key, choices in CHOICES.items():
        check_choice(get(cfg, key), choices, key)
    for key, least in AT_LEAST.items():
        if get(cfg, key) < least:
            raise UserError(f"{key} is {get(cfg, key)}; it must be at least {least}.")
    for key in ABOVE_ZERO:
        if not get(cfg, key) > 0:
            raise UserError(f"{key} is {get(cfg, key)}; it must be above 0.")
    for key in SHARES:
        if not 0 <= get(cfg, key) <= 1:
            raise UserError(f"{key} is {get(cfg, key)}; it is a share, from 0 to 1.")
    if not 0 <= cfg.SEMI.FEATURE_DROPOUT < 1:
        raise UserError(f"SEMI.FEATURE_DROPOUT is {cfg.SEMI.FEATURE_DROPOUT}; it must be from 0 to below 1.")


def _check_solver(solver):
    for part in solver.ACTIVATION_CHECKPOINTING:
        check_choice(part, CHECKPOINTED_PARTS, "SOLVER.ACTIVATION_CHECKPOINTING")


def _check_environment(cfg):
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        raise UserError(f"MODEL.DEVICE: {cfg.MODEL.DEVICE!r} is no device of PyTorch; use cuda or cpu.") from None
    if not cfg.OUTPUT_DIR:
        raise UserError("OUTPUT_DIR is empty; name a folder for the run.")
    if len(cfg.DATASETS.TRAIN) != 1:
        raise UserError(f"DATASETS.TRAIN is {tuple(cfg.DATASETS.TRAIN)}; name one dataset.")


def _check_modules(cfg):
    for key, needed, value in NEEDS:
        if get(cfg, key) and get(cfg, needed) != value:
            raise UserError(f"{key} is True but needs {needed} {value}; set {needed} to {value}, or {key} to False.")
    if cfg.MODEL.SIZE_DIVISIBILITY < 32 or cfg.MODEL.SIZE_DIVISIBILITY % 32:
        raise UserError(
            f"MODEL.SIZE_DIVISIBILITY is {cfg.MODEL.SIZE_DIVISIBILITY}; it must be a multiple of 32, res5's stride."
        )


def _check_criterion(model):
    criterion = model.CRITERION
    if criterion.SEMANTIC_MATCHING == "hungarian" and criterion.SEGMENTS == "class_regions":
        raise UserError(
            "MODEL.CRITERION.SEMANTIC_MATCHING hungarian shares a class's segments among its queries; set "
            "MODEL.CRITERION.SEGMENTS to components or instances."
        )
    if criterion.SEMANTIC_MATCHING == "hungarian" and not model.DECODER.SEMANTIC:
        raise UserError(
            "MODEL.CRITERION.SEMANTIC_MATCHING is about semantic queries, but MODEL.DECODER.SEMANTIC is False; set "
            "SEMANTIC_MATCHING to fixed."
        )


def _check_text(model):
    text = model.TEXT
    if model.DECODER.CLASSIFIER == "linear" and text.ABLATION != "none":
        raise UserError(
            f"MODEL.TEXT.ABLATION is {text.ABLATION!r}, but MODEL.DECODER.CLASSIFIER linear reads no texts; set "
            "MODEL.TEXT.ABLATION to none."
        )
    if text.ABLATION == "random" and text.CONTEXT_TOKENS:
        raise UserError(
            "MODEL.TEXT.ABLATION random removes the text tower that MODEL.TEXT.CONTEXT_TOKENS needs; set ABLATION to "
            "none or CONTEXT_TOKENS to 0."
        )


def _check_semi(cfg):
    options = cfg.SEMI.FILTER
    for name in cfg.SEMI.FILTERS:
        if str(name).upper() not in options:
            known = ", ".join(sorted(key.lower() for key in options))
            raise UserError(f"SEMI.FILTERS: no filter called {name!r}; known are {known}.")
        needed = FILTER_NEEDS.get(name)
        if needed and not get(cfg, needed):
            raise UserError(f"SEMI.FILTERS: the filter {name!r} needs {needed} True; set it, or remove the filter.")


def _check_input(options):
    low, high = options.SCALE_RANGE
    if min(options.CROP_SIZE) < 1:
        raise UserError(f"INPUT.CROP_SIZE is {tuple(options.CROP_SIZE)}; both sides must be at least 1 pixel.")
    if not 0 < low <= high:
        raise UserError(
            f"INPUT.SCALE_RANGE is {tuple(options.SCALE_RANGE)}; it must be (low, high) with 0 < low <= high."
        )
    if not 0 < options.CAT_MAX_RATIO <= 1:
        raise UserError(f"INPUT.CAT_MAX_RATIO is {options.CAT_MAX_RATIO}; it must be above 0 and at most 1.")


def _check_test(test):
    if test.MODE == "sliding" and not all(0 < step <= edge for step, edge in zip(test.STRIDE, test.WINDOW)):
        raise UserError(
            f"TEST.STRIDE: {tuple(test.STRIDE)} must be from 1 to TEST.WINDOW, {tuple(test.WINDOW)}, or some pixels "
            "lie in no window."
        )
    if not test.SCALES or min(test.SCALES) <= 0:
        raise UserError(f"TEST.SCALES: {tuple(test.SCALES)} must be one or more factors above 0.")
    if test.SELECTED_ONLY and (test.MODE == "sliding" or test.FLIP or len(test.SCALES) > 1):
        raise UserError(
            "TEST.SELECTED_ONLY needs TEST.MODE whole, one scale, and no TEST.FLIP: every window and view selects "
            "its own classes."
        )
