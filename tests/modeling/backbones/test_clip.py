"""CLIP's image towers as backbones, tested on tiny towers with random weights."""

import json
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hiervl.modeling.backbones import CLIPBackbone, build_backbone
from hiervl.modeling.backbones.feature_pyramid import STRIDES
from hiervl.modeling.backbones.frozen_norm import freeze_norms
from hiervl.config import load_config
from hiervl.errors import UserError
from hiervl.modeling.pixel_decoder import PixelDecoder
from hiervl.losses.regularizers import REGULARIZERS, Regularizers
from tests.networks import DIM, activations_and_gradients, make_network, pseudo_input, training_input

EMBED = 24
TOWERS = {
    "vit16": {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "vit14": {"image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "scaled": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "ls_init_value": 0.5},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
    "convnext": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"},
    "convnext_mlp": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"},
}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1}
SIZES = [(64, 96), (45, 71), (64, 65)]


def make_visual(name):
    torch.manual_seed(0)
    visual = open_clip.model.CLIP(embed_dim=EMBED, vision_cfg=dict(TOWERS[name]), text_cfg=TEXT).visual.eval()
    return visual.requires_grad_(False)  # as load_clip returns it


def make_backbone(name, **options):
    return freeze_norms(CLIPBackbone(make_visual(name), **options)).eval()


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("size", SIZES)
def test_shapes_and_odd_sizes(name, size):
    backbone, image = make_backbone(name), torch.randn(2, 3, *size)
    with torch.no_grad():
        features, dense = backbone(image), backbone.dense_text_features(image)
        maps, maps_and_dense = backbone.tower(image)[0], backbone.tower(image, dense=True)
    for level, spec in backbone.output_shape().items():
        assert spec.stride == STRIDES[level]
        assert features[level].shape == (2, spec.channels, *(-(-side // spec.stride) for side in size))
    assert dense.shape == (2, EMBED, *(-(-side // backbone.dense_stride) for side in size))
    torch.testing.assert_close(dense.norm(dim=1), torch.ones(len(dense), *dense.shape[2:]))
    assert torch.equal(dense, maps_and_dense[1])  # the same with and without the maps
    assert all(torch.equal(a, b) for a, b in zip(maps, maps_and_dense[0]))


@pytest.mark.parametrize("name", ["vit16", "vit14", "scaled"])
def test_a_vit_at_its_native_size_equals_open_clips(name):
    visual, backbone = make_visual(name), make_backbone(name)
    image = torch.randn(2, 3, *visual.image_size)
    with torch.no_grad():
        expected = visual.forward_intermediates(image, indices=1)["image_intermediates"][0]
        (actual,), _ = backbone.tower(image)
    torch.testing.assert_close(actual, expected)


def test_the_position_embedding_is_unchanged_at_the_native_size_and_bicubic_at_others():
    tower = make_backbone("vit16").tower
    assert tower.positions((4, 4)) is tower.positional_embedding
    wide = tower.positions((4, 8))
    assert wide.shape == (33, 32) and torch.equal(wide[0], tower.positional_embedding[0])
    with torch.no_grad():  # a linear ramp stays about linear; PyTorch's bicubic kernel does not preserve it exactly
        ramp = torch.arange(4.0)[:, None] + 10 * torch.arange(4.0)
        tower.positional_embedding[1:] = ramp.flatten()[:, None]
        middle = tower.positions((4, 8))[1:].unflatten(0, (4, 8))[:, 3:5, 0]
    expected = torch.arange(4.0)[:, None] + 10 * torch.tensor([1.25, 1.75])
    torch.testing.assert_close(middle, expected, atol=0.6, rtol=0)


@pytest.mark.parametrize("name", ["vit16", "scaled"])
def test_dense_features_are_the_last_block_with_an_identity_attention_map(name):
    visual, backbone = make_visual(name), make_backbone(name)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x = visual._embeds(image)
        for block in visual.transformer.resblocks[:-1]:
            x = block(x)
        identity_mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).fill_diagonal_(0)
        x = visual.ln_post(visual.transformer.resblocks[-1](x, attn_mask=identity_mask)) @ visual.proj
        expected = F.normalize(x[:, 1:].transpose(1, 2).unflatten(2, (4, 4)), dim=1)
        torch.testing.assert_close(backbone.dense_text_features(image), expected)


def test_dense_features_of_a_resnet_equal_its_attention_pooling_over_one_cell():
    """Attention pooling over a single cell, without the mean token, reduces to the value path."""
    visual, backbone = make_visual("resnet"), CLIPBackbone(make_visual("resnet")).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(image)))))[..., 0, 0]
        expected = F.normalize(visual.attnpool.c_proj(visual.attnpool.v_proj(x)), dim=1)
        torch.testing.assert_close(backbone.dense_text_features(image)[..., 0, 0], expected)


def test_dense_features_of_a_convnext_equal_its_output_for_one_cell():
    visual, backbone = make_visual("convnext"), CLIPBackbone(make_visual("convnext")).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone.dense_text_features(image)[..., 0, 0], F.normalize(visual(image), dim=1))


@pytest.mark.parametrize("name", TOWERS)
def test_all_parameters_have_gradients_except_the_frozen_text_projection(name):
    backbone = make_backbone(name).train()
    sum(value.square().mean() for value in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    trained = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained and not [n for n, p in trained.items() if p.grad is None]
    frozen = {n.split(".")[1] for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"vit": {"ln_post", "proj"}, "res": {"v_proj", "c_proj"}, "con": {"norm", "head"}}.get(
        name[:3], {"ln_post", "proj"}
    )


def test_dense_features_pass_gradients_to_the_tower():
    backbone = make_backbone("vit16").train()
    backbone.dense_text_features(torch.randn(1, 3, 64, 64))[:, 0].sum().backward()
    attention = backbone.tower.resblocks[-1].attn.in_proj_weight.grad
    assert attention[:64].abs().max() == 0 and attention[64:].abs().max() > 0  # values only, not queries and keys
    assert backbone.tower.conv1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["vit16", "resnet", "convnext"])
def test_the_guidances_copy_of_the_initial_tower_never_changes(name):
    backbone = make_backbone(name, drop_path=0.0 if name == "resnet" else 0.9).train()
    initial = Regularizers(backbone, weights={"guidance": 0.1}, boundary_weight=1.0, boundary_width=2).initial
    frozen, image = initial.dense_text_features, torch.randn(2, 3, 64, 64)
    before = frozen(image)
    backbone.eval()
    with torch.no_grad():
        assert torch.equal(before, backbone.dense_text_features(image))
    assert not any(p.requires_grad for p in initial.parameters()) and not before.requires_grad
    backbone.train()
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    sum(value.square().mean() for value in backbone(image).values()).backward()
    optimizer.step()
    backbone.eval()
    assert torch.equal(frozen(image), before)
    assert not torch.allclose(backbone.dense_text_features(image), before)


@pytest.mark.parametrize("name", ["vit16", "convnext"])
def test_drop_path_is_active_in_training_only(name):
    torch.manual_seed(0)
    backbone, image = make_backbone(name, drop_path=0.9), torch.randn(1, 3, 64, 64)
    plain = make_backbone(name)
    with torch.no_grad():
        expected = plain(image)
        assert all(torch.equal(value, expected[level]) for level, value in backbone(image).items())
        backbone.train()
        outputs = [backbone(image)["res5"] for _ in range(8)]
    assert any(not torch.allclose(output, outputs[0]) for output in outputs)
    with pytest.raises(UserError, match="CLIP's ResNets have no stochastic depth"):
        make_backbone("resnet", drop_path=0.1)


@pytest.fixture
def folder(tmp_path):
    """A model folder with config and weights, as open_clip reads it."""
    config = {"embed_dim": EMBED, "vision_cfg": TOWERS["vit16"], "text_cfg": TEXT}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(open_clip.model.CLIP(**config).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    return tmp_path


def config(folder, *overrides):
    return load_config(
        "",
        [
            "MODEL.DEVICE",
            "cpu",
            "MODEL.BACKBONE.NAME",
            "CLIPBackbone",
            "MODEL.BACKBONE.CLIP.MODEL",
            f"local-dir:{folder}",
            *overrides,
        ],
    )


def test_building_from_the_config(folder, caplog):
    backbone = build_backbone(config(folder))
    assert "PIXEL_MEAN is [123.675, 116.28, 103.53], but the tower was trained with [122.771, 116.746" in caplog.text
    caplog.clear()
    build_backbone(
        config(folder, "MODEL.PIXEL_MEAN", [122.771, 116.746, 104.094], "MODEL.PIXEL_STD", [68.501, 66.632, 70.323])
    )
    assert "trained with" not in caplog.text
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    assert torch.equal(backbone.tower.conv1.weight, state["visual.conv1.weight"])
    assert backbone.tower.conv1.weight.requires_grad
    with pytest.raises(UserError, match="WEIGHTS has no effect on CLIPBackbone; use MODEL.BACKBONE.CLIP.PRETRAINED"):
        build_backbone(config(folder, "MODEL.BACKBONE.WEIGHTS", "x.pth"))
    with pytest.raises(UserError, match="MODEL.BACKBONE.CLIP.MODEL: open_clip has no model 'ViT'"):
        build_backbone(config(folder, "MODEL.BACKBONE.CLIP.MODEL", "ViT"))


def test_attention_only_and_freeze(folder):
    def trainable_names(*overrides):
        return {n for n, p in build_backbone(config(folder, *overrides)).named_parameters() if p.requires_grad}

    pyramid = {name for name in trainable_names() if name.startswith("pyramid.")}
    assert trainable_names("MODEL.BACKBONE.FREEZE", True) == pyramid
    assert trainable_names("MODEL.BACKBONE.ATTENTION_ONLY", True) - pyramid == {
        f"tower.resblocks.{i}.attn.{part}"
        for i in range(3)
        for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit16", "vit14", "resnet", "convnext"])
def test_autocast(name, dtype):
    backbone, image = make_backbone(name), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        full = backbone.dense_text_features(image)
        with torch.autocast("cpu", dtype):
            features, dense = backbone(image), backbone.dense_text_features(image)
    assert all(torch.isfinite(value).all() for value in features.values())
    assert dense.dtype == torch.float32 and (dense - full).abs().max() < 0.05


@pytest.mark.parametrize("name", ["vit14", "resnet"])
def test_the_network_trains_and_predicts_with_a_clip_backbone(name):
    backbone = CLIPBackbone(make_visual(name))
    pixel_decoder = PixelDecoder(
        backbone.output_shape(), conv_dim=DIM, mask_dim=DIM, num_layers=1, num_heads=4, num_points=2, feedforward_dim=32
    )
    network = make_network(backbone=backbone, pixel_decoder=pixel_decoder)
    losses = network.train()([training_input(size=64)])["labeled"]
    sum(losses.values()).backward()
    assert not [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    image = torch.randint(0, 256, (3, 45, 71), dtype=torch.uint8)
    assert torch.isfinite(network.eval()([{"image": image}])[0]["sem_seg"]).all()


def test_guidance_trains_the_similarity_and_fades_out_with_training():
    torch.manual_seed(0)
    network = make_network(
        backbone=CLIPBackbone(make_visual("vit16")),
        embeddings=torch.randn(4, EMBED),
        kind="hiervl",
        weights={"guidance": 1.0},
    ).train()
    inputs = [pseudo_input(teacher=True)]
    torch.manual_seed(1)
    loss = network(inputs)["pseudo"]["loss_guidance"]
    loss.backward()
    assert loss > 0 and (network.alignment.scales[2].pixel.weight.grad != 0).any()
    assert all(p.grad is None for p in network.regularizers.initial.parameters())
    network.regularizers.progress = 1.0
    assert network(inputs)["pseudo"]["loss_guidance"] == 0


def test_an_image_with_only_distractors_selected_gets_no_guidance():
    torch.manual_seed(0)
    network = make_network(
        backbone=CLIPBackbone(make_visual("vit16")),
        embeddings=torch.randn(4, EMBED),
        kind="hiervl",
        weights={"guidance": 1.0},
    ).train()
    context = SimpleNamespace(
        images=torch.rand(1, 3, 32, 32),
        selected=SimpleNamespace(index=torch.tensor([[4, 5]])),
        aligned=SimpleNamespace(similarity=torch.rand(1, 2, 8, 8, requires_grad=True)),
        anchors=network.text.anchors(),
        num_classes=4,
        similarity_temperature=network.alignment.score_temperature(),
    )
    loss = REGULARIZERS["guidance"][0](context, network.regularizers)
    loss.backward()
    assert loss == 0 and (context.aligned.similarity.grad == 0).all()


def test_unsupported_towers_are_refused():
    with pytest.raises(UserError, match="the image tower of mine .VisionTransformer. is not supported"):
        pooled = {**TOWERS["vit16"], "attentional_pool": True}
        CLIPBackbone(open_clip.model.CLIP(EMBED, pooled, TEXT).visual, name="mine")
    with pytest.raises(UserError, match=r"\(Linear\) is not supported"):
        CLIPBackbone(nn.Linear(1, 1))


def test_checkpointing_activations_of_a_vit_keeps_fewer_and_changes_no_gradient():
    backbone, image = make_backbone("vit16"), torch.randn(2, 3, 64, 64)
    kept, expected = activations_and_gradients(backbone, image)
    backbone.checkpoint_activations()
    kept_less, gradients = activations_and_gradients(backbone, image)
    assert kept_less < 0.8 * kept and len(expected) > 10
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_towers_without_blocks_cannot_checkpoint_activations(name):
    with pytest.raises(UserError, match="SOLVER.ACTIVATION_CHECKPOINTING: of CLIP's image towers only ViTs"):
        make_backbone(name).checkpoint_activations()
