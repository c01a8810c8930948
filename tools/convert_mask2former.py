"""Turn an official Mask2Former checkpoint into an initialization for HierVL.

    python tools/convert_mask2former.py model_final.pkl mask2former.pth --config-file configs/coco_232_r50.yaml
    python train_net.py --config-file configs/coco_232_r50.yaml MODEL.WEIGHTS mask2former.pth

With --config-file the weights are compared with that config's network: what has no place in it, or another shape, is
left out and listed. Without it they are renamed only. The class head is for Mask2Former's own classes: it is kept for
MODEL.DECODER.CLASSIFIER linear (without a config: with --keep-classifier), never for text.
"""

import argparse
import collections
import os
import sys

import torch
from hiervl.checkpoint import atomic_write, read_state
from hiervl.config import load_config
from hiervl.errors import UserError, exit_status
from hiervl.ownership import OutputFolder
from hiervl.pickled_arrays import is_array, read_pickled_arrays

PREFIXES = {
    "backbone.": "backbone.",
    "sem_seg_head.pixel_decoder.": "pixel_decoder.",
    "sem_seg_head.predictor.": "decoder.",
}
CLASS_HEAD = "decoder.class_embed."
# Weights that every Mask2Former has, and what has them not.
LANDMARKS = {
    "decoder.transformer_cross_attention_layers.0.multihead_attn.in_proj_weight": "masked-attention decoder",
    "pixel_decoder.transformer.encoder.layers.0.self_attn.sampling_offsets.weight": "deformable-attention "
    "pixel decoder",
}


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """The weights of a .pkl or .pth checkpoint, under the names they have there.

    Raises:
        UserError: no such file, or no checkpoint.
    """
    state = read_pickled_arrays(path) if path.endswith(".pkl") else read_state(path, "the file to convert")
    state = state.get("model", state) if isinstance(state, dict) else {}
    weights = {
        name.removeprefix("module."): torch.as_tensor(value)
        for name, value in state.items()
        if is_array(value) or isinstance(value, torch.Tensor)
    }
    if not weights:
        raise UserError(f"{path}: holds no weights.")
    return weights


def new_name(name: str) -> str | None:
    """HierVL's name of a weight of Mask2Former, None when it has no place."""
    if name.startswith("sem_seg_head.") and not name.startswith(
        ("sem_seg_head.predictor.", "sem_seg_head.pixel_decoder.")
    ):
        name = name.replace("sem_seg_head.", "sem_seg_head.pixel_decoder.", 1)  # before it became a module of its own
    for old, new in PREFIXES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            # Names of early checkpoints.
            name = name.replace("decoder.static_query.", "decoder.query_feat.")
            return "decoder.level_embed.weight" if name == "decoder.level_embed" else name
    return None


def convert(weights: dict, path: str) -> tuple[dict, list[str]]:
    """Rename. Returns the weights under HierVL's names, and the names that have no place.

    Raises:
        UserError: these are not the weights of a Mask2Former.
    """
    if any(name.startswith(("decoder.", "pixel_decoder.")) for name in weights):
        raise UserError(f"{path}: has HierVL's own names already; name it in MODEL.WEIGHTS.")
    names = {name: new_name(name) for name in weights}
    result = {new: weights[name] for name, new in names.items() if new}
    for landmark, what in LANDMARKS.items():
        if landmark not in result:
            raise UserError(
                f"{path}: not a checkpoint of Mask2Former: no {what} in it (its first weight is {next(iter(weights))})."
            )
    return result, [name for name, new in names.items() if not new]


def fit(result: dict, network: torch.nn.Module, keep_classifier: bool):
    """Split into what fits the network and what does not.

    Returns:
        fitting weights, {reason: names left out}, names of the network's weights that the file has not.
    """
    own, left_out, fitting = network.state_dict(), collections.defaultdict(list), {}
    for name, value in result.items():
        if name.startswith(CLASS_HEAD) and not keep_classifier:
            left_out["class head"].append(name)
        elif name not in own:
            left_out["not in this config's network"].append(name)
        elif own[name].shape != value.shape:
            left_out["of another shape in this config's network"].append(
                f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
            )
        else:
            fitting[name] = value
    return fitting, left_out, [name for name in own if name not in fitting]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="Mask2Former's checkpoint, .pkl or .pth")
    parser.add_argument("output", help="file to write, for MODEL.WEIGHTS")
    parser.add_argument("--config-file", default="", help="HierVL config of the network that is to use it")
    parser.add_argument("--keep-classifier", action="store_true", help="without a config: keep the class head")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def run(args):
    folder = OutputFolder(os.path.dirname(args.output) or ".", "OUTPUT, the second argument")
    folder.check([args.output], [args.input, args.config_file])
    result, no_place = convert(read_weights(args.input), args.input)
    left_out, absent = {"without a place in HierVL": no_place}, []
    if args.config_file:
        result, more, absent = fit(result, *build_network(args))
        left_out.update(more)
        if not any(landmark in result for landmark in LANDMARKS):
            raise UserError(
                f"{args.input}: neither of its decoders fits the network of {args.config_file}; use a "
                "config with Mask2Former's sizes (CONV_DIM, HIDDEN_DIM 256)."
            )
    elif not args.keep_classifier:
        left_out["class head"] = [name for name in result if name.startswith(CLASS_HEAD)]
        result = {name: value for name, value in result.items() if not name.startswith(CLASS_HEAD)}
    folder.add([args.output])
    with atomic_write(args.output) as file:
        torch.save({"model": result}, file)
    report(args.output, result, left_out, absent)


def build_network(args):
    """The config's network, and whether its classifier is Mask2Former's."""
    from detectron2.modeling import build_model

    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    return build_model(cfg), cfg.MODEL.DECODER.CLASSIFIER == "linear"


def report(path, result, left_out, absent):
    parts = ", ".join(
        f"{part} {sum(name.startswith(part + '.') for name in result)}"
        for part in ("backbone", "pixel_decoder", "decoder")
    )
    print(f"{path}: {len(result)} weights ({parts})")
    for reason, names in left_out.items():
        if names:
            print(f"left out, {reason}: {len(names)} ({_few(names)})")
    if absent:
        print(f"not in the file, so initialized anew: {len(absent)} ({_few(absent)})")


def _few(names):
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
