"""What decays and what does not."""

import torch

from hiervl.config import load_config
from hiervl.semi.solver import build_optimizer

from tests.networks import make_network


def decays(network, *overrides):
    """{name of a parameter: its weight decay}, and that every parameter is optimized once."""
    optimizer = build_optimizer(load_config("", ["SOLVER.WEIGHT_DECAY", 0.05, *overrides]), network)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    names = dict(network.named_parameters())
    assert set(names.values()) == set(decay)
    return {name: decay[p] for name, p in names.items()}


def test_weight_decay_spares_embeddings_and_vectors_but_no_linear_layer():
    network = make_network(kind="hiervl")
    network.backbone.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 8))
    network.backbone.reg_token = torch.nn.Parameter(torch.zeros(1, 4, 8))
    network.backbone.pos_embed = torch.nn.Parameter(torch.zeros(1, 4, 8))
    found = decays(network)
    spared = {
        "decoder.query_feat.weight",
        "decoder.query_embed.weight",
        "decoder.level_embed.weight",
        "decoder.set_embed.weight",
        "query_generator.level_embed.weight",
        "backbone.cls_token",
        "backbone.reg_token",
        "backbone.pos_embed",
        "pixel_decoder.transformer.level_embed",
    }
    assert spared <= found.keys()
    for name, parameter in network.named_parameters():
        assert found[name] == (0 if parameter.ndim < 2 or name in spared else 0.05), name
    assert found["decoder.presence_embed.weight"] == found["decoder.mask_embed.layers.0.weight"] == 0.05


def test_the_linear_classifier_decays():
    assert decays(make_network(kind="linear"))["decoder.class_embed.weight"] == 0.05


def test_norms_have_a_weight_decay_of_their_own():
    found = decays(make_network(kind="linear"), "SOLVER.WEIGHT_DECAY_NORM", 0.02)
    assert found["decoder.decoder_norm.weight"] == 0.02 and found["decoder.mask_embed.layers.0.bias"] == 0
