"""The criterion's invariants: what is not valid does not count, what is not known is not taught."""

import itertools

import pytest
import torch

from hiervl.losses.criterion import Criterion
from hiervl.losses.mask_losses import balanced_presence_loss
from hiervl.modeling.dual_query_decoder import QueryPredictions
from hiervl.modeling.inference import ClassScoreHead
from hiervl.losses.matcher import HungarianMatcher, Matches
from hiervl.losses.points import SharedPoints, pixel_centers, sample_maps
from hiervl.losses.semantic_set import match_within_class
from hiervl.losses.targets import build_targets

K, N, E, SIZE, GRID, DIM = 4, 6, 3, 32, 8, 12


def make_criterion(**changes):
    options = {
        "class_weight": 2.0,
        "mask_weight": 5.0,
        "dice_weight": 5.0,
        "pixel_weight": 2.0,
        "presence_weight": 2.0,
        "no_object_weight": 0.1,
        "num_points": 200,
        "oversample_ratio": 3.0,
        "importance_ratio": 0.75,
        "deep_supervision": True,
        **changes,
    }
    return Criterion(matcher=HungarianMatcher(2.0, 5.0, 5.0), **options)


def make_predictions(batch=2, layers=2, classes=K, semantic=False):
    """Predictions of every layer, and mask features (B, Cm, h, w)."""

    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    both = {"presence_logits": (batch, E, classes), "semantic_mask_embed": (batch, E, classes, DIM)} if semantic else {}
    predictions = [
        QueryPredictions(
            leaf(batch, N, classes + 1), leaf(batch, N, DIM), **{name: leaf(*shape) for name, shape in both.items()}
        )
        for _ in range(layers)
    ]
    return predictions, leaf(batch, DIM, GRID, GRID)


