"""The criterion's invariants: what is not valid does not count, what is not known is not taught."""
import pytest
import torch

from hiervl.criterion import Criterion
from hiervl.inference import ClassScores
from hiervl.matcher import HungarianMatcher
from hiervl.points import draw_valid_points, pixel_centers, sample_maps
from hiervl.targets import build_targets

K, N, SIZE, GRID = 4, 6, 32, 8


def make_criterion(**changes):
    options = {"class_weight": 2.0, "mask_weight": 5.0, "dice_weight": 5.0, "pixel_weight": 2.0,
               "no_object_weight": 0.1, "num_points": 200, "oversample_ratio": 3.0, "importance_ratio": 0.75,
               "deep_supervision": True, **changes}
    return Criterion(matcher=HungarianMatcher(2.0, 5.0, 5.0), **options)


def make_predictions(batch=2, layers=2, classes=K):
    return [{"class_logits": torch.randn(batch, N, classes + 1, requires_grad=True),
             "mask_logits": torch.randn(batch, N, GRID, GRID, requires_grad=True)} for _ in range(layers)]


def blocks(batch=2):
    """Label maps of four quadrants, classes 0..3."""
    quadrant = torch.arange(4).view(2, 2).repeat_interleave(SIZE // 2, 0).repeat_interleave(SIZE // 2, 1)
    return quadrant.expand(batch, -1, -1).clone()


def total(criterion, predictions, targets, scores=None):
    return sum(criterion(predictions, targets, scores or ClassScores()).values())


def test_logits_without_valid_support_get_exactly_zero_gradient():
    weight = torch.zeros(2, SIZE, SIZE)
    weight[:, :13, :10] = 1  # not aligned with the grid of mask logits
    predictions = make_predictions()
    total(make_criterion(), predictions, build_targets(blocks(), weight, K)).backward()

    # Bilinear support by brute force: the grid cells that any valid pixel centre touches.
    touched = torch.zeros(1, 1, GRID, GRID, requires_grad=True)
    every_pixel = pixel_centers(weight[0].flatten().nonzero()[:, 0], SIZE, SIZE)[None]
    sample_maps(touched, every_pixel).sum().backward()
    outside = touched.grad[0, 0] == 0
    assert outside.any() and not outside.all()
    for prediction in predictions:
        gradient = prediction["mask_logits"].grad
        assert (gradient[..., outside] == 0).all()
        assert (gradient[..., ~outside] != 0).any()


@pytest.mark.parametrize("ignored", ["weight", "label"])
def test_an_image_without_valid_pixel_contributes_nothing(ignored):
    sem_seg, weight = blocks(), torch.ones(2, SIZE, SIZE)
    if ignored == "weight":
        weight[1] = 0
    else:
        sem_seg[1] = 255
    predictions = make_predictions()
    loss = total(make_criterion(), predictions, build_targets(sem_seg, weight, K))
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    for prediction in predictions:
        assert (prediction["mask_logits"].grad[1] == 0).all()
        assert (prediction["class_logits"].grad[1] == 0).all()


def test_a_batch_without_any_valid_pixel_gives_zero_loss_in_the_graph():
    predictions = make_predictions()
    loss = total(make_criterion(), predictions, build_targets(blocks(), torch.zeros(2, SIZE, SIZE), K))
    loss.backward()
    assert loss == 0
    assert all((p["mask_logits"].grad == 0).all() for p in predictions)


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
    gradient = predictions[0]["class_logits"].grad[..., 3]
    matched = 3  # classes 0, 1, 2 have a segment; a matched query knows that it is not class 3
    assert (gradient[0] == 0).sum() == N - matched
    assert (gradient[1] != 0).all()


def test_image_weight_scales_an_images_losses():
    sem_seg, weight = blocks(1), torch.ones(1, SIZE, SIZE)
    losses = []
    for share in (1.0, 0.25):
        torch.manual_seed(0)
        predictions = make_predictions(batch=1)
        targets = build_targets(sem_seg, weight, K, image_weight=torch.tensor([share]))
        losses.append(make_criterion(class_weight=0.0)(predictions, targets, ClassScores()))
    for name in ("loss_mask", "loss_dice", "loss_pixel"):
        torch.testing.assert_close(losses[1][name], 0.25 * losses[0][name])


def test_non_finite_costs_are_never_matched():
    predictions = make_predictions(batch=1, layers=1)
    with torch.no_grad():
        predictions[0]["mask_logits"][0, 2] = float("nan")
        predictions[0]["class_logits"][0, 4, 1] = float("inf")
    targets = build_targets(blocks(1), torch.ones(1, SIZE, SIZE), K)
    index = draw_valid_points(targets.weight, 100)
    values = sample_maps(predictions[0]["mask_logits"], pixel_centers(index, SIZE, SIZE))[None]
    matched = make_criterion().matcher(predictions[0]["class_logits"][None], values,
                                       targets.segments.flatten(1).gather(1, index), torch.ones(1, 100),
                                       targets.labels)
    assert set(matched[2].tolist()) <= {0, 1, 3, 5} and len(matched[2]) == 4


def test_one_class():
    sem_seg = torch.zeros(2, SIZE, SIZE, dtype=torch.long)
    predictions = make_predictions(classes=1)
    loss = total(make_criterion(), predictions, build_targets(sem_seg, torch.ones(2, SIZE, SIZE), 1))
    loss.backward()
    assert torch.isfinite(loss)


def test_losses_do_not_depend_on_the_order_of_classes():
    order = torch.tensor([2, 0, 3, 1])
    sem_seg = blocks()
    losses = []
    for permute in (False, True):
        torch.manual_seed(0)
        predictions = make_predictions()
        labels = sem_seg
        if permute:
            labels = order.argsort()[sem_seg]
            columns = torch.cat((order, torch.tensor([K])))
            predictions = [{**p, "class_logits": p["class_logits"][..., columns]} for p in predictions]
        losses.append(make_criterion(importance_ratio=0.0)(predictions, build_targets(
            labels, torch.ones(2, SIZE, SIZE), K), ClassScores()))
    torch.testing.assert_close(losses[0], losses[1])


def test_micro_batches_add_up():
    """With shared denominators, the losses of the parts sum to those of the whole."""
    criterion, scores = make_criterion(num_points=10_000, importance_ratio=0.0), ClassScores()
    predictions, sem_seg, weight = make_predictions(batch=4), blocks(4), torch.ones(4, SIZE, SIZE)
    weight[2, :, :20] = 0
    whole_targets = build_targets(sem_seg, weight, K)
    whole = criterion(predictions, whole_targets, scores)
    parts = []
    normalizers = criterion.normalizers(whole_targets, N)
    for rows in (slice(0, 2), slice(2, 4)):
        own = [{name: value[rows] for name, value in p.items()} for p in predictions]
        parts.append(criterion(own, build_targets(sem_seg[rows], weight[rows], K), scores, normalizers))
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=0.04, atol=0)


def test_points_are_drawn_uniformly_from_valid_pixels():
    weight = torch.zeros(2, 4, 5)
    weight[0, 1, 1:4] = 0.5
    weight[1, 3, 4] = 1
    index = draw_valid_points(weight, 3000)
    counts = torch.bincount(index[0], minlength=20)
    assert set(counts.nonzero()[:, 0].tolist()) == {6, 7, 8}
    assert counts[[6, 7, 8]].min() > 850
    assert (index[1] == 19).all()


def test_components():
    sem_seg = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    sem_seg[0, 2:10, 2:10] = 1
    sem_seg[0, 20:30, 20:30] = 1
    sem_seg[0, 15, 15] = 1  # smaller than min_area
    targets = build_targets(sem_seg, torch.ones(1, SIZE, SIZE), 2, segments="components", min_area=9)
    assert targets.labels[0].tolist() == [0, 1, 1]
    assert targets.segments[0, 15, 15] == -1
    assert targets.segments[0, 5, 5] != targets.segments[0, 25, 25]
    whole = build_targets(sem_seg, torch.ones(1, SIZE, SIZE), 2)
    assert whole.labels[0].tolist() == [0, 1]
