"""What the tools share that look at a trained network: options, the network, the images, the file of results."""
import argparse
import json
import os

import numpy as np
from detectron2.modeling import build_model

from hiervl.checkpoint import atomic_write, load_network
from hiervl.config import load_config, use_cpu_without_gpu
from hiervl.data.datasets import dataset_index, table_of
from hiervl.data.mapper import TestMapper
from hiervl.errors import UserError


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
    """The network of MODEL.WEIGHTS in evaluation mode.

    Raises:
        UserError: no checkpoint is named.
    """
    if not cfg.MODEL.WEIGHTS:
        raise UserError("MODEL.WEIGHTS is empty: name a checkpoint, as in --opts MODEL.WEIGHTS "
                        "output/camvid_23_hiervl/model_final.pth.")
    network = build_model(cfg).eval()
    load_network(network, cfg.MODEL.WEIGHTS, model)
    return network


def samples(cfg, most: int = 0):
    """(iterable over the test samples of the first set of DATASETS.TEST, that set's table); `most`: so many of them,
    evenly spaced; 0: all."""
    part, mapper = cfg.DATASETS.TEST[0], TestMapper(cfg)
    index = dataset_index(part, cfg.DATASETS.SPLIT_ROOT)
    chosen = np.linspace(0, len(index) - 1, min(most or len(index), len(index))).round().astype(int)
    return (mapper(index[int(i)]) for i in chosen), table_of(part)


def save(args, cfg, file_name: str, facts: dict):
    """Write facts, and of which network and images they are, into the folder --output. "images" among the facts is
    how many there were, if not all."""
    part = cfg.DATASETS.TEST[0]
    facts = {"config": args.config_file, "weights": cfg.MODEL.WEIGHTS, "model": args.model, "data set": part,
             "images": len(dataset_index(part, cfg.DATASETS.SPLIT_ROOT))} | facts
    os.makedirs(args.output, exist_ok=True)
    path = os.path.join(args.output, file_name)
    with atomic_write(path, "w") as file:
        json.dump(facts, file, indent=1)
    print(f"{facts['images']} images of {part}; {path}")
