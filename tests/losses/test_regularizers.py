"""Every regularizer moves the parameters that it is meant for, and says what it should in simple cases."""

import pytest
import torch

from hiervl.losses.regularizers import REGULARIZERS
from tests.networks import flatten_losses, make_network, pseudo_input, training_input

# Of each regularizer, the beginning of names of parameters that must get a gradient.
MEANT_FOR = {
    "language": "text.adapter.gamma",
    "vision_language": "alignment.scales.2.pixel",
    "vision": "backbone.",
    "relevance": "query_generator.project",
    "diversity": "query_generator.projections.0",
    "contrastive": "query_generator.project",
    "consistency": "alignment.scales.0.query",
}


@pytest.mark.parametrize("name", sorted(MEANT_FOR))
def test_each_has_a_gradient_on_what_it_is_meant_for_and_is_logged(name):
    network = make_network(kind="hiervl", weights={name: 1.0}).train()
    with torch.no_grad():  # anything but the initial state, in which two of them are at their minimum
        network.text.adapter.gamma.fill_(0.3)
        for parameter in network.backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    losses = flatten_losses(network([training_input(), pseudo_input(teacher=True)]))
    own = {key: value for key, value in losses.items() if key.endswith(f"_{name}")}
    assert own and all(value > 0 for value in own.values())
    sum(own.values()).backward()
    meant = [p.grad for key, p in network.named_parameters() if key.startswith(MEANT_FOR[name])]
    assert any(grad is not None and (grad != 0).any() for grad in meant)


def test_a_weight_of_zero_switches_off():
    network = make_network(kind="hiervl", weights={}).train()
    losses = flatten_losses(network([training_input(), pseudo_input(teacher=True)]))
    assert not [key for key in losses for name in REGULARIZERS if key.endswith(f"_{name}")]


def test_every_regularizer_is_tested_here_or_with_clip():
    assert set(REGULARIZERS) == set(MEANT_FOR) | {"guidance"}


def test_parts_of_a_batch_add_up():
    """Regularizers of micro-batches with shared denominators sum to about those of the whole."""
    network = make_network(kind="hiervl", weights={"relevance": 1.0, "language": 1.0}).train()
    network.text.adapter.gamma.data.fill_(0.3)
    network.backbone.eval()
    inputs = [training_input() for _ in range(4)]
    normalizers = network.normalizers(network.prepare_batch(inputs))
    with torch.no_grad():
        whole = network(inputs, normalizers)
        parts = [network(inputs[:2], normalizers), network(inputs[2:], normalizers)]
    for key in ("loss_relevance", "loss_language"):
        torch.testing.assert_close(parts[0]["labeled"][key] + parts[1]["labeled"][key], whole["labeled"][key])
