"""The network as a whole: lists of dicts in and out, any image size, any list of classes."""

import pytest
import hashlib

import torch
import torch.nn.functional as F

from hiervl.errors import UserError
from hiervl.modeling.inference import InferenceProtocol
from hiervl.losses.points import SharedPoints, sample_maps

from tests.networks import flatten_losses, make_network, pseudo_input, training_input

kinds = pytest.mark.parametrize("kind", ["text", "hiervl"])


@pytest.mark.parametrize("kind", ["linear", "text", "hiervl"])
@pytest.mark.parametrize("size", [(64, 64), (45, 71), (33, 128)])
def test_inference_gives_probabilities_at_the_wanted_size(kind, size):
    network = make_network(kind=kind).eval()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    plain, resize_maps = network([{"image": image}, {"image": image, "height": 50, "width": 40}])
    assert plain["sem_seg"].shape == (4, *size) and resize_maps["sem_seg"].shape == (4, 50, 40)
    total = plain["sem_seg"].sum(0)
    assert (plain["sem_seg"] >= 0).all() and (total > 0).all() and (total < 1).all()


@kinds
def test_training_gives_losses_of_both_kinds_and_gradients_everywhere(kind):
    network = make_network(kind=kind).train()
    if kind == "hiervl":
        network.text.adapter.gamma.data.fill_(0.1)  # at 0, the adapter's layers get no gradient
    losses = flatten_losses(network([training_input(), pseudo_input(teacher=True), training_input()]))
    names = {"class", "mask", "dice", "pixel"}
    if kind == "hiervl":
        names |= {"presence", "region", "region_dice", "vision_language", "relevance"}
    both = {f"{kind_of_image}/loss_{name}" for kind_of_image in ("labeled", "pseudo") for name in names}
    assert both <= set(losses)
    extra = {f"labeled/loss_{name}" for name in ("language", "diversity", "contrastive", "vision")}
    extra.add("pseudo/loss_consistency")
    assert set(losses) - both == (extra if kind == "hiervl" else set())
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert not without


@kinds
def test_only_labeled_or_only_pseudo_labeled_images(kind):
    network = make_network(kind=kind).train()
    assert list(network([training_input()])) == ["labeled"]
    assert list(network([pseudo_input(teacher=True)])) == ["pseudo"]


@kinds
def test_no_weight_has_a_class_dimension(kind):
    few, many = make_network(classes=4, kind=kind), make_network(classes=9, kind=kind)
    assert {k: v.shape for k, v in few.state_dict().items()} == {k: v.shape for k, v in many.state_dict().items()}


@kinds
def test_permuting_the_classes_permutes_the_output(kind):
    embeddings, order = torch.randn(4, 16), torch.tensor([2, 0, 3, 1])
    first = make_network(embeddings=embeddings, kind=kind).eval()
    second = make_network(embeddings=embeddings[order], kind=kind).eval()
    second.load_state_dict(first.state_dict())
    image = [{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}]
    torch.testing.assert_close(first(image)[0]["sem_seg"][order], second(image)[0]["sem_seg"])


@kinds
def test_one_class_trains_and_predicts(kind):
    network = make_network(classes=1, kind=kind)
    losses = network.train()([training_input(classes=1)])["labeled"]
    assert all(torch.isfinite(value) for value in losses.values())
    assert network.eval()([training_input()])[0]["sem_seg"].shape == (1, 64, 64)


def test_a_window_as_large_as_the_image_is_the_whole_image():
    image = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)}]
    whole = make_network().eval()(image)[0]["sem_seg"]
    sliding = make_network(protocol=InferenceProtocol("sliding", (64, 96), (64, 96))).eval()(image)[0]["sem_seg"]
    torch.testing.assert_close(whole, sliding)
    smaller = make_network(protocol=InferenceProtocol("sliding", (48, 64), (32, 48))).eval()(image)[0]["sem_seg"]
    assert smaller.shape == whole.shape and torch.isfinite(smaller).all()


def test_scales_and_mirrored_images_are_averaged_at_the_size_of_the_result():
    network = make_network().eval()
    image = {"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8), "height": 50, "width": 70}
    mirrored = {**image, "image": image["image"].flip(2)}
    small = F.interpolate(image["image"][None].float(), size=(32, 48), mode="bilinear", antialias=True)[0]
    views = [
        network([x])[0]["sem_seg"]
        for x in (image, mirrored, {**image, "image": small}, {**image, "image": small.flip(2)})
    ]
    network.protocol = InferenceProtocol(scales=(1.0, 0.5), flip=True)
    both = network([image])[0]["sem_seg"]
    expected = (views[0] + views[1].flip(2) + views[2] + views[3].flip(2)) / 4
    assert both.shape == (4, 50, 70)
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-4)
    # Mirroring the image now mirrors the result, which no single view promises.
    torch.testing.assert_close(network([mirrored])[0]["sem_seg"].flip(2), both, atol=1e-5, rtol=1e-4)


