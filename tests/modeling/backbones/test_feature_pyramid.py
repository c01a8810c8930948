"""Feature pyramid of plain ViTs: where its maps' cells lie for any patch and image size, and what is trained."""

import pytest
import timm
import torch

from hiervl.modeling.backbones import TimmBackbone, build_backbone
from hiervl.modeling.backbones.feature_pyramid import STRIDES, SimpleFeaturePyramid, at_stride, crop_to_patches
from hiervl.utils.padding import pad_to_multiple, run_backbone
from hiervl.config import load_config
from hiervl.errors import UserError
from hiervl.semi.solver import build_optimizer

SIZES = [(64, 96), (45, 71), (64, 65), (3, 100)]


def check_shapes(features, backbone, size):
    for name, spec in backbone.output_shape().items():
        assert spec.stride == STRIDES[name]
        cells = tuple(-(-side // spec.stride) for side in size)
        assert features[name].shape == (1, spec.channels, *cells), name
    assert set(features) == set(STRIDES)


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("size", SIZES)
def test_shapes(patch, size):
    pyramid = SimpleFeaturePyramid(32, patch)
    grid = [side // patch for side in pad_to_multiple(torch.zeros(1, 3, *size), patch).shape[-2:]]
    check_shapes(pyramid(torch.randn(1, 32, *grid), size), pyramid, size)


@pytest.mark.parametrize("stride, target_stride", [(14, 16), (7, 8), (3.5, 4), (28, 32), (16, 16)])
def test_cells_are_centered_as_in_a_convolutional_network(stride, target_stride):
    """Resampling a map of its cells' center positions gives the center positions of the target cells."""
    size = (518 - 6, 300)
    rows, columns = (torch.arange(-(-side // stride) + 1) for side in size)
    y, x = torch.meshgrid((rows + 0.5) * stride, (columns + 0.5) * stride, indexing="ij")
    out = at_stride(torch.stack((x, y))[None], stride, target_stride, size)
    y, x = torch.meshgrid(
        (torch.arange(-(-size[0] // target_stride)) + 0.5) * target_stride,
        (torch.arange(-(-size[1] // target_stride)) + 0.5) * target_stride,
        indexing="ij",
    )
    in_image = (x < size[1]) & (y < size[0])
    torch.testing.assert_close(out[0][:, in_image], torch.stack((x, y))[:, in_image], atol=1e-2, rtol=0)


def test_padding_is_less_than_a_patch_and_skipped_if_not_needed():
    image = torch.randn(1, 3, 32, 48)
    assert pad_to_multiple(image, 16) is image
    padded = pad_to_multiple(image, 14)
    assert padded.shape == (1, 3, 42, 56)
    assert torch.equal(padded[..., :32, :48], image) and (padded[..., 32:, :] == 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_timm_vit(size):
    torch.manual_seed(0)
    backbone = TimmBackbone(name="test_vit").eval()
    with torch.no_grad():
        check_shapes(backbone(torch.randn(1, 3, *size)), backbone, size)


def test_padding_is_zero_and_does_not_show_in_the_outputs():
    backbone = TimmBackbone(name="test_vit").eval()
    image = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        features, padded = backbone(image), backbone(torch.nn.functional.pad(image, (0, 8, 0, 8)))
    for name, value in features.items():
        torch.testing.assert_close(value, padded[name][..., : value.shape[2], : value.shape[3]])


@pytest.mark.parametrize(
    "name, patch",
    [
        ("vit_small_patch14_dinov2", 14),
        ("vit_small_patch14_reg4_dinov2", 14),
        ("vit_small_patch16_dinov3", 16),
        ("eva02_small_patch14_224", 14),
    ],
)
def test_popular_vits(name, patch):
    """Shapes only, on the meta device, at an image size other than the one used in pretraining."""
    with torch.device("meta"):
        backbone = TimmBackbone(name=name)
        assert backbone.pyramid.patch == patch
        check_shapes(backbone(torch.zeros(1, 3, 96, 160)), backbone, (96, 160))


def test_weights_files_of_timm_and_of_the_features_only_model(tmp_path):
    source = timm.create_model("test_vit")
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    backbone = TimmBackbone(name="test_vit", pretrained=True, weights=str(tmp_path / "timm.pth"))
    assert torch.equal(backbone.body.model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    torch.save(backbone.body.state_dict(), tmp_path / "features.pth")
    again = TimmBackbone(name="test_vit", weights=str(tmp_path / "features.pth"))
    assert torch.equal(again.body.model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    with pytest.raises(UserError, match="features.pth: does not contain timm's weights of test_vit"):
        TimmBackbone(name="test_vit", pretrained=True, weights=str(tmp_path / "features.pth"))


def vit_config(*overrides):
    return load_config(
        "",
        [
            "MODEL.DEVICE",
            "cpu",
            "MODEL.BACKBONE.NAME",
            "TimmBackbone",
            "MODEL.BACKBONE.TIMM.NAME",
            "test_vit",
            *overrides,
        ],
    )


def trainable_names(backbone):
    return {name for name, p in backbone.named_parameters() if p.requires_grad}


def test_freeze_and_attention_only_always_train_the_pyramid():
    all_names = trainable_names(build_backbone(vit_config()))
    pyramid = {name for name in all_names if name.startswith("pyramid.")}
    assert pyramid and trainable_names(build_backbone(vit_config("MODEL.BACKBONE.FREEZE", True))) == pyramid
    attention = trainable_names(build_backbone(vit_config("MODEL.BACKBONE.ATTENTION_ONLY", True))) - pyramid
    assert attention == {name for name in all_names if ".attn." in name} and attention


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["MODEL.BACKBONE.FREEZE", True, "MODEL.BACKBONE.ATTENTION_ONLY", True], "exclude each other"),
        (
            ["MODEL.BACKBONE.ATTENTION_ONLY", True, "MODEL.BACKBONE.TIMM.NAME", "lcnet_050"],
            "TimmBackbone has no attention",
        ),
        (["MODEL.BACKBONE.FREEZE_AT", 2], "FREEZE_AT has no effect on TimmBackbone; use MODEL.BACKBONE.FREEZE"),
        (
            ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.BACKBONE.WEIGHTS", "x.pth"],
            "WEIGHTS has no effect on build_resnet_backbone; use MODEL.WEIGHTS",
        ),
    ],
)
def test_options_without_effect_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        build_backbone(vit_config(*overrides))


def test_the_pyramid_is_trained_at_the_full_learning_rate():
    cfg = vit_config("SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.BASE_LR", 1.0)
    model = torch.nn.ModuleDict({"backbone": build_backbone(cfg)})
    rates = {p: group["lr"] for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[parameter] == (1.0 if name.startswith("backbone.pyramid.") else 0.1)


def test_every_parameter_has_a_gradient():
    backbone = TimmBackbone(name="test_vit").train()
    sum(value.square().mean() for value in backbone(torch.randn(2, 3, 32, 40)).values()).backward()
    assert not [name for name, p in backbone.named_parameters() if p.grad is None]


def test_patches_of_14_beyond_the_image_are_not_computed():
    """46 pixels are 4 patches; the canvas of 64 would be 5. Inside the image nothing changes by the canvas."""
    backbone, seen = TimmBackbone(name="vit_small_patch14_dinov2").eval(), []
    backbone.body.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    image = torch.randn(1, 3, 46, 46)
    canvas = torch.nn.functional.pad(image, (0, 18, 0, 18))
    with torch.no_grad():
        alone, on_canvas = backbone(image), run_backbone(backbone, canvas, (46, 46))
        run_backbone(backbone, canvas, None)
    assert seen == [(56, 56), (56, 56), (70, 70)]
    check_shapes(on_canvas, backbone, (64, 64))
    for name, value in alone.items():
        torch.testing.assert_close(on_canvas[name][..., : value.shape[2], : value.shape[3]], value)


def test_patches_that_divide_the_canvas_see_all_of_it():
    image = torch.randn(1, 3, 64, 64)
    assert crop_to_patches(image, (40, 40), 16) is image
    assert crop_to_patches(image, (40, 50), 14).shape == (1, 3, 42, 56)
