"""HSQG: the relevance of a name, and which classes are selected."""

import torch
import torch.nn.functional as F

from hiervl.modeling.query_generator import QueryGenerator

B, C, DT, D = 2, 8, 16, 12


def make_generator(top_k=48, min_relevance=0.5):
    torch.manual_seed(0)
    return QueryGenerator(feature_dim=C, text_dim=DT, hidden_dim=D, top_k=top_k, min_relevance=min_relevance)


def random_texts(count=6):
    """(count, DT) of unit length."""
    return F.normalize(torch.randn(count, DT), dim=1)


def test_relevance_follows_its_formula():
    generator, res5, text = make_generator(), torch.randn(B, C, 3, 5), random_texts()
    selected = generator(res5, text)
    pixels = F.normalize(generator.project(res5), dim=1).flatten(2)
    for b in range(B):
        for k in range(len(text)):
            cosines = torch.stack([text[k] @ pixels[b, :, x] for x in range(15)])
            expected = generator.log_slope.exp() * torch.logsumexp(cosines / 0.05, 0) + generator.bias
            torch.testing.assert_close(selected.logits[b, k], expected)
    torch.testing.assert_close(selected.relevance, selected.logits.sigmoid())


def test_a_single_matching_cell_makes_a_class_relevant():
    generator, text = make_generator(), torch.eye(DT)[:2]
    with torch.no_grad():
        generator.project.weight.copy_(torch.eye(DT)[:, :C, None, None])
        generator.project.bias.zero_()
    res5 = torch.zeros(1, C, 8, 8)
    res5[:, 1] = 1  # class 1 everywhere ...
    res5[:, 1, 7, 7], res5[:, 0, 7, 7] = 0, 1  # ... except for class 0 in one corner
    logits = generator(res5, text).logits[0]
    assert logits[0] > -2 + 0.5 * 19  # with a cell at cosine 1, logsumexp is at least 1 / 0.05 = 20


def test_relevance_does_not_depend_on_the_other_names():
    generator, res5, text = make_generator(), torch.randn(B, C, 3, 5), random_texts(9)
    short, long = generator(res5, text[:4]), generator(res5, text)
    torch.testing.assert_close(short.logits, long.logits[:, :4])


def test_padding_is_ignored():
    generator, text, res5 = make_generator(), random_texts(), torch.randn(B, C, 4, 4)
    valid_mask = torch.ones(B, 32, 32, dtype=torch.bool)
    valid_mask[0, :, 9:] = False  # leaves two of the four columns of cells
    logits = generator(res5, text, valid_mask=valid_mask).logits
    torch.testing.assert_close(logits[0], generator(res5[..., :2], text).logits[0])
    torch.testing.assert_close(logits[1:], generator(res5, text).logits[1:])


def test_required_classes_are_selected_first_and_then_the_most_relevant():
    generator, text = make_generator(top_k=3), random_texts(7)
    required = torch.zeros(B, 7, dtype=torch.bool)
    required[0, 5] = required[1, 2] = required[1, 6] = True
    selected = generator(torch.randn(B, C, 3, 5), text, required=required)
    assert selected.index.shape == (B, 3)
    assert selected.text.shape == (B, 3, DT) and selected.queries.shape == (B, 3, 3, D)
    for b in range(B):
        required_index = required[b].nonzero()[:, 0].tolist()
        other_logits = selected.logits[b].masked_fill(required[b], -torch.inf)
        most_relevant = other_logits.topk(3 - len(required_index)).indices.tolist()
        assert set(selected.index[b].tolist()) == {*required_index, *most_relevant}
        torch.testing.assert_close(selected.text[b], text[selected.index[b]])


def test_untrained_names_and_the_most_relevant_class_are_never_suppressed():
    generator, text = make_generator(min_relevance=1.0), random_texts(4)
    trained = torch.tensor([True, True, False, True])
    selected = generator(torch.randn(1, C, 3, 5), text, trained=trained)
    best = int(selected.logits.argmax())
    assert set(selected.index[0].tolist()) == {2, best}
    assert (selected.relevance > 0).all() and torch.isfinite(selected.log_relevance).all()
    assert selected.relevance[0, selected.index[0] == 2] == 1  # relevance only ranks an untrained name
    alone = generator(torch.randn(1, C, 3, 5), text[:1], trained=trained[:1])
    assert alone.index.tolist() == [[0]]


def test_images_of_a_batch_may_have_different_numbers_of_suppressed_classes():
    generator, text, res5 = make_generator(min_relevance=0.5), random_texts(12), 3 * torch.randn(4, C, 3, 5)
    together = generator(res5, text, trained=torch.ones(12, dtype=torch.bool))
    assert together.index.shape == together.relevance.shape
    widths = set()
    for b in range(4):
        alone = generator(res5[b : b + 1], text, trained=torch.ones(12, dtype=torch.bool))
        remaining = together.index[b][together.relevance[b] > 0]
        assert sorted(remaining.tolist()) == sorted(alone.index[0].tolist())
        widths.add(alone.index.shape[1])
    assert together.index.shape[1] == max(widths)


def test_queries_are_made_for_the_selected_classes_only():
    selected = make_generator(top_k=48)(torch.randn(1, C, 3, 5), random_texts(1000))
    assert selected.index.shape == (1, 48) and selected.queries.shape == (1, 3, 48, D)
    assert selected.logits.shape == (1, 1000)


def test_a_suppressed_class_has_a_finite_bias_that_leaves_it_almost_no_weight():
    generator = make_generator(min_relevance=1.0)
    selected = generator(torch.randn(4, C, 3, 5), random_texts(12), trained=torch.ones(12, dtype=torch.bool))
    selected.relevance[0, 0] = 0
    assert torch.isfinite(selected.log_relevance).all() and selected.log_relevance[0, 0] < -9
