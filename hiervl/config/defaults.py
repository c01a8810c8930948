"""The one place for every config key; each is explained in configs/Base-HierVL.yaml.

Detectron2's default config carries hundreds of keys that a semantic segmenter never reads. They are removed
here, so that setting one is an error ("unknown key") rather than a switch that silently does nothing.
"""

from detectron2.config import CfgNode as CN

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
    cfg.SOLVER.ACTIVATION_CHECKPOINTING = ()
    cfg.SOLVER.LOG_PERIOD = 20
    cfg.SOLVER.AMP.DTYPE = "auto"
    cfg.SOLVER.TF32 = True