def evidence_of(output, resize):
    """Evidence (B, K, h, w) by its formula, from masks that `resize` maps from a quarter of the size to another."""
    last, features = output.layers[-1], output.mask_features
    evidence = torch.einsum(
        "bnk,bnhw->bkhw", last.class_logits.softmax(-1)[..., :-1], resize(last.mask_logits(features)).sigmoid()
    )
    if output.selected is None:
        return evidence
    regions = resize(last.semantic_mask_logits(features).flatten(1, 2)).sigmoid()
    regions = regions.unflatten(1, last.presence_logits.shape[1:])  # (B, E, K, h, w)
    relevance = output.selected.relevance
    gate = 1 - (1 - last.presence_logits.sigmoid()) * (1 - relevance[:, None])
    return relevance[..., None, None] * (evidence + torch.einsum("bek,bekhw->bkhw", gate, regions) / 3)


@kinds
def test_probabilities_are_those_of_the_evidence_at_a_quarter_of_the_size(kind):
    """Mask2Former upsamples every query's mask instead: that is close, compared to how much the values vary."""
    network = make_network(kind=kind).eval()
    coarse = torch.randint(0, 256, (1, 3, 8, 12)).float()
    images = F.interpolate(coarse, size=(64, 96))

    def full(maps):
        return F.interpolate(maps, size=(64, 96), mode="bilinear", align_corners=False)

    with torch.no_grad():
        dense = network.predict(images, suppress=False).dense()
        output = network.encode(network.preprocess(images), names=network.text())
        expected = network.scores.normalize(full(evidence_of(output, lambda maps: maps)))
        of_full_masks = network.scores.normalize(evidence_of(output, full))
    torch.testing.assert_close(dense, expected)
    spread = dense.flatten(2).std(2).mean()
    assert spread > 1e-3 and (dense - of_full_masks).abs().mean() < 0.1 * spread
    assert (dense.flip(3) - of_full_masks).abs().mean() > 0.5 * spread  # so the bound would notice another image


def test_images_are_normalized_before_they_are_padded():
    images = torch.tensor([120.0, 180.0, 60.0]).view(1, 3, 1, 1).expand(1, 3, 40, 64)
    prepared = make_network().preprocess(images)
    assert prepared.shape == (1, 3, 64, 64) and (prepared[:, :, 40:] == 0).all()
    assert prepared[0, :, 39, 63].tolist() == [0, 1, -1]


def test_predictions_hold_the_relevance_of_every_class_in_their_order():
    network = make_network(classes=9, kind="hiervl", top_k=3).eval()
    images = torch.rand(2, 3, 64, 64) * 255
    with torch.no_grad():
        prediction, output = network.predict(images), network.inference_forward(images)
    torch.testing.assert_close(prediction.relevance, output.selected.logits.sigmoid())
    assert prediction.relevance.shape == (2, 9) and prediction.index.shape[1] <= 3


def test_feature_dropout_drops_whole_channels_of_its_image_only():
    network = make_network().train()
    seen = {}
    network.pixel_decoder.register_forward_pre_hook(lambda module, args: seen.update(args[0]))
    images = network.preprocess(torch.rand(2, 3, 64, 64) * 255)
    network.backbone.eval()
    network.encode(images, names=network.text())
    plain = dict(seen)
    network.encode(images, [0.0, 0.5], network.text())
    for name, value in seen.items():
        torch.testing.assert_close(value[0], plain[name][0])
        dropped = (value[1] == 0).flatten(1).all(1) & (plain[name][1] != 0).flatten(1).any(1)
        assert dropped.any() and not dropped.all()
        torch.testing.assert_close(value[1, ~dropped], 2 * plain[name][1, ~dropped])  # the mean stays


