"""What decays and what does not, and how fast each part learns."""

import pytest
import torch

from hiervl.config import load_config
from hiervl.semi.solver import build_lr_scheduler, build_optimizer

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


def test_the_pretrained_backbone_learns_more_slowly_but_not_its_feature_pyramid():
    network = make_network(kind="linear")
    network.backbone.pyramid = torch.nn.Linear(2, 2)
    overrides = ["SOLVER.BASE_LR", 0.5, "SOLVER.BACKBONE_MULTIPLIER", 0.1]
    optimizer = build_optimizer(load_config("", overrides), network)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        pretrained = name.startswith("backbone.") and not name.startswith("backbone.pyramid.")
        assert rates[parameter] == pytest.approx(0.05 if pretrained else 0.5), name


def test_the_learning_rate_warms_up_linearly_and_then_decays():
    options = {"WARMUP_ITERS": 10, "WARMUP_FACTOR": 0.2, "MAX_ITER": 100, "POLY_POWER": 0.5}
    cfg = load_config("", [x for name, value in options.items() for x in (f"SOLVER.{name}", value)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=2.0)
    scheduler, rates = build_lr_scheduler(cfg, optimizer), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    end = 0.9**0.5  # where the warm-up meets the decay
    for iteration, factor in ((0, 0.2), (5, (0.2 + end) / 2), (10, end), (75, 0.5), (99, 0.1)):
        assert rates[iteration] == pytest.approx(2 * factor), iteration
