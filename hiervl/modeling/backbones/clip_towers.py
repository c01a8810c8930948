"""open_clip's image towers, taken apart: maps for the pixel decoder, and dense embeddings in the text space.

A tower's call gives (maps, dense): `maps` a list of (B, C, h, w), `dense` (B, Dt, h, w) of unit length, each None
unless asked for. The last layers, which lead into the text space, are not trained: text does not move there either.
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
from .feature_pyramid import STRIDES, at_stride, pad_to_patches


class ViTTower(nn.Module):
    """A plain ViT: one map, the last block's, of stride `patch`."""

    dense_stride = 16

    def __init__(self, visual: VisionTransformer, drop_path: float = 0.0):
        super().__init__()
        self.patch, self.channels = visual.patch_size[0], [visual.conv1.out_channels]
        self.grid = visual.grid_size
        self.conv1, self.ln_pre = visual.conv1, visual.ln_pre
        self.class_embedding, self.positional_embedding = visual.class_embedding, visual.positional_embedding
        self.resblocks = visual.transformer.resblocks
        self.ln_post, self.proj = visual.ln_post.requires_grad_(False), visual.proj.requires_grad_(False)
        # Stochastic depth: whole blocks, the last at this rate, the first at 0.
        rates = torch.linspace(0, drop_path, len(self.resblocks), device="cpu").tolist()
        self.drops = nn.ModuleList(DropPath(rate) for rate in rates)

    def forward(self, image, maps=True, dense=False):
        size = image.shape[-2:]
        x = self.conv1(pad_to_patches(image, self.patch))  # (B, C, h, w)
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, h*w, C)
        x = torch.cat((self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        x = self.ln_pre(x + self.positions(grid).to(x.dtype))  # (B, 1 + h*w, C)
        for block, drop in zip(self.resblocks[:-1], self.drops):
            x = _run(block, drop, x)
        in_text_space = self._dense(x, grid, size) if dense else None
        return [_to_map(_run(self.resblocks[-1], self.drops[-1], x), grid)] if maps else None, in_text_space

    def positions(self, grid):
        """The position embedding (1 + h*w, C) for a grid (h, w) of patches; the tower's own at its own size."""
        if tuple(grid) == tuple(self.grid):
            return self.positional_embedding
        first, rest = self.positional_embedding[:1], self.positional_embedding[1:]
        rest = rest.t().unflatten(1, self.grid)[None]  # (1, C, gh, gw)
        rest = F.interpolate(rest.float(), size=grid, mode="bicubic", align_corners=False)
        return torch.cat((first, rest[0].flatten(1).t().to(first.dtype)))

    def _dense(self, x, grid, size):
        """MaskCLIP (arXiv 2112.01071): the last block with every token attending to itself alone."""
        block = self.resblocks[-1]
        attention, dim = block.attn, x.shape[2]
        value = F.linear(block.ln_1(x), attention.in_proj_weight[2 * dim :], attention.in_proj_bias[2 * dim :])
        x = x + block.ls_1(attention.out_proj(value))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        x = _to_map(self.ln_post(x) @ self.proj, grid)
        return F.normalize(at_stride(x, self.patch, self.dense_stride, size).float(), dim=1)


class ResNetTower(nn.Module):
    """CLIP's ResNets: four maps. Dense embeddings are the attention pooling's values, on res5's cells."""

    dense_stride = 32

    def __init__(self, visual: ModifiedResNet, drop_path: float = 0.0):
        super().__init__()
        if drop_path:
            raise UserError("MODEL.BACKBONE.CLIP.DROP_PATH: CLIP's ResNets have no stochastic depth; set it to 0.")
        pool, visual.attnpool = visual.attnpool, None
        self.body = visual
        self.channels = [
            width * visual.layer1[0].expansion for width in (stage[0].conv1.out_channels for stage in self._stages())
        ]
        self.v_proj, self.c_proj = pool.v_proj.requires_grad_(False), pool.c_proj.requires_grad_(False)

    def _stages(self):
        return (self.body.layer1, self.body.layer2, self.body.layer3, self.body.layer4)

    def forward(self, image, maps=True, dense=False):
        return _run_stages(self, self.body.stem, self._stages(), image, maps, dense)

    def in_text_space(self, x):
        """(B, h, w, C) -> (B, h, w, Dt)."""
        return self.c_proj(self.v_proj(x))


class ConvNeXtTower(nn.Module):
    """CLIP's ConvNeXts: four maps. Dense embeddings are the head's, without its pooling, on res5's cells."""

    dense_stride = 32

    def __init__(self, visual: TimmModel, drop_path: float = 0.0):
        super().__init__()
        trunk = visual.trunk
        self.stem, self.stages = trunk.stem, trunk.stages
        self.norm, self.head = trunk.head.norm.requires_grad_(False), visual.head.requires_grad_(False)
        self.channels = [info["num_chs"] for info in trunk.feature_info]
        blocks = [block for stage in self.stages for block in stage.blocks]
        for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks), device="cpu").tolist()):
            block.drop_path = DropPath(rate)  # in place of what open_clip's config says

    def forward(self, image, maps=True, dense=False):
        return _run_stages(self, self.stem, self.stages, image, maps, dense)

    def in_text_space(self, x):
        """(B, h, w, C) -> (B, h, w, Dt)."""
        return self.head(self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def build_tower(visual: nn.Module, name: str, drop_path: float) -> nn.Module:
    """The tower for open_clip's `visual`, trainable up to the layers that lead into the text space.

    Raises:
        UserError: an architecture that has no tower here.
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
        f"MODEL.BACKBONE.CLIP.MODEL: the image tower of {name} ({kind}) cannot be used; CLIP's plain ViTs, "
        "ResNets and ConvNeXts can."
    )


def _run(block, drop, x):
    return x + drop(block(x) - x) if drop.training and drop.drop_prob else block(x)


def _to_map(tokens, grid):
    """(B, 1 + h*w, C) -> (B, C, h, w), without the class token."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)


def _run_stages(tower, stem, stages, image, maps, dense):
    """The call of a convolutional tower: padded to whole cells of stride 32, which are cut off again."""
    size, results = image.shape[-2:], []
    x = stem(pad_to_patches(image, 32))
    for stage, stride in zip(stages, STRIDES.values()):
        x = stage(x)
        results.append(at_stride(x, stride, stride, size))
    in_text_space = None
    if dense:
        embedded = tower.in_text_space(results[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        in_text_space = F.normalize(embedded.float(), dim=1)
    return results if maps else None, in_text_space
