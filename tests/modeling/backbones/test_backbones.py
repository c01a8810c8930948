"""Detectron2, torchvision and timm backbones: shapes, weights, and frozen norms."""

import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn
from torchvision.models import mobilenet_v2

from hiervl.modeling.backbones import MobileNetV2, TimmBackbone, build_backbone
from hiervl.modeling.backbones.frozen_norm import FrozenNormConv2d, NamedFrozenNormConv2d, freeze_norms
from hiervl.config import load_config
from hiervl.errors import UserError
from tests.conftest import shared_file
from tests.networks import activations_and_gradients

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def check_shapes(backbone):
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = backbone(image)
    for name, spec in backbone.output_shape().items():
        assert spec.stride == STRIDES[name]
        assert features[name].shape == (1, spec.channels, 64 // spec.stride, 96 // spec.stride)
    assert set(features) == set(STRIDES)


@pytest.mark.parametrize("name", ["test_convnext", "lcnet_050", "test_resnet"])
def test_timm(name):
    check_shapes(TimmBackbone(name=name).eval())


def test_mobilenet_equals_torchvisions():
    backbone, reference = MobileNetV2().eval(), mobilenet_v2(weights=None).eval()
    reference.features[:18].load_state_dict(
        {k: v for k, v in zip(reference.features[:18].state_dict(), backbone.state_dict().values())}
    )
    check_shapes(backbone)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(image)["res5"], reference.features[:18](image))


def test_weights_are_loaded_from_a_file():
    path = shared_file("weights/mobilenet_v2-b0353104.pth")
    backbone = MobileNetV2(weights=path)
    state = torch.load(path, weights_only=True)
    assert torch.equal(backbone.stages["res2"][0][0].weight, state["features.0.0.weight"])


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth.*missing"):
        MobileNetV2(weights=str(tmp_path / "other.pth"))


def test_the_error_for_missing_weights_says_where_to_get_them(tmp_path):
    with pytest.raises(UserError, match=r"none.pth: no such weights file \(MODEL.BACKBONE.WEIGHTS\).*https://"):
        MobileNetV2(weights=str(tmp_path / "none.pth"))


def test_resnet_of_detectron2():
    cfg = load_config("", ["MODEL.DEVICE", "cpu"])
    backbone = build_backbone(cfg).eval()
    check_shapes(backbone)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


def test_frozen_norms_of_detectron2s_convolutions_are_folded_without_changing_results():
    torch.manual_seed(0)
    plain = BottleneckBlock(8, 16, bottleneck_channels=4, norm="FrozenBN")
    for norm in (m for m in plain.modules() if isinstance(m, FrozenBatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            nn.init.normal_(tensor)
    folded = freeze_norms(copy.deepcopy(plain))
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(m, NamedFrozenNormConv2d) for m in convolutions) and len(convolutions) == 4
    assert folded.state_dict().keys() == plain.state_dict().keys()
    image, results = torch.randn(2, 8, 12, 12), []
    for block in (plain, folded):
        out = block(image)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(block.parameters()))])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_norms_that_are_not_frozen_are_kept():
    cfg = load_config("", ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_BN", "False", "MODEL.RESNETS.NORM", "BN"])
    backbone = build_backbone(cfg)
    assert any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    assert not any(isinstance(m, NamedFrozenNormConv2d) for m in backbone.modules())


def test_frozen_stages_are_not_trained():
    backbone = MobileNetV2(freeze_at=3)
    trained = {name: any(p.requires_grad for p in stage.parameters()) for name, stage in backbone.stages.items()}
    assert trained == {"res2": False, "res3": False, "res4": True, "res5": True}


def test_folded_norms_give_the_same_outputs_and_gradients():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8),
    )
    for norm in (network[1], network[4]):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.running_mean)
        nn.init.normal_(norm.weight)
    image = torch.randn(2, 3, 16, 16)
    expected = FrozenBatchNorm2d.convert_frozen_batchnorm(nn.Sequential(*network))
    expected_out = expected(image)
    expected_out.square().sum().backward()
    gradients = [network[i].weight.grad.clone() for i in (0, 3)]
    network.zero_grad()
    folded = freeze_norms(network)
    assert isinstance(folded[0], FrozenNormConv2d)
    out = folded(image)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected_out)
    for i, gradient in zip((0, 3), gradients):
        torch.testing.assert_close(folded[i].weight.grad, gradient, rtol=1e-4, atol=1e-4)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="resnet99"):
        TimmBackbone(name="resnet99")
    with pytest.raises(UserError, match="MODEL.BACKBONE.NAME.*MobileNetV2"):
        build_backbone(load_config("", ["MODEL.BACKBONE.NAME", "MobileNet"]))


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "resnet10t"])
def test_checkpointing_activations_keeps_fewer_and_changes_no_gradient(name):
    torch.manual_seed(0)
    backbone, image = TimmBackbone(name=name).eval(), torch.randn(2, 3, 64, 64)
    kept, expected = activations_and_gradients(backbone, image)
    backbone.checkpoint_activations()
    kept_less, gradients = activations_and_gradients(backbone, image)
    assert kept_less < 0.8 * kept
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize(
    "name, message", [("build_resnet_backbone", "has no blocks"), ("MobileNetV2", "has no blocks")]
)
def test_a_backbone_that_cannot_checkpoint_activations_is_refused(name, message):
    cfg = load_config("", ["MODEL.BACKBONE.NAME", name, "SOLVER.ACTIVATION_CHECKPOINTING", ("backbone",)])
    with pytest.raises(UserError, match=f"SOLVER.ACTIVATION_CHECKPOINTING: {name} {message}"):
        build_backbone(cfg)


def test_a_timm_model_that_cannot_checkpoint_activations_is_refused(monkeypatch):
    backbone = TimmBackbone(name="test_vit")
    monkeypatch.setattr(backbone.body, "model", nn.Identity())
    with pytest.raises(UserError, match="SOLVER.ACTIVATION_CHECKPOINTING: timm cannot do it for Identity"):
        backbone.checkpoint_activations()
