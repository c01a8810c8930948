"""open_clip's image towers, rebuilt to return feature maps and dense embeddings in the text space.

Calling a tower returns (maps, dense): `maps` is a list of (B, C, h, w), `dense` is (B, Dt, h, w) of unit length, and
each is None unless requested. The last layers, which project into the text space, are frozen, because the text tower
that defines this space is frozen too.
"""

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers import DropPath
from timm.models.convnext import ConvNeXt
from torch import nn

from ...errors import UserError
from ...utils.padding import pad_to_multiple
from ..layers import run_layer
from .feature_pyramid import STRIDES, at_stride, crop_to_patches


class ViTTower(nn.Module):
    """CLIP's plain ViTs: a single map, from the last block, with the patch size as its stride."""

    dense_stride = 16

    def __init__(self, visual: VisionTransformer, drop_path: float = 0.0):
        super().__init__()
        self.patch, self.channels = visual.patch_size[0], [visual.conv1.out_channels]
        self.grid = visual.grid_size
        self.conv1, self.ln_pre = visual.conv1, visual.ln_pre
        self.class_embedding, self.positional_embedding = visual.class_embedding, visual.positional_embedding
        self.resblocks = visual.transformer.resblocks
        self.ln_post, self.proj = visual.ln_post.requires_grad_(False), visual.proj.requires_grad_(False)
        # Stochastic depth drops whole blocks, at rates that increase linearly from 0 to `drop_path`.
        rates = torch.linspace(0, drop_path, len(self.resblocks), device="cpu").tolist()
        self.drops = nn.ModuleList(DropPath(rate) for rate in rates)
        self.recompute = False  # the blocks' activations, in the backward pass

    def forward(self, image, maps=True, dense=False, size=None):
        """image (B, 3, H, W) -> (maps, dense); see the module docstring. For `size` see crop_to_patches."""
        canvas = image.shape[-2:]
        x = self.conv1(crop_to_patches(image, size, self.patch))  # (B, C, h, w)
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, h*w, C)
        x = torch.cat((self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        x = self.ln_pre(x + self.positions(grid).to(x.dtype))  # (B, 1 + h*w, C)
        for block, drop in zip(self.resblocks[:-1], self.drops):
            x = _run(block, drop, x, self.recompute)
        dense_embeddings = self._dense(x, grid, canvas) if dense else None
        feature_maps = [_to_map(_run(self.resblocks[-1], self.drops[-1], x, self.recompute), grid)] if maps else None
        return feature_maps, dense_embeddings

    def positions(self, grid):
        """Position embedding (1 + h*w, C) for a grid (h, w) of patches: the original one at the tower's native size,
        bicubically resized otherwise."""
        if tuple(grid) == tuple(self.grid):
            return self.positional_embedding
        class_position, patch_positions = self.positional_embedding[:1], self.positional_embedding[1:]
        resized = patch_positions.t().unflatten(1, self.grid)[None]  # (gh*gw, C) -> (1, C, gh, gw)
        resized = F.interpolate(resized.float(), size=grid, mode="bicubic", align_corners=False)
        return torch.cat((class_position, resized[0].flatten(1).t().to(class_position.dtype)))

    def _dense(self, x, grid, size):
        """Dense embeddings from the tokens (B, 1 + h*w, C) before the last block: (B, Dt, H/16, W/16).

        As in MaskCLIP (arXiv 2112.01071), every token attends only to itself in the last block.
        """
        block = self.resblocks[-1]
        attention, dim = block.attn, x.shape[2]
        value = F.linear(block.ln_1(x), attention.in_proj_weight[2 * dim :], attention.in_proj_bias[2 * dim :])
        x = x + block.ls_1(attention.out_proj(value))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        x = _to_map(self.ln_post(x) @ self.proj, grid)
        return F.normalize(at_stride(x, self.patch, self.dense_stride, size).float(), dim=1)


class ResNetTower(nn.Module):
    """CLIP's ResNets: four maps. Dense embeddings are the values of the attention pooling at each position of res5."""

    dense_stride = 32

    def __init__(self, visual: ModifiedResNet, drop_path: float = 0.0):
        super().__init__()
        if drop_path:
            raise UserError("MODEL.BACKBONE.CLIP.DROP_PATH: CLIP's ResNets have no stochastic depth; set it to 0.")
        pool, visual.attnpool = visual.attnpool, None
        self.body = visual
        expansion = visual.layer1[0].expansion
        self.channels = [stage[0].conv1.out_channels * expansion for stage in self._stages()]
        self.v_proj, self.c_proj = pool.v_proj.requires_grad_(False), pool.c_proj.requires_grad_(False)

    def _stages(self):
        return (self.body.layer1, self.body.layer2, self.body.layer3, self.body.layer4)

    def forward(self, image, maps=True, dense=False):
        return _run_stages(self, self.body.stem, self._stages(), image, maps, dense)

    def project_to_text_space(self, x):
        """Project res5 features into the text space: (B, h, w, C) -> (B, h, w, Dt)."""
        return self.c_proj(self.v_proj(x))


class ConvNeXtTower(nn.Module):
    """CLIP's ConvNeXts: four maps. Dense embeddings come from the head, applied to every position of res5 instead of to
    their mean."""

    dense_stride = 32

    def __init__(self, visual: TimmModel, drop_path: float = 0.0):
        super().__init__()
        trunk = visual.trunk
        self.stem, self.stages = trunk.stem, trunk.stages
        self.norm, self.head = trunk.head.norm.requires_grad_(False), visual.head.requires_grad_(False)
        self.channels = [info["num_chs"] for info in trunk.feature_info]
        blocks = [block for stage in self.stages for block in stage.blocks]
        for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks), device="cpu").tolist()):
            block.drop_path = DropPath(rate)  # replaces the rate in open_clip's config

    def forward(self, image, maps=True, dense=False):
        return _run_stages(self, self.stem, self.stages, image, maps, dense)

    def project_to_text_space(self, x):
        """Project res5 features into the text space: (B, h, w, C) -> (B, h, w, Dt)."""
        return self.head(self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def build_tower(visual: nn.Module, name: str, drop_path: float) -> nn.Module:
    """The tower for open_clip's `visual`, trainable except for the layers that project into the text space.

    Args:
        visual: open_clip's image tower.
        name: the model's name, for error messages.
        drop_path: stochastic depth rate of the last block.
    Raises:
        UserError: an unsupported architecture.
    """
    visual.requires_grad_(True)
    if isinstance(visual, ModifiedResNet):
        return ResNetTower(visual, drop_path)
    if isinstance(visual, TimmModel) and isinstance(visual.trunk, ConvNeXt):
        return ConvNeXtTower(visual, drop_path)
    if (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock)
    ):
        return ViTTower(visual, drop_path)
    kind = type(getattr(visual, "trunk", visual)).__name__
    raise UserError(
        f"MODEL.BACKBONE.CLIP.MODEL: the image tower of {name} ({kind}) is not supported; use one of CLIP's plain "
        "ViTs, ResNets or ConvNeXts."
    )


def _run(block, drop, x, recompute):
    """Apply a residual block to (B, S, C), with stochastic depth in training; for `recompute` see run_layer."""
    result = run_layer(block, x, recompute=recompute)
    if drop.training and drop.drop_prob:
        return x + drop(result - x)
    return result


def _to_map(tokens, grid):
    """Tokens (B, 1 + h*w, C) -> map (B, C, h, w), without the class token."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)


def _run_stages(tower, stem, stages, image, maps, dense):
    """Run a convolutional tower on an image padded to a multiple of 32, and crop the padding from its maps."""
    size, feature_maps = image.shape[-2:], []
    x = stem(pad_to_multiple(image, 32))
    for stage, stride in zip(stages, STRIDES.values()):
        x = stage(x)
        feature_maps.append(at_stride(x, stride, stride, size))
    dense_embeddings = None
    if dense:
        # (B, C, h, w) -> (B, h, w, C) -> (B, h, w, Dt) -> (B, Dt, h, w)
        embeddings = tower.project_to_text_space(feature_maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        dense_embeddings = F.normalize(embeddings.float(), dim=1)
    return feature_maps if maps else None, dense_embeddings
