"""A complete small run: shapes on disk, a tiny network, every part of the trainer real."""

import pytest

from hiervl.config import load_config
from hiervl.data.shapes import generate


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    generate(str(root / "shapes"), num_train=16, num_val=4, size=64, seed=0, labeled=(6,))
    return root


@pytest.fixture
def make_cfg(shapes_root, tmp_path, monkeypatch):
    """make_cfg("KEY", value, ...) -> the config of a tiny run."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_root))

    def make(*overrides):
        cfg = load_config(
            "",
            [
                "MODEL.DEVICE",
                "cpu",
                "MODEL.BACKBONE.NAME",
                "TimmBackbone",
                "MODEL.BACKBONE.TIMM.NAME",
                "lcnet_050",
                "MODEL.BACKBONE.FREEZE_BN",
                False,
                "MODEL.PIXEL_DECODER.CONV_DIM",
                32,
                "MODEL.PIXEL_DECODER.MASK_DIM",
                32,
                "MODEL.PIXEL_DECODER.ENC_LAYERS",
                1,
                "MODEL.PIXEL_DECODER.FEEDFORWARD_DIM",
                64,
                "MODEL.DECODER.HIDDEN_DIM",
                32,
                "MODEL.DECODER.NUM_LAYERS",
                3,
                "MODEL.DECODER.NUM_QUERIES",
                10,
                "MODEL.DECODER.FEEDFORWARD_DIM",
                64,
                "MODEL.TEXT.EMBEDDINGS",
                "hiervl/data/tables/shapes_minilm.npz",
                "MODEL.CRITERION.NUM_POINTS",
                128,
                "DATASETS.TRAIN",
                ("shapes_train",),
                "DATASETS.TEST",
                ("shapes_val",),
                "DATASETS.SPLIT_ROOT",
                "",
                "DATASETS.SPLIT",
                "shapes/splits/seed0/6",
                "INPUT.CROP_SIZE",
                (64, 64),
                "DATALOADER.NUM_WORKERS",
                0,
                "SOLVER.IMS_PER_BATCH",
                2,
                "SOLVER.MAX_ITER",
                6,
                "SOLVER.BASE_LR",
                1e-3,
                "SOLVER.WARMUP_ITERS",
                2,
                "SOLVER.LOG_PERIOD",
                1,
                "SOLVER.CHECKPOINT_PERIOD",
                3,
                "SEMI.UNLABELED_PER_BATCH",
                2,
                "SEMI.BURN_IN",
                2,
                "SEMI.RAMP",
                2,
                "SEMI.FILTERS",
                ("adaptive",),
                "SEMI.FILTER.ADAPTIVE.FLOOR",
                0.0,
                "OUTPUT_DIR",
                str(tmp_path / "run"),
                *overrides,
            ],
        )
        cfg.freeze()
        return cfg

    return make
