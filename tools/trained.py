"""What the tools share that look at a trained network: their options, and how the network is loaded."""
import argparse

from detectron2.modeling import build_model

from hiervl import meta_arch  # noqa: F401  (registers HierVL with detectron2)
from hiervl.checkpoint import load_network
from hiervl.config import load_config, use_cpu_without_gpu
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
