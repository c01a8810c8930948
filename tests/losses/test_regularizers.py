"""Every regularizer moves the parameters that it is meant for, and says what it should in simple cases."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hiervl.losses.points import SharedPoints, sample_maps
from hiervl.losses.regularizers import LABELED, PSEUDO, REGULARIZERS, TeacherView
from hiervl.losses.targets import build_targets
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


@pytest.mark.parametrize("kind, extra", [(LABELED, 3.0), (PSEUDO, 0.0)])
def test_pixels_near_a_labeled_boundary_weigh_more_in_the_vision_language_loss(kind, extra):
    sem_seg = torch.zeros(2, 16, 16, dtype=torch.long)
    sem_seg[:, :, 8:] = 1
    targets = build_targets(sem_seg, torch.ones(2, 16, 16), 2, image_weight=torch.tensor([0.5, 1.0]))
    points, similarity = SharedPoints.draw(targets, 200), torch.randn(2, 2, 4, 4)
    context = SimpleNamespace(
        kind=kind,
        aligned=SimpleNamespace(similarity=similarity),
        points=points,
        similarity_temperature=torch.tensor(0.2),
        targets=targets,
        selected_targets=targets,
    )
    loss = REGULARIZERS["vision_language"][0](context, SimpleNamespace(boundary_weight=3.0, boundary_width=2))
    logits = sample_maps(similarity, points.point_coords) / 0.2  # (B, P, K)
    column = points.index % 16
    per_point = F.cross_entropy(logits.flatten(0, 1), points.label.flatten(), reduction="none").view(2, -1)
    per_image = (per_point * (1 + extra * ((column >= 6) & (column <= 9)))).mean(1)
    torch.testing.assert_close(loss, (0.5 * per_image[0] + per_image[1]) / 2)


def test_consistency_compares_relevance_only_where_no_other_image_was_pasted():
    """The similarities agree wherever they are compared: not for distractor 3, nor for class 1, which the teacher did
    not select, nor on padding."""
    expected = torch.rand(2, 2, 4, 4)  # of classes 0 and 2
    index = torch.tensor([[2, 3, 1, 0]] * 2)
    similarity = torch.stack((expected[:, 1], torch.full((2, 4, 4), 9.0), torch.zeros(2, 4, 4), expected[:, 0]), dim=1)
    similarity[..., 3] += 5
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    valid[..., 12:] = False
    relevance = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.2, 0.9]])
    context = SimpleNamespace(
        images=torch.zeros(2, 3, 16, 16),
        num_classes=3,
        selected=SimpleNamespace(index=index, names=torch.zeros(4, 8), logits=torch.zeros(2, 4)),
        aligned=SimpleNamespace(similarity=similarity),
        teacher=[TeacherView(expected[b], torch.tensor([0, 2]), valid[b], relevance[b], mixed=False) for b in range(2)],
    )
    consistency = REGULARIZERS["consistency"][0]
    torch.testing.assert_close(consistency(context, None), torch.tensor((0.3**2 + 0.4**2) / 3 / 2))
    context.teacher[1].mixed = True
    assert consistency(context, None) == 0
    similarity[0, 0, 0, 0] += 1  # one of the 2 x 12 values compared in image 0
    torch.testing.assert_close(consistency(context, None), torch.tensor(1 / 24 / 2))


def test_diversity_ignores_names_that_point_apart():
    """Of E=3 scales, one pair has cosine 0.6, the others are at most 0; both orders of a pair count."""
    queries = torch.tensor([[[2.0, 0.0]], [[0.6, 0.8]], [[-5.0, 0.0]]])  # (E, K=1, d)
    loss = REGULARIZERS["diversity"][0](SimpleNamespace(name_queries=queries), None)
    torch.testing.assert_close(loss, torch.tensor(2 * 0.6 / 6))


def test_after_cutmix_a_class_is_known_wherever_one_of_the_two_images_knows_it():
    """Class 4 was selected in both images, class 1 outside of the box only, class 3 inside only."""
    outside, inside = torch.rand(2, 1, 4), torch.rand(2, 1, 4)
    outside[..., 2:], inside[..., :2] = -1, -1
    view = TeacherView(torch.cat((outside, inside)), torch.tensor([4, 1, 3, 4]), None, None, mixed=True)
    similarity = view.similarity_of(torch.tensor([1, 4, 0, 3]), num_names=6)
    assert similarity[0].equal(outside[1]) and similarity[3].equal(inside[0])
    assert similarity[1, 0].equal(torch.cat((outside[0, 0, :2], inside[1, 0, 2:])))
    assert (similarity[2] == -1).all()
