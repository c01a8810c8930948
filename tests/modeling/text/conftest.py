"""A tiny CLIP model with random weights, in a folder that open_clip can read."""

import json

import open_clip
import pytest
import torch

WIDTH, EMBED = 32, 24


@pytest.fixture(scope="session")
def tower_folder(tmp_path_factory):
    """Folder with open_clip_config.json and weights."""
    folder = tmp_path_factory.mktemp("tower")
    model = {
        "embed_dim": EMBED,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    torch.manual_seed(0)
    network = open_clip.model.CLIP(**model)
    # With random weights all texts have similar embeddings; larger token embeddings make them differ.
    torch.nn.init.normal_(network.token_embedding.weight, std=0.5)
    torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture
def tower_model(tower_folder):
    """The value of MODEL.TEXT.MODEL for this tower."""
    return f"local-dir:{tower_folder}"
