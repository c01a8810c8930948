"""Convert an official Mask2Former checkpoint into an initialization for HierVL.

    python tools/convert_mask2former.py model_final.pkl mask2former.pth --config-file configs/coco_232_r50.yaml
    python train_net.py --config-file configs/coco_232_r50.yaml MODEL.WEIGHTS mask2former.pth

With --config-file, the weights are compared with that config's network; those that it lacks, or that have another shape
there, are left out and listed. Without it, the weights are only renamed. The class head fits only the classes that
Mask2Former was trained on. It is kept if the config sets MODEL.DECODER.CLASSIFIER to linear or, without a config, with
--keep-classifier.
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
# Weights that every Mask2Former has -> the module that they belong to, for error messages.
LANDMARKS = {
    "decoder.transformer_cross_attention_layers.0.multihead_attn.in_proj_weight": "masked-attention decoder",
    "pixel_decoder.transformer.encoder.layers.0.self_attn.sampling_offsets.weight": "deformable-attention "
    "pixel decoder",
}


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """Read the weights of a .pkl or .pth checkpoint under their original names.

    Raises:
        UserError: the file does not exist or is not a checkpoint.
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
    """HierVL's name of a Mask2Former weight; None if HierVL has no such weight."""
    if name.startswith("sem_seg_head.") and not name.startswith(
        ("sem_seg_head.predictor.", "sem_seg_head.pixel_decoder.")
    ):
        # Early checkpoints: the pixel decoder was not yet a submodule of the head.
        name = name.replace("sem_seg_head.", "sem_seg_head.pixel_decoder.", 1)
    for old, new in PREFIXES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            # Early checkpoints used different names for the queries and level embeddings.
            name = name.replace("decoder.static_query.", "decoder.query_feat.")
            return "decoder.level_embed.weight" if name == "decoder.level_embed" else name
    return None


def convert(weights: dict, path: str) -> tuple[dict, list[str]]:
    """Rename Mask2Former's weights.

    Args:
        weights: Mask2Former's name -> weight. path: their file, for error messages.

    Returns:
        the weights under HierVL's names, and the Mask2Former names that HierVL has no counterpart for.

    Raises:
        UserError: these are not the weights of a Mask2Former.
    """
    if any(name.startswith(("decoder.", "pixel_decoder.")) for name in weights):
        raise UserError(f"{path}: already uses HierVL's names; use it as MODEL.WEIGHTS directly.")
    new_names = {name: new_name(name) for name in weights}
    converted = {new: weights[old] for old, new in new_names.items() if new}
    for landmark, module in LANDMARKS.items():
        if landmark not in converted:
            raise UserError(
                f"{path}: not a Mask2Former checkpoint, because it has no {module} (its first weight is "
                f"{next(iter(weights))}); give a checkpoint of Mask2Former's model zoo."
            )
    return converted, [old for old, new in new_names.items() if not new]


def fit(converted: dict, network: torch.nn.Module, keep_classifier: bool) -> tuple[dict, dict, list[str]]:
    """Separate the weights that fit the network from those that do not fit.

    Returns:
        the matching weights, {reason: names left out}, and the names of the network's weights that the file lacks.
    """
    state, left_out, matching = network.state_dict(), collections.defaultdict(list), {}
    for name, value in converted.items():
        if name.startswith(CLASS_HEAD) and not keep_classifier:
            left_out["class head"].append(name)
        elif name not in state:
            left_out["not in this config's network"].append(name)
        elif state[name].shape != value.shape:
            left_out["different shape in this config's network"].append(
                f"{name} {tuple(value.shape)} instead of {tuple(state[name].shape)}"
            )
        else:
            matching[name] = value
    return matching, left_out, [name for name in state if name not in matching]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="Mask2Former checkpoint, .pkl or .pth")
    parser.add_argument("output", help="file to write, for MODEL.WEIGHTS")
    parser.add_argument("--config-file", default="", help="HierVL config that will use the weights")
    parser.add_argument("--keep-classifier", action="store_true", help="keep the class head (without --config-file)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def run(args):
    folder = OutputFolder(os.path.dirname(args.output) or ".", "OUTPUT, the second argument")
    folder.check([args.output], [args.input, args.config_file])
    converted, without_counterpart = convert(read_weights(args.input), args.input)
    left_out, missing = {"no counterpart in HierVL": without_counterpart}, []
    if args.config_file:
        converted, mismatched, missing = fit(converted, *build_network(args))
        left_out.update(mismatched)
        if not any(landmark in converted for landmark in LANDMARKS):
            raise UserError(
                f"{args.input}: neither the pixel decoder nor the decoder fits the network of {args.config_file}; use "
                "a config with Mask2Former's sizes (CONV_DIM and HIDDEN_DIM 256)."
            )
    elif not args.keep_classifier:
        left_out["class head"] = [name for name in converted if name.startswith(CLASS_HEAD)]
        converted = {name: value for name, value in converted.items() if not name.startswith(CLASS_HEAD)}
    folder.add([args.output])
    with atomic_write(args.output) as file:
        torch.save({"model": converted}, file)
    report(args.output, converted, left_out, missing)


def build_network(args):
    """The config's network on the CPU, and whether it has Mask2Former's kind of class head."""
    from detectron2.modeling import build_model

    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    return build_model(cfg), cfg.MODEL.DECODER.CLASSIFIER == "linear"


def report(path: str, converted: dict, left_out: dict[str, list[str]], missing: list[str]) -> None:
    """Print what was written, what was left out and why, and which weights the network still has to initialize."""
    counts = ", ".join(
        f"{part} {sum(name.startswith(part + '.') for name in converted)}"
        for part in ("backbone", "pixel_decoder", "decoder")
    )
    print(f"{path}: {len(converted)} weights ({counts})")
    for reason, names in left_out.items():
        if names:
            print(f"left out, {reason}: {len(names)} ({_abbreviate(names)})")
    if missing:
        print(f"not in the file, so initialized from scratch: {len(missing)} ({_abbreviate(missing)})")


def _abbreviate(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