def blocks(batch=2):
    """Label maps of four quadrants, classes 0..3."""
    quadrant = torch.arange(4).view(2, 2).repeat_interleave(SIZE // 2, 0).repeat_interleave(SIZE // 2, 1)
    return quadrant.expand(batch, -1, -1).clone()


def losses_of(criterion, predictions, targets, normalizers=None):
    relevance = None
    layers, features = predictions
    points = SharedPoints.draw(targets, criterion.num_candidates)
    scores = ClassScoreHead(semantic=layers[0].semantic_mask_embed is not None)
    if scores.semantic:
        relevance = torch.full(targets.present.shape, 0.8)
    return criterion(
        layers, features, targets, points, scores, normalizers or criterion.normalizers(targets, N), relevance
    )


def total(criterion, predictions, targets):
    return sum(losses_of(criterion, predictions, targets).values())


def gradients(predictions):
    """All gradients of a set of predictions, by name."""
    layers, features = predictions
    named = [(name, value) for layer in layers for name, value in vars(layer).items() if value is not None]
    return [(name, value.grad) for name, value in [*named, ("mask_features", features)]]


semantic = pytest.mark.parametrize("semantic", [False, True])


@semantic
def test_places_without_valid_support_get_exactly_zero_gradient(semantic):
    weight = torch.zeros(2, SIZE, SIZE)
    weight[:, :13, :10] = 1  # not aligned with the grid of mask logits
    predictions = make_predictions(semantic=semantic)
    total(make_criterion(), predictions, build_targets(blocks(), weight, K)).backward()

    # Bilinear support by brute force: the grid cells that any valid pixel center touches.
    touched = torch.zeros(1, 1, GRID, GRID, requires_grad=True)
    every_pixel = pixel_centers(weight[0].flatten().nonzero()[:, 0], SIZE, SIZE)[None]
    sample_maps(touched, every_pixel).sum().backward()
    outside = touched.grad[0, 0] == 0
    assert outside.any() and not outside.all()
    gradient = predictions[1].grad
    assert (gradient[..., outside] == 0).all()
    assert (gradient[..., ~outside] != 0).any()


@semantic
@pytest.mark.parametrize("ignored", ["weight", "label"])
def test_an_image_without_valid_pixel_contributes_nothing(ignored, semantic):
    sem_seg, weight = blocks(), torch.ones(2, SIZE, SIZE)
    if ignored == "weight":
        weight[1] = 0
    else:
        sem_seg[1] = 255
    predictions = make_predictions(semantic=semantic)
    loss = total(make_criterion(), predictions, build_targets(sem_seg, weight, K))
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    for name, gradient in gradients(predictions):
        assert (gradient[1] == 0).all(), name
        assert (gradient[0] != 0).any(), name


@semantic
def test_a_batch_without_any_valid_pixel_gives_zero_loss_in_the_graph(semantic):
    predictions = make_predictions(semantic=semantic)
    loss = total(make_criterion(), predictions, build_targets(blocks(), torch.zeros(2, SIZE, SIZE), K))
    loss.backward()
    assert loss == 0
    assert all((gradient == 0).all() for _, gradient in gradients(predictions))


def test_a_class_that_may_hide_gets_no_target():
    """Class 3 has no valid pixel and is not known to be absent: unmatched queries leave its logits alone."""
    sem_seg, weight = blocks(), torch.ones(2, SIZE, SIZE)
    weight[sem_seg == 3] = 0
    unknown = torch.zeros(2, K, dtype=torch.bool)
    unknown[0, 3] = True  # in image 0 only
    predictions = make_predictions(layers=1)
    criterion = make_criterion(pixel_weight=0.0, mask_weight=0.0, dice_weight=0.0)
    targets = build_targets(sem_seg, weight, K, image_weight=torch.full((2,), 0.75), unknown=unknown)
    total(criterion, predictions, targets).backward()
    gradient = predictions[0][0].class_logits.grad[..., 3]
    matched = 3  # classes 0, 1, 2 have a segment; a matched query knows that it is not class 3
    assert (gradient[0] == 0).sum() == N - matched
    assert (gradient[1] != 0).all()


def test_semantic_queries_of_a_class_that_may_hide_get_no_target():
    sem_seg, weight = blocks(), torch.ones(2, SIZE, SIZE)
    weight[sem_seg == 3] = 0
    unknown = torch.zeros(2, K, dtype=torch.bool)
    unknown[0, 3] = True
    predictions = make_predictions(layers=1, semantic=True)
    criterion = make_criterion(pixel_weight=0.0)
    targets = build_targets(sem_seg, weight, K, image_weight=torch.full((2,), 0.75), unknown=unknown)
    total(criterion, predictions, targets).backward()
    layer = predictions[0][0]
    for gradient in (layer.presence_logits.grad, layer.semantic_mask_embed.grad.abs().sum(-1)):  # (B, E, K)
        assert (gradient[0, :, 3] == 0).all()  # it may hide in image 0
        assert (gradient[1] != 0).all()  # and is known to be absent in image 1


def test_absent_classes_are_pushed_down_and_present_ones_up():
    sem_seg = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    predictions = make_predictions(batch=1, layers=1, semantic=True)
    total(
        make_criterion(pixel_weight=0.0), predictions, build_targets(sem_seg, torch.ones(1, SIZE, SIZE), K)
    ).backward()
    gradient = predictions[0][0].presence_logits.grad[0]
    assert (gradient[:, 0] < 0).all() and (gradient[:, 1:] > 0).all()


def pair_cost(logits, truth):
    """Of a mask (P,) and a segment (P,), by the formulas of the losses."""
    truth = truth.float()
    dice = 1 - (2 * (logits.sigmoid() * truth).sum() + 1) / (logits.sigmoid().sum() + truth.sum() + 1)
    return 5 * torch.nn.functional.binary_cross_entropy_with_logits(logits, truth) + 5 * dice


def test_matched_semantic_queries_share_the_segments_of_their_class():
    """Class 0 has two parts, class 1 one; three queries each. The best pairing by brute force is what is taught."""
    labels = torch.full((1, SIZE, SIZE), 2)
    labels[0, :8, :8] = labels[0, 20:, 20:] = 0
    labels[0, :8, 20:] = 1
    targets = build_targets(labels, torch.ones(1, SIZE, SIZE), K, segments="components", min_area=4)
    criterion = make_criterion(match_semantic=True, num_points=600)
    predictions, features = make_predictions(batch=1, semantic=True)
    points = SharedPoints.draw(targets, 600)
    read = sample_maps(features, points.point_coords)
    regions = torch.stack([torch.einsum("bekc,bpc->bekp", p.semantic_mask_embed, read) for p in predictions])
    assignment = match_within_class(regions, targets, points, criterion.matcher)
    (layer, _, scale, kind), segment, weight = assignment.index, assignment.segment, assignment.weight
    assert (weight == points.weight).all()
    for own, classes in enumerate(targets.labels[0].tolist()):
        assert set(kind[segment == own].tolist()) == {classes}  # nobody takes another class's segment
    parts = (targets.labels[0] == 0).nonzero()[:, 0].tolist()
    assert len(parts) == 2
    for step, logits in enumerate(regions[:, 0, :, 0]):  # (E, P) of class 0
        best = min(
            itertools.permutations(range(E), 2),
            key=lambda q: sum(pair_cost(logits[i], points.segment[0] == part) for i, part in zip(q, parts)),
        )
        mine = (layer == step) & (kind == 0)
        assert {int(s): int(q) for s, q in zip(segment[mine], scale[mine])} == dict(zip(parts, best))


def test_of_more_segments_than_queries_the_largest_are_shared():
    labels = torch.full((1, SIZE, SIZE), 2)
    for top, left, size in ((0, 0, 10), (0, 14, 8), (14, 0, 6), (24, 24, 4)):
        labels[0, top : top + size, left : left + size] = 0
    targets = build_targets(labels, torch.ones(1, SIZE, SIZE), K, segments="components", min_area=4)
    criterion = make_criterion(match_semantic=True)
    points = SharedPoints.draw(targets, 2000)
    # Masks that fit the smallest segment and no other: it is not taken for all that.
    smallest = (targets.labels[0] == 0).nonzero()[-1, 0]
    regions = torch.where(points.segment[0] == smallest, 9.0, -9.0).expand(1, 1, E, K, -1)
    assignment = match_within_class(regions, targets, points, criterion.matcher)
    kind, segment, weight = assignment.index[3], assignment.segment, assignment.weight
    taken = sorted(segment[kind == 0].tolist())
    assert taken == (targets.labels[0] == 0).nonzero()[:E, 0].tolist()
    assert ((weight[0] == 0) == (points.segment[0] == smallest)).all()
    assert criterion.normalizers(targets, N).regions == (3 + 1) / 3  # class 0 has three, class 2 one


def test_a_query_without_a_segment_is_taught_nothing_only_where_that_is_known():
    labels = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    labels[0, :8, :8] = 1
    labels[0, 20:22, 20:22] = 2  # too small to be a segment
    targets = build_targets(labels, torch.ones(1, SIZE, SIZE), K, segments="components", min_area=9)
    assert targets.unassigned.tolist() == [[False, False, True, False]]
    predictions = make_predictions(batch=1, semantic=True)
    total(make_criterion(match_semantic=True, pixel_weight=0.0), predictions, targets).backward()
    presence = predictions[0][-1].presence_logits.grad[0]  # (E, K)
    assert (presence[:, 2] == 0).all() and (presence[:, 3] > 0).all()
    for k in (0, 1):  # one query has the only segment, the other two have none
        assert sorted(presence[:, k].sign().tolist()) == [-1, 1, 1]


def test_balanced_presence_counts_both_sides_alike():
    logits = torch.zeros(1, 5)
    present, absent = torch.tensor([[1, 0, 0, 0, 0]]).bool(), torch.tensor([[0, 1, 1, 1, 0]]).bool()
    torch.testing.assert_close(balanced_presence_loss(logits, present, absent), torch.tensor([2.0]).log())
    surer = logits.index_fill(1, torch.tensor([4]), 9.0)  # in neither
    torch.testing.assert_close(balanced_presence_loss(surer, present, absent), torch.tensor([2.0]).log())


@semantic
def test_image_weight_scales_an_images_losses(semantic):
    sem_seg, weight = blocks(1), torch.ones(1, SIZE, SIZE)
    losses = []
    for share in (1.0, 0.25):
        torch.manual_seed(0)
        predictions = make_predictions(batch=1, semantic=semantic)
        targets = build_targets(sem_seg, weight, K, image_weight=torch.tensor([share]))
        losses.append(losses_of(make_criterion(class_weight=0.0), predictions, targets))
    for name in losses[0].keys() - {"loss_class"}:
        torch.testing.assert_close(losses[1][name], 0.25 * losses[0][name])


@semantic
def test_one_class(semantic):
    sem_seg = torch.zeros(2, SIZE, SIZE, dtype=torch.long)
    predictions = make_predictions(classes=1, semantic=semantic)
    loss = total(make_criterion(), predictions, build_targets(sem_seg, torch.ones(2, SIZE, SIZE), 1))
    loss.backward()
    assert torch.isfinite(loss)


def test_losses_do_not_depend_on_the_order_of_classes():
    """Kept classes stand in an order of their own: targets in terms of them give the same losses."""
    order = torch.tensor([2, 0, 3, 1])
    losses = []
    for permute in (False, True):
        torch.manual_seed(0)
        (layers, features), targets = (
            make_predictions(semantic=True),
            build_targets(blocks(), torch.ones(2, SIZE, SIZE), K),
        )
        if permute:
            columns = torch.cat((order, torch.tensor([K])))
            layers = [
                QueryPredictions(
                    p.class_logits[..., columns],
                    p.mask_embed,
                    p.presence_logits[..., order],
                    p.semantic_mask_embed[:, :, order],
                )
                for p in layers
            ]
            targets = targets.restrict_to(order.expand(2, -1), K)
        losses.append(losses_of(make_criterion(importance_ratio=1.0), (layers, features), targets))
    torch.testing.assert_close(losses[0], losses[1])


def test_micro_batches_add_up():
    """With shared denominators, the losses of the parts sum to those of the whole."""
    criterion = make_criterion(num_points=10_000, oversample_ratio=1.0, importance_ratio=0.0)
    (layers, features), sem_seg, weight = make_predictions(batch=4, semantic=True), blocks(4), torch.ones(4, SIZE, SIZE)
    weight[2, :, :20] = 0
    whole_targets = build_targets(sem_seg, weight, K)
    whole = losses_of(criterion, (layers, features), whole_targets)
    normalizers, parts = criterion.normalizers(whole_targets, N), []
    for rows in (slice(0, 2), slice(2, 4)):
        own = [p[rows] for p in layers], features[rows]
        parts.append(losses_of(criterion, own, build_targets(sem_seg[rows], weight[rows], K), normalizers))
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=0.04, atol=0)


