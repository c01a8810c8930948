"""With the linear classifier the network is Mask2Former: same names, same numbers (reference outputs in ../shared)."""

import pytest
import torch
from detectron2.layers import ShapeSpec

from hiervl.modeling.classifier import LinearClassifier
from hiervl.losses.mask_losses import dice_loss, sigmoid_ce_loss
from hiervl.modeling.dual_query_decoder import QueryDecoder
from hiervl.modeling.inference import ClassScoreHead
from hiervl.losses.matcher import dice_cost, sigmoid_ce_cost
from hiervl.modeling.pixel_decoder import PixelDecoder

from .conftest import shared_file

TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def reference():
    return torch.load(shared_file("parity/mask2former.pt"), weights_only=True)


@pytest.fixture(scope="module")
def settings(reference):
    return reference["settings"]


def build_pixel_decoder(settings):
    shapes = {
        name: ShapeSpec(channels=settings["channels"][name], stride=settings["strides"][name])
        for name in settings["channels"]
    }
    return PixelDecoder(
        shapes,
        conv_dim=settings["conv_dim"],
        mask_dim=settings["mask_dim"],
        num_layers=settings["enc_layers"],
        num_heads=settings["nheads"],
        num_points=4,
        feedforward_dim=settings["enc_ffn"],
    )


def build_decoder(settings):
    return QueryDecoder(
        memory_dim=settings["conv_dim"],
        mask_dim=settings["mask_dim"],
        hidden_dim=settings["conv_dim"],
        num_queries=settings["num_queries"],
        num_heads=settings["nheads"],
        num_layers=settings["dec_layers"],
        feedforward_dim=settings["dec_ffn"],
        classifier=LinearClassifier(settings["conv_dim"], settings["num_classes"]),
    )


def test_pixel_decoder(reference, settings):
    network = build_pixel_decoder(settings)
    network.load_state_dict(reference["pixel_decoder"], strict=True)
    with torch.no_grad():
        memory, mask_features = network(reference["features"])
    torch.testing.assert_close(mask_features, reference["mask_features"], **TOLERANCE)
    for own, expected in zip(memory, reference["multi_scale_features"], strict=True):
        torch.testing.assert_close(own, expected, **TOLERANCE)


def test_decoder_every_output(reference, settings):
    network = build_decoder(settings)
    network.load_state_dict(reference["predictor"], strict=True)
    with torch.no_grad():
        own = network(reference["multi_scale_features"], reference["mask_features"], None)
    expected = [*reference["aux_outputs"], {k: reference[k] for k in ("pred_logits", "pred_masks")}]
    for prediction, target in zip(own, expected, strict=True):
        torch.testing.assert_close(prediction.class_logits, target["pred_logits"], **TOLERANCE)
        torch.testing.assert_close(
            prediction.mask_logits(reference["mask_features"]), target["pred_masks"], **TOLERANCE
        )


def test_semantic_inference(reference):
    masks = reference["pred_masks"]
    class_scores = ClassScoreHead()(reference["pred_logits"], masks.flatten(2)).unflatten(2, masks.shape[2:])
    torch.testing.assert_close(class_scores.detach(), reference["semantic"], **TOLERANCE)


def test_losses_and_costs(reference):
    loss = reference["losses"]
    logits, targets, num_masks = loss["logits"], loss["targets"], loss["num_masks"]
    ones = torch.ones_like(targets)
    torch.testing.assert_close(sigmoid_ce_loss(logits, targets, ones).sum() / num_masks, loss["sigmoid_ce"])
    torch.testing.assert_close(dice_loss(logits, targets, ones).sum() / num_masks, loss["dice"])
    pairs = loss["batch_dice_cost"].shape[1]
    torch.testing.assert_close(dice_cost(logits, targets[:pairs], ones[0]), loss["batch_dice_cost"])
    torch.testing.assert_close(sigmoid_ce_cost(logits, targets[:pairs], ones[0]), loss["batch_sigmoid_ce_cost"])
