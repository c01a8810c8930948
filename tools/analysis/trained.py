"""What the tools share that look at a trained network: options, the network, the images, the file of results."""

import argparse
import json
import os

import numpy as np

from hiervl import Predictor
from hiervl.checkpoint import atomic_write
from hiervl.config import load_config, use_cpu_without_gpu
from hiervl.data.datasets import dataset_index, table_of
from hiervl.data.mapper import TestMapper
from hiervl.ownership import OutputFolder


def parser(doc: str) -> argparse.ArgumentParser:
    """With --config-file, --model and --opts; `doc` is the help's text."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--config-file", required=True, help="the config that the network was trained with")
    result.add_argument("--model", choices=("teacher", "student"), default="teacher")
    result.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides: KEY VALUE ...")
    return result


def read_config(config_file: str, overrides: list):
    """The config, on a GPU only if there is one."""
    cfg = load_config(config_file, overrides)
    use_cpu_without_gpu(cfg)
    return cfg


def load(cfg, model: str):
    """The network of MODEL.WEIGHTS in evaluation mode."""
    return Predictor(cfg, model=model).network


def samples(cfg, most: int = 0):
    """(iterable over the test samples of the first set of DATASETS.TEST, that set's table); `most`: so many of them,
    evenly spaced; 0: all."""
    part, mapper = cfg.DATASETS.TEST[0], TestMapper(cfg)
    index = dataset_index(part, cfg.DATASETS.SPLIT_ROOT)
    chosen = np.linspace(0, len(index) - 1, min(most or len(index), len(index))).round().astype(int)
    return (mapper(index[int(i)]) for i in chosen), table_of(part)


def output_folder(args, cfg, *file_names: str) -> OutputFolder:
    """The folder --output, in which these files are to be written.

    Raises:
        UserError: one of them is there already and was not made by a tool of ours.
    """
    paths = [os.path.join(args.output, name) for name in file_names]
    folder = OutputFolder(args.output, "--output", ours=all(map(_is_ours, paths)))
    read = [args.config_file, cfg.MODEL.WEIGHTS, getattr(args, "unseen", ""), getattr(args, "synonyms", "")]
    folder.check(paths, read)
    return folder


def _is_ours(path: str) -> bool:
    """Whether a file holds what `save` writes; earlier versions kept no record of it."""
    try:
        with open(path, encoding="utf-8") as file:
            return {"config", "weights", "model", "data set", "images"} <= set(json.load(file))
    except (OSError, ValueError, TypeError):
        return False


def save(args, cfg, file_name: str, facts: dict):
    """Write facts, and of which network and images they are, into the folder --output. "images" among the facts is
    how many there were, if not all."""
    part = cfg.DATASETS.TEST[0]
    facts = {
        "config": args.config_file,
        "weights": cfg.MODEL.WEIGHTS,
        "model": args.model,
        "data set": part,
        "images": len(dataset_index(part, cfg.DATASETS.SPLIT_ROOT)),
    } | facts
    path = os.path.join(args.output, file_name)
    output_folder(args, cfg, file_name).add([path])
    with atomic_write(path, "w") as file:
        json.dump(facts, file, indent=1)
    print(f"{facts['images']} images of {part}; {path}")