def test_the_class_loss_equals_its_formula():
    """Weights of images and of "no object", and an unknown class that is left out where nothing is matched."""
    sem_seg, weight = blocks(), torch.ones(2, SIZE, SIZE)
    weight[sem_seg == 3] = 0
    unknown = torch.zeros(2, K, dtype=torch.bool)
    unknown[0, 3] = True
    shares = torch.tensor([0.5, 1.0])
    targets = build_targets(sem_seg, weight, K, image_weight=shares, unknown=unknown)
    criterion = make_criterion(class_weight=1.0, no_object_weight=0.3)
    segment_of = [{0: 0, 1: 1, 2: 2}, {3: 2, 4: 0, 5: 1}]  # {query: segment, which is its class here}
    pairs = torch.tensor([(0, b, q, s) for b, matched in enumerate(segment_of) for q, s in matched.items()])
    criterion.matcher = lambda *args: Matches(*pairs.unbind(1), counts=[3, 3])
    predictions = make_predictions(layers=1)
    logits = predictions[0][0].class_logits.detach()
    total_loss = total_weight = 0
    for b, q in itertools.product(range(2), range(N)):
        possible = [k for k in range(K + 1) if q in segment_of[b] or not (k < K and unknown[b, k])]
        loss = logits[b, q, possible].logsumexp(0) - logits[b, q, segment_of[b].get(q, K)]
        total_loss += loss * shares[b] * (1.0 if q in segment_of[b] else 0.3 * shares[b])
        total_weight += 1.0 if q in segment_of[b] else 0.3 * shares[b]
    torch.testing.assert_close(losses_of(criterion, predictions, targets)["loss_class"], total_loss / total_weight)


