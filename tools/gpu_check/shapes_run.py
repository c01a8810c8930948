"""Short runs of the trainer on generated images."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from hiervl.config import load_config
from hiervl.data.shapes import generate
from hiervl.semi.trainer import SemiSupervisedTrainer

from .findings import ROOT, Settings
from .networks import TINY

CONFIG = ROOT / "configs" / "shapes.yaml"


@contextlib.contextmanager
def shapes_folder() -> Iterator[Path]:
    """A temporary folder with the dataset, in which runs may leave their files."""
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, DETECTRON2_DATASETS=folder):
            generate(f"{folder}/shapes", num_train=24, num_val=2, size=64, seed=0, labeled=(8,))
            yield Path(folder)


def overrides(settings: Settings, output: Path, iterations: int, *more) -> list:
    """KEY VALUE pairs of a run whose second half has pseudo-labels; it logs every iteration."""
    pairs = {
        "MODEL.DEVICE": settings.device,
        "DATASETS.SPLIT": "shapes/splits/seed0/8",
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.LOG_PERIOD": 1,
        "SEMI.BURN_IN": iterations // 2,
        "SEMI.RAMP": 0,
        "OUTPUT_DIR": str(output),
    }
    small = ("SOLVER.IMS_PER_BATCH", 2, "SEMI.UNLABELED_PER_BATCH", 2, *TINY) if settings.tiny else ()
    return [item for pair in pairs.items() for item in pair] + [*small, *more]


class ShortRun(SemiSupervisedTrainer):
    """Without the evaluation at the end."""

    def evaluate(self):
        return {}


def make_trainer(pairs: list, kind: type[SemiSupervisedTrainer]) -> SemiSupervisedTrainer:
    """A trainer of the shapes config with these overrides."""
    cfg = load_config(str(CONFIG), pairs)
    cfg.freeze()
    return kind(cfg)


def logged(output: Path, name: str) -> list[float]:
    """A number of the run's log, iteration by iteration."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [line[name] for line in lines if name in line]
