"""Load open_clip's CLIP models, for use as text towers and image towers.

A model is given by open_clip's name for it ("ViT-B-16"), or as a folder with open_clip_config.json and weights
("local-dir:FOLDER"). Weights are given by an open_clip tag ("openai"), which is downloaded, or as a file.
"""

import difflib
import hashlib
import json
import os
import zipfile
from pathlib import Path

import open_clip
from torch import nn

from ..errors import UserError

_SCHEMES = ("local-dir:", "hf-hub:")  # a model with one of these prefixes brings its own weights


def load_clip(model: str, pretrained: str, key: str) -> nn.Module:
    """The open_clip model with its weights: float32, on the CPU, in eval mode, with no trainable parameters.

    Args:
        model: open_clip's name or "local-dir:FOLDER".
        pretrained: open_clip tag or file.
        key: config section that chose the model ("MODEL.TEXT"), for error messages.
    Raises:
        UserError: an unknown name, or weights that are unavailable or do not fit the model.
    """
    check_clip(model, pretrained, key)
    pretrained_config = _pretrained_config(model, pretrained)
    # OpenAI's weights were trained with QuickGELU; for a model name without "quickgelu" open_clip only warns.
    options = {"force_quick_gelu": True} if pretrained_config and pretrained_config.get("quick_gelu") else {}
    brings_weights = model.startswith(_SCHEMES)
    try:
        network = open_clip.create_model(
            model, pretrained=None if brings_weights else pretrained, require_pretrained=True, **options
        )
    except Exception as error:  # open_clip raises many unrelated exception types here
        reason = " ".join(str(error).split())[:200]
        if pretrained_config or model.startswith("hf-hub:"):
            name = f"{model}-quickgelu" if options and not model.endswith("-quickgelu") else model
            alternative = ", or use an embeddings file (MODEL.TEXT.EMBEDDINGS)" if key == "MODEL.TEXT" else ""
            raise UserError(
                f"{key}: the weights {model} {pretrained} could not be downloaded; download them on another machine "
                f"and set {key}.PRETRAINED to the file and {key}.MODEL to {name}{alternative}. {reason}"
            ) from error
        raise UserError(
            f"{model if brings_weights else pretrained}: does not contain the weights of {key}.MODEL {model} "
            f"({reason})."
        ) from error
    return network.eval().requires_grad_(False)


def check_clip(model: str, pretrained: str, key: str) -> None:
    """Check the model name and the weights without loading them. Arguments as in `load_clip`.

    Raises:
        UserError: an unknown model or tag, a folder without open_clip_config.json, or a TorchScript file.
    """
    if model.startswith("local-dir:") and not Path(model.removeprefix("local-dir:"), "open_clip_config.json").is_file():
        raise UserError(f"{key}.MODEL: {model.removeprefix('local-dir:')} has no open_clip_config.json.")
    if model.startswith(_SCHEMES):
        return
    if open_clip.get_model_config(model.replace("/", "-")) is None:
        similar = difflib.get_close_matches(model, open_clip.list_models(), n=4, cutoff=0.4)
        raise UserError(f"{key}.MODEL: open_clip has no model {model!r}; similar: {', '.join(similar) or 'none'}.")
    if _pretrained_config(model, pretrained) is None and not os.path.isfile(pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise UserError(
            f"{key}.PRETRAINED: {pretrained!r} is neither a file nor one of open_clip's tags for {model} ({tags})."
        )
    if os.path.isfile(pretrained) and _is_torchscript(pretrained):
        raise UserError(
            f"{pretrained}: is a TorchScript archive ({key}.PRETRAINED); convert the weights to a state dict or a "
            ".safetensors file."
        )


def clip_fingerprint(model: str, pretrained: str, key: str) -> str:
    """A string that identifies the model's architecture and weights, computed without loading the weights.

    A tag is identified by its entry in open_clip's table, a file by the hash of its content. Arguments as in
    `load_clip`.
    """
    check_clip(model, pretrained, key)
    if model.startswith("hf-hub:"):
        return model
    if model.startswith("local-dir:"):
        files = [p for p in sorted(Path(model.removeprefix("local-dir:")).iterdir()) if p.is_file()]
        return json.dumps([_sha256(p) for p in files])
    weights = _pretrained_config(model, pretrained) or _sha256(pretrained)
    return json.dumps([open_clip.get_model_config(model.replace("/", "-")), weights], sort_keys=True, default=str)


def _pretrained_config(model, pretrained):
    """open_clip's entry for downloadable weights; None if `pretrained` is not a tag of this model."""
    return open_clip.get_pretrained_cfg(model.replace("/", "-"), pretrained) or None


def _is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