def test_the_pixel_loss_is_the_cross_entropy_of_the_probabilities():
    targets = build_targets(blocks(), torch.ones(2, SIZE, SIZE), K, image_weight=torch.tensor([0.25, 1.0]))
    criterion, (layers, features) = make_criterion(pixel_weight=1.0), make_predictions(layers=1)
    points = SharedPoints.draw(targets, criterion.num_points)
    scores = ClassScoreHead(epsilon=2.0)  # large, so that it matters
    with torch.no_grad():
        losses = criterion(layers, features, targets, points, scores, criterion.normalizers(targets, N))
        logits = torch.einsum("bnc,bpc->bnp", layers[0].mask_embed, sample_maps(features, points.point_coords))
        probability = scores.normalize(scores(layers[0].class_logits, logits)[..., None])[..., 0]  # (B, K, P)
    per_image = -probability.log().gather(1, points.label[:, None])[:, 0].mean(1)
    torch.testing.assert_close(losses["loss_pixel"], (0.25 * per_image[0] + per_image[1]) / 2)


def test_without_deep_supervision_only_the_last_prediction_counts():
    layers, features = make_predictions(layers=3, semantic=True)
    targets, losses = build_targets(blocks(), torch.ones(2, SIZE, SIZE), K), []
    for kept, deep_supervision in ((layers, False), (layers[-1:], True)):
        torch.manual_seed(0)
        losses.append(losses_of(make_criterion(deep_supervision=deep_supervision), (kept, features), targets))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
