"""Filters only lower weights, keep their state by class name, and do what their names say."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from hiervl.config import load_config
from hiervl.errors import UserError
from hiervl.semi.filters import FILTERS, ClassState, FilterChain, PseudoLabels, class_quantiles

OPTIONS = {
    "confidence": {"threshold": 0.5},
    "region": {"min_area": 6},
    "boundary": {"margin": 1},
    "adaptive": {"quantile": 0.3, "floor": 0.4, "ceiling": 0.9, "momentum": 0.9},
    "image_average": {"threshold": 0.5},
    "text_agreement": {"margin": 0.1},
    "relevance": {"threshold": 0.5},
}
NAMES = ["road", "car", "tree"]


def make_pseudo(batch=2, size=16):
    scores = (torch.randn(batch, len(NAMES), size, size) * 2).softmax(1)
    valid = torch.ones(batch, size, size, dtype=torch.bool)
    valid[:, :, 12:] = False
    return PseudoLabels.from_probabilities(
        scores,
        valid,
        NAMES,
        relevance=torch.tensor([[0.9, 0.2, 0.8]]).expand(batch, -1),
        pixel_text=torch.rand(batch, len(NAMES), size // 4, size // 4),
    )


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_every_filter_only_lowers_weights(name):
    pseudo = make_pseudo()
    weight = torch.rand(pseudo.labels.shape)
    factor = FILTERS[name](pseudo, weight, ClassState(), **OPTIONS[name])
    assert factor.shape == weight.shape
    assert (factor >= 0).all() and (factor <= 1).all()
    assert (factor < 1).any()


def test_a_chain_never_raises_a_weight_and_padding_stays_out():
    pseudo = make_pseudo()
    before = None
    for length in range(1, len(OPTIONS) + 1):
        weight, kept = FilterChain(list(OPTIONS.items())[:length])(pseudo)
        assert (weight[~pseudo.valid] == 0).all()
        assert before is None or (weight <= before).all()
        before = weight
    shares = list(kept.values())
    assert shares == sorted(shares, reverse=True)


def test_adaptive_thresholds_are_quantiles_per_class_within_bounds():
    labels = torch.zeros(1, 10, 10, dtype=torch.long)
    labels[:, 5:] = 1
    confidence = torch.linspace(0.5, 1, 100).view(1, 10, 10)
    scores = torch.zeros(1, 3, 10, 10).scatter_(1, labels[:, None], confidence[:, None])
    pseudo = PseudoLabels.from_probabilities(scores, torch.ones_like(labels, dtype=torch.bool), NAMES)
    state = ClassState()
    kept = FILTERS["adaptive"](pseudo, torch.ones(1, 10, 10), state, quantile=0.5, floor=0.1, ceiling=0.8, momentum=0.9)
    saved = state.state_dict()
    assert saved["road"] == pytest.approx(confidence[labels == 0].quantile(0.5).item())
    assert "tree" not in saved  # never predicted: no threshold of its own
    assert (kept[labels == 0] == (confidence[labels == 0] >= saved["road"])).all()
    assert (kept[labels == 1] == (confidence[labels == 1] >= 0.8)).all()  # its median lies above the ceiling


def test_region_removes_small_islands():
    labels = torch.zeros(1, 12, 12, dtype=torch.long)
    labels[0, 3, 3:5] = 1
    labels[0, 6:10, 6:10] = 2
    scores = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    pseudo = PseudoLabels.from_probabilities(scores, torch.ones_like(labels, dtype=torch.bool), NAMES)
    kept = FILTERS["region"](pseudo, torch.ones(1, 12, 12), {}, min_area=6)
    assert (kept == (labels != 1)).all()


def test_boundary_removes_a_margin_on_both_sides():
    labels = torch.zeros(1, 6, 10, dtype=torch.long)
    labels[..., 5:] = 2
    scores = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    pseudo = PseudoLabels.from_probabilities(scores, torch.ones_like(labels, dtype=torch.bool), NAMES)
    kept = FILTERS["boundary"](pseudo, torch.ones(1, 6, 10), {}, margin=2)
    assert kept[0, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1]


def test_state_survives_a_checkpoint():
    chain = FilterChain([("adaptive", OPTIONS["adaptive"])])
    chain(make_pseudo())
    again = FilterChain([("adaptive", OPTIONS["adaptive"])])
    again.load_state_dict(chain.state_dict())
    pseudo = make_pseudo()
    assert torch.equal(chain(pseudo)[0], again(pseudo)[0])


def test_unknown_filter_is_a_users_mistake():
    with pytest.raises(UserError, match="confidance.*known are"):
        FilterChain([("confidance", {})])


def test_a_filter_without_its_language_module_is_refused_at_once():
    alone = ["MODEL.DECODER.SEMANTIC", False, "MODEL.CMSAM.ENABLED", False]
    with pytest.raises(UserError, match="SEMI.FILTERS.*'text_agreement' needs MODEL.CMSAM.ENABLED"):
        load_config("", ["SEMI.FILTERS", ("confidence", "text_agreement"), *alone])
    with pytest.raises(UserError, match="SEMI.FILTERS.*'relevance' needs MODEL.HSQG.ENABLED"):
        load_config("", ["SEMI.FILTERS", ("relevance",), "MODEL.HSQG.ENABLED", False, *alone])
    chain = FilterChain.from_config(load_config("", ["SEMI.FILTERS", ("confidence", "relevance"), *alone]))
    assert [step for step, _ in chain.steps] == ["confidence", "relevance"]


def test_text_agreement_reads_the_scores_where_the_pixel_is():
    """Images of 6x6 are padded to 8x8: the last columns of the pixel-text similarity lie outside."""
    scores = torch.zeros(1, 2, 6, 6)
    scores[:, 0] = 1
    pixel_text = torch.zeros(1, 2, 2, 2)
    pixel_text[:, 1, :, 1] = 1  # the right half of the canvas looks like class 1
    pseudo = PseudoLabels.from_probabilities(
        scores, torch.ones(1, 6, 6, dtype=torch.bool), ["a", "b"], pixel_text=pixel_text
    )
    kept = FILTERS["text_agreement"](pseudo, torch.ones(1, 6, 6), {}, margin=0.1)
    assert kept[0, 0].tolist() == [1, 1, 0, 0, 0, 0]


def make_two_class(first, **more):
    """Pseudo-labels of one image (1, H, W) of classes a and b from the probability of a, without padding."""
    probabilities = torch.stack((first, 1 - first), dim=1)
    return PseudoLabels.from_probabilities(probabilities, torch.ones_like(first, dtype=torch.bool), ["a", "b"], **more)


def test_a_pixel_at_the_threshold_is_kept():
    pseudo = make_two_class(torch.tensor([[[0.75, 0.7, 0.25]]]))
    assert FILTERS["confidence"](pseudo, torch.ones(1, 1, 3), {}, threshold=0.75).tolist() == [[[1, 0, 1]]]


def test_an_adaptive_threshold_is_a_running_mean_over_the_pixels_kept_so_far():
    pseudo, state = make_two_class(torch.tensor([[[0.9, 0.9, 0.6]]])), ClassState()
    state.load_state_dict({"a": 0.5})
    weight = torch.tensor([[[1.0, 1.0, 0.0]]])
    FILTERS["adaptive"](pseudo, weight, state, quantile=0.0, floor=0.1, ceiling=1.0, momentum=0.75)
    assert state.state_dict() == {"a": pytest.approx(0.75 * 0.5 + 0.25 * 0.9)}


@pytest.mark.parametrize("similarity, margin, kept", [(0.3, 0.0, 1), (0.25, 0.0, 0), (0.25, 0.1, 1), (0.1, 0.1, 0)])
def test_text_agreement_allows_a_margin(similarity, margin, kept):
    pixel_text = torch.tensor([similarity, 0.3]).view(1, 2, 1, 1)
    pseudo = make_two_class(torch.full((1, 4, 4), 0.9), pixel_text=pixel_text)
    assert (FILTERS["text_agreement"](pseudo, torch.ones(1, 4, 4), {}, margin=margin) == kept).all()


def test_regions_of_every_image_by_brute_force():
    pseudo, weight = make_pseudo(batch=4), (torch.rand(4, 16, 16) < 0.7).float()
    kept = FILTERS["region"](pseudo, weight, {}, min_area=5)
    expected = torch.zeros(4, 16, 16)
    for b, k in np.ndindex(4, len(NAMES)):
        regions, count = scipy.ndimage.label((pseudo.labels[b] == k) & (weight[b] > 0), np.ones((3, 3)))
        for region in range(1, count + 1):
            expected[b][torch.from_numpy(regions == region)] = float((regions == region).sum() >= 5)
    assert torch.equal(kept, expected) and 0 < kept.mean() < weight.mean()


def test_labels_of_irrelevant_classes_are_dropped():
    pseudo = make_two_class(torch.tensor([[[0.9, 0.1]]]), relevance=torch.tensor([[0.2, 0.5]]))
    assert FILTERS["relevance"](pseudo, torch.ones(1, 1, 2), {}, threshold=0.5).tolist() == [[[0, 1]]]


def test_regions_are_those_of_the_pixels_kept_so_far():
    pseudo, weight = make_two_class(torch.full((1, 3, 7), 0.9)), torch.ones(1, 3, 7)
    weight[..., 2] = 0  # splits the image into regions of 6 and 12 pixels
    kept = FILTERS["region"](pseudo, weight, {}, min_area=7)
    assert kept[0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_the_image_average_is_over_the_pixels_that_are_not_padding():
    pseudo = make_two_class(torch.tensor([[[0.75, 0.6, 0.9, 0.6, 0.9, 0.9]]]))
    pseudo.valid[..., 4:] = False
    assert FILTERS["image_average"](pseudo, torch.ones(1, 1, 6), {}, threshold=0.75).unique().tolist() == [0.5]


def test_class_quantiles_are_those_of_torch():
    torch.manual_seed(0)
    values, labels, mask = torch.rand(3, 20, 20), torch.randint(0, 5, (3, 20, 20)), torch.rand(3, 20, 20) > 0.3
    labels[labels == 3] = 1  # class 3 has no value, class 4 a single one
    labels[labels == 4] = 2
    labels[0, 0, 0], mask[0, 0, 0] = 4, True
    values[1, :4] = 1.0  # ties
    for quantile in (0.0, 0.2, 0.5, 1.0):
        result, counts = class_quantiles(values, labels, mask, 5, quantile)
        for k in range(5):
            of_class = values[mask & (labels == k)]
            assert counts[k] == len(of_class)
            expected = of_class.quantile(quantile) if len(of_class) else torch.tensor(0.0)
            torch.testing.assert_close(result[k], expected, atol=1e-6, rtol=0)


def test_pseudo_labels_of_selected_classes_are_those_of_all_classes():
    """Three of five classes are selected, in another order in every image; the others have probability 0."""
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(5)[:3] for _ in range(4)])
    probabilities, valid = torch.rand(4, 3, 8, 8), torch.rand(4, 8, 8) > 0.2
    dense = torch.zeros(4, 5, 8, 8).scatter(1, index[..., None, None].expand_as(probabilities), probabilities)
    names = list("abcde")
    whole = PseudoLabels.from_probabilities(dense, valid, names)
    parts = [
        PseudoLabels.from_probabilities(probabilities[i : i + 2], valid[i : i + 2], names, index[i : i + 2])
        for i in (0, 2)
    ]
    pseudo = PseudoLabels.concatenate(parts)
    assert pseudo.labels.equal(whole.labels) and pseudo.confidence.equal(whole.confidence)
    assert pseudo.highest.equal(whole.highest.gather(1, index)) and pseudo.class_names == names
    for b in range(4):
        assert index[b][pseudo.position(b)].equal(pseudo.labels[b])
