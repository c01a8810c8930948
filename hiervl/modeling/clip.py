"""CLIP models of open_clip, for text towers and image towers: found by name, with weights, or one line on what to do.

A model is named as open_clip names it ("ViT-B-16"), or as a folder with open_clip_config.json and weights
("local-dir:FOLDER"). Weights are a tag of open_clip ("openai"), which is downloaded, or a file.
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

_SCHEMES = ("local-dir:", "hf-hub:")  # these name the weights along with the model


def load_clip(model: str, pretrained: str, key: str) -> nn.Module:
    """The open_clip model with its weights: float32, on the CPU, eval mode, nothing to be trained.

    Args:
        model: name or "local-dir:FOLDER". pretrained: tag or file.
        key: the config section that chose them ("MODEL.TEXT"), to be named in errors.
    Raises:
        UserError: an unknown name, weights that cannot be had or do not fit.
    """
    check_clip(model, pretrained, key)
    tag = _tag(model, pretrained)
    # OpenAI's weights were trained with QuickGELU; open_clip only warns when the model's name says otherwise.
    options = {"force_quick_gelu": True} if tag and tag.get("quick_gelu") else {}
    named = model.startswith(_SCHEMES)
    try:
        network = open_clip.create_model(
            model, pretrained=None if named else pretrained, require_pretrained=True, **options
        )
    except Exception as error:  # open_clip wraps what its readers raise in whatever was at hand
        reason = " ".join(str(error).split())[:200]
        if tag or model.startswith("hf-hub:"):
            name = f"{model}-quickgelu" if options and not model.endswith("-quickgelu") else model
            instead = ", or make an embeddings file (MODEL.TEXT.EMBEDDINGS)" if key == "MODEL.TEXT" else ""
            raise UserError(
                f"{key}: the weights {model} {pretrained} could not be downloaded; fetch them elsewhere "
                f"and name the file in {key}.PRETRAINED (with MODEL {name}){instead}. {reason}"
            ) from error
        raise UserError(
            f"{model if named else pretrained}: does not hold the weights of {key}.MODEL {model} ({reason})."
        ) from error
    return network.eval().requires_grad_(False)


def check_clip(model: str, pretrained: str, key: str) -> None:
    """Raise UserError for a model or weights that cannot exist, before anything is loaded."""
    if model.startswith("local-dir:") and not Path(model.removeprefix("local-dir:"), "open_clip_config.json").is_file():
        raise UserError(f"{key}.MODEL: {model.removeprefix('local-dir:')} has no open_clip_config.json.")
    if model.startswith(_SCHEMES):
        return
    if open_clip.get_model_config(model.replace("/", "-")) is None:
        near = difflib.get_close_matches(model, open_clip.list_models(), n=4, cutoff=0.4)
        raise UserError(f"{key}.MODEL: open_clip has no model {model!r}; similar: {', '.join(near) or 'none'}.")
    if _tag(model, pretrained) is None and not os.path.isfile(pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise UserError(
            f"{key}.PRETRAINED: {pretrained!r} is neither a file nor weights that open_clip knows for {model} ({tags})."
        )
    if os.path.isfile(pretrained) and _is_torchscript(pretrained):
        raise UserError(
            f"{pretrained}: is a TorchScript archive ({key}.PRETRAINED); use the same weights as a state "
            "dict or .safetensors file."
        )


def clip_fingerprint(model: str, pretrained: str, key: str) -> str:
    """What decides a model's numbers, architecture and weights, as a string; no weights are loaded.

    A tag counts as its entry in open_clip's table, a file by its content.
    """
    check_clip(model, pretrained, key)
    if model.startswith("hf-hub:"):
        return model
    if model.startswith("local-dir:"):
        files = [p for p in sorted(Path(model.removeprefix("local-dir:")).iterdir()) if p.is_file()]
        return json.dumps([_sha256(p) for p in files])
    weights = _tag(model, pretrained) or _sha256(pretrained)
    return json.dumps([open_clip.get_model_config(model.replace("/", "-")), weights], sort_keys=True, default=str)


def _tag(model, pretrained):
    """open_clip's entry for downloadable weights, None when `pretrained` is no tag of this model."""
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