@kinds
def test_bfloat16_autocast_stays_close(kind):
    network = make_network(kind=kind).eval()
    if kind == "hiervl":
        network.query_generator.min_relevance = 0.0
    image = [{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}]
    full = network(image)[0]["sem_seg"]
    with torch.autocast("cpu", torch.bfloat16):
        half = network(image)[0]["sem_seg"]
    assert torch.isfinite(half).all()
    assert (half.float() - full).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_has_finite_losses_and_gradients(dtype):
    network = make_network(kind="hiervl").train()
    with torch.autocast("cpu", dtype):
        losses = flatten_losses(network([training_input(), pseudo_input(teacher=True)]))
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_other_classes_need_no_other_weights():
    network = make_network(kind="hiervl").eval()
    image = [{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain, order = network(image)[0]["sem_seg"], [2, 0, 3, 1]
    network.set_classes([f"class {k}" for k in order])
    torch.testing.assert_close(network(image)[0]["sem_seg"], plain[order])
    network.set_classes(["class 1"])
    assert network(image)[0]["sem_seg"].shape == (1, 64, 64)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match="listed more than once"):
        network.set_classes(["class 1", "class 1"])
    with pytest.raises(UserError, match="fixed"):
        make_network(kind="linear").set_classes(["class 1"])


def test_a_name_unseen_in_training_is_never_cut():
    network = make_network(classes=6, kind="hiervl").eval()
    network.query_generator.min_relevance = 1.0  # cuts every name that may be cut, but for the best one
    image = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        assert network.predict(image).index.shape == (1, 1)
        network.trained_names = frozenset(["class 0", "class 1"])
        assert {2, 3, 4, 5} <= set(network.predict(image).index[0].tolist())
        assert network.predict(image, suppress=False).index.shape == (1, 6)


def test_kept_only_gives_the_kept_classes_and_which_they_are():
    network = make_network(classes=9, kind="hiervl", top_k=3).eval()
    network.query_generator.min_relevance = 0.0
    image = [{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}]
    dense = network(image)[0]["sem_seg"]
    network.protocol.selected_only = True
    kept = network(image)[0]
    assert kept["sem_seg"].shape == (3, 64, 64)
    torch.testing.assert_close(kept["sem_seg"], dense[kept["classes"]])
    others = sorted(set(range(9)) - set(kept["classes"].tolist()))
    assert (dense[others] == 0).all()


def test_what_padding_shows_does_not_reach_relevance_or_queries():
    network = make_network(kind="hiervl").eval()
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    valid = torch.zeros(64, 96, dtype=torch.bool)
    valid[:, :32] = True
    assert network.valid_mask((1, 3, 64, 96)) is None
    assert network.valid_mask((2, 3, 40, 96)).flatten(1).sum(1).tolist() == [40 * 96] * 2
    assert make_network().valid_mask((2, 3, 40, 96)) is None  # nobody asks
    with torch.no_grad():
        masked = network.inference_forward(image[None].float(), suppress=False, valid=valid[None])
        plain = network.inference_forward(image[None].float(), suppress=False)
    assert (masked.selected.logits < plain.selected.logits).all()  # a log-sum-exp over fewer cells
    assert not torch.allclose(masked.aligned.queries, plain.aligned.queries)
    sample = training_input() | {"valid": valid[:, :64]}
    losses = [network.train()([sample | {"padded": padded}])["labeled"]["loss_relevance"] for padded in (True, False)]
    assert losses[0] != losses[1]
    torch.testing.assert_close(
        network([sample | {"padded": True, "valid": torch.ones(64, 64, dtype=torch.bool)}])["labeled"][
            "loss_relevance"
        ],
        losses[1],
    )


@kinds
def test_labels_and_masks_cover_the_same_canvas_when_crops_are_padded(kind):
    """At a label's pixel, the logits that the losses read are those that inference shows there."""
    network, size = make_network(kind=kind).eval(), 72  # padded to 96
    sample = training_input(size=size)
    with torch.no_grad():
        images = network.preprocess(sample["image"][None].float())
        output = network.encode(images, names=network.text())
        masks = output.layers[-1].mask_logits(output.mask_features)
        shown = F.interpolate(masks, size=images.shape[-2:], mode="bilinear", align_corners=False)[..., :size, :size]
    _, targets = network.prepare_batch([sample]).kinds["labeled"]
    assert targets.weight[0, :size, :size].all() and targets.weight.sum() == size * size
    points = SharedPoints.draw(targets, 500)
    read = sample_maps(masks, points.point_coords)[0]  # (P, N)
    row, column = points.index[0] // 96, points.index[0] % 96
    torch.testing.assert_close(read, shown[0, :, row, column].t())


def test_noise_shows_no_more_classes_than_can_be_kept():
    network = make_network(classes=6, kind="hiervl", top_k=3).train()
    noisy = pseudo_input(classes=6, teacher=True)
    _, targets = network.prepare_batch([noisy]).kinds["pseudo"]
    counts = torch.bincount(noisy["sem_seg"].flatten(), minlength=6)
    assert set(targets.labels[0].tolist()) == set(counts.topk(3).indices.tolist())
    assert all(torch.isfinite(loss) for loss in network([noisy])["pseudo"].values())


@pytest.mark.parametrize(
    "kind, digest", [("linear", "bce34ec5fc6b257b"), ("text", "18862c8896fe79c0"), ("hiervl", "493585c67779ae40")]
)
def test_names_and_shapes_of_weights_are_those_of_published_checkpoints(kind, digest):
    """Digests from before the package was sorted into rooms: checkpoints from then still load."""
    state = make_network(kind=kind).state_dict()
    text = "\n".join(f"{name} {tuple(value.shape)}" for name, value in sorted(state.items()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest
