"""Checks what the trainings of a campaign need, and what their folders already contain."""

import os

from hiervl.config import config_keys, load_config, use_cpu_without_gpu
from hiervl.config.validate import get
from hiervl.data.datasets import dataset_index
from hiervl.data.loaders import split_from_config
from hiervl.download import is_url
from hiervl.errors import UserError
from hiervl.ownership import OutputFolder
from hiervl.paths import find_file

from .definition import Campaign, Training

# Keys that may differ between a run and its definition, because they do not change results.
FREE_KEYS = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.LOG_PERIOD",
)


def check_data(campaign: Campaign, trainings: list) -> None:
    """Look for what these trainings of a campaign need: files and a device.

    Raises:
        UserError: a list of images is missing or broken, a file of weights or embeddings is missing, or the machine has
            an NVIDIA GPU that PyTorch cannot use.
    """
    checked = set()
    for training in trainings:
        try:
            if (lists := str(training.cfg.DATASETS)) not in checked:
                _check_lists(training.cfg)
                checked.add(lists)
            _check_weights(training.cfg)
            use_cpu_without_gpu(training.cfg.clone())
        except UserError as error:
            raise UserError(f"{campaign.path}, {training.label}: {error}") from None


def _check_lists(cfg):
    split_from_config(cfg)
    for name in cfg.DATASETS.TEST:
        dataset_index(name, cfg.DATASETS.SPLIT_ROOT)


def _check_weights(cfg):
    files = {
        "MODEL.WEIGHTS": cfg.MODEL.WEIGHTS.partition("?")[0],  # the query is for Detectron2
        "MODEL.BACKBONE.WEIGHTS": cfg.MODEL.BACKBONE.WEIGHTS,
        "MODEL.TEXT.EMBEDDINGS": find_file(cfg.MODEL.TEXT.EMBEDDINGS),
    }
    for key, path in files.items():
        if path and not is_url(path) and not os.path.isfile(path):
            raise UserError(f"{path}: no such file ({key}).")


def check_folders(campaign: Campaign, files: list) -> OutputFolder:
    """Compare what the output folder holds with the definition.

    Args:
        files: the files that the campaign itself writes.

    Raises:
        UserError: a folder contains a run with another definition, or files that are not from a run.
    """
    output = OutputFolder(campaign.output, f"output in {campaign.path}")
    output.check([*files, *(training.log for training in campaign.trainings)], [campaign.path])
    for training in campaign.trainings:
        path = os.path.join(training.folder, "config.yaml")
        if os.path.isfile(path):
            _check_same(training, path, campaign.path)
        elif os.path.isdir(training.folder) and os.listdir(training.folder) and not os.path.exists(training.log):
            output.refuse_foreign(training.folder)
    return output


def _check_same(training: Training, path: str, campaign: str):
    """Compare the config that the trainer wrote into its folder with the definition."""
    existing = load_config(path, [])
    for key in config_keys(training.cfg):
        expected, found = get(training.cfg, key), get(existing, key)
        if key not in FREE_KEYS and expected != found:
            raise UserError(
                f"{training.folder}: contains a run with {key} {found!r}, but {campaign} says {expected!r}; choose "
                "another output, give the run another name, or delete the folder to train it anew."
            )
