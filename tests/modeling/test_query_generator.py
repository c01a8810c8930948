"""HSQG: relevance is one function for every name, and what is kept is what has to be."""

import pytest
import torch
import torch.nn.functional as F

from hiervl.errors import UserError
from hiervl.modeling.query_generator import QueryGenerator

B, C, DT, D = 2, 8, 16, 12


def make(top_k=48, min_relevance=0.5):
    torch.manual_seed(0)
    return QueryGenerator(feature_dim=C, text_dim=DT, hidden_dim=D, top_k=top_k, min_relevance=min_relevance)


def names(count=6):
    return F.normalize(torch.randn(count, DT), dim=1)


def test_relevance_is_its_formula():
    generator, res5, text = make(), torch.randn(B, C, 3, 5), names()
    kept = generator(res5, text)
    pixels = F.normalize(generator.project(res5), dim=1).flatten(2)
    for b in range(B):
        for k in range(len(text)):
            cosines = torch.stack([text[k] @ pixels[b, :, x] for x in range(15)])
            expected = generator.log_slope.exp() * torch.logsumexp(cosines / 0.05, 0) + generator.bias
            torch.testing.assert_close(kept.logits[b, k], expected)
    torch.testing.assert_close(kept.relevance, kept.logits.sigmoid())


def test_one_cell_that_shows_the_class_is_enough():
    generator, text = make(), torch.eye(DT)[:2]
    with torch.no_grad():
        generator.project.weight.copy_(torch.eye(DT)[:, :C, None, None])
        generator.project.bias.zero_()
    res5 = torch.zeros(1, C, 8, 8)
    res5[:, 1] = 1  # class 1 everywhere, but
    res5[:, 1, 7, 7], res5[:, 0, 7, 7] = 0, 1  # class 0 in one corner
    logits = generator(res5, text).logits[0]
    assert logits[0] > -2 + 0.5 * 19  # a whole cell at cosine 1: logsumexp is at least 1 / 0.05


def test_a_name_is_scored_alike_in_any_list():
    generator, res5, text = make(), torch.randn(B, C, 3, 5), names(9)
    few, many = generator(res5, text[:4]), generator(res5, text)
    torch.testing.assert_close(few.logits, many.logits[:, :4])


def test_padding_takes_no_part():
    generator, text, res5 = make(), names(), torch.randn(B, C, 4, 4)
    inside = torch.ones(B, 32, 32, dtype=torch.bool)
    inside[0, :, 9:] = False  # touches two of the four columns of cells
    logits = generator(res5, text, valid_mask=inside).logits
    torch.testing.assert_close(logits[0], generator(res5[..., :2], text).logits[0])
    torch.testing.assert_close(logits[1:], generator(res5, text).logits[1:])


def test_classes_of_the_target_stay_and_the_rest_are_the_hardest():
    generator, text = make(top_k=3), names(7)
    must = torch.zeros(B, 7, dtype=torch.bool)
    must[0, 5] = must[1, 2] = must[1, 6] = True
    kept = generator(torch.randn(B, C, 3, 5), text, required=must)
    assert kept.index.shape == (B, 3) and kept.text.shape == (B, 3, DT) and kept.queries.shape == (B, 3, 3, D)
    for b in range(B):
        chosen = set(kept.index[b].tolist())
        wanted = set(must[b].nonzero()[:, 0].tolist())
        rest = kept.logits[b].masked_fill(must[b], -torch.inf).topk(3 - len(wanted)).indices.tolist()
        assert chosen == wanted | set(rest)
        torch.testing.assert_close(kept.text[b], text[kept.index[b]])


def test_more_classes_than_are_kept_is_an_error():
    with pytest.raises(UserError, match="MODEL.HSQG.TOP_K is 2, but a training image shows 3"):
        make(top_k=2)(torch.randn(B, C, 3, 5), names(), required=torch.tensor([[1, 1, 1, 0, 0, 0]] * B).bool())


def test_the_cut_spares_unseen_names_and_the_best_one():
    generator, text = make(min_relevance=1.0), names(4)
    seen = torch.tensor([True, True, False, True])
    kept = generator(torch.randn(1, C, 3, 5), text, trained=seen)
    best = int(kept.logits.argmax())
    assert set(kept.index[0].tolist()) == {2, best}
    assert (kept.relevance > 0).all() and torch.isfinite(kept.log_relevance).all()
    assert kept.relevance[0, kept.index[0] == 2] == 1  # it is ranked, and no more than that
    alone = generator(torch.randn(1, C, 3, 5), text[:1], trained=seen[:1])
    assert alone.index.tolist() == [[0]]


def test_a_batch_stays_rectangular_when_images_are_cut_differently():
    generator, text, res5 = make(min_relevance=0.5), names(12), 3 * torch.randn(4, C, 3, 5)
    together = generator(res5, text, trained=torch.ones(12, dtype=torch.bool))
    assert together.index.shape == together.relevance.shape
    widths = set()
    for b in range(4):
        alone = generator(res5[b : b + 1], text, trained=torch.ones(12, dtype=torch.bool))
        uncut = together.index[b][together.relevance[b] > 0]
        assert sorted(uncut.tolist()) == sorted(alone.index[0].tolist())
        widths.add(alone.index.shape[1])
    assert together.index.shape[1] == max(widths)


def test_a_thousand_names_cost_queries_for_the_kept_ones_only():
    kept = make(top_k=48)(torch.randn(1, C, 3, 5), names(1000))
    assert kept.index.shape == (1, 48) and kept.queries.shape == (1, 3, 48, D) and kept.logits.shape == (1, 1000)
