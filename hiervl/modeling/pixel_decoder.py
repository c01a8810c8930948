"""Pixel decoder: multi-scale deformable attention over res3..res5, then one FPN step to stride 4.

Follows Mask2Former (arXiv 2112.01527, section 3.2.2) and uses the same state-dict names.

Input: the backbone's res2..res5. Output: the memory F1, F2, F3 at strides 32, 16, 8, each (B, conv_dim, h, w), and the
mask features M (B, mask_dim, H/4, W/4).
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from torch import nn

from .layers import Attention, run_layer
from ..ops import MSDeformAttn
from .position import sine_position

_LEVELS = ("res5", "res4", "res3")  # coarse to fine, the order in which the decoder visits them


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each followed by layer normalization.

    With `text_dim` > 0, pixels also cross-attend to the names of the selected classes. The result is added through a
    per-channel gate that starts near zero, so that training starts close to the pixel decoder without text.
    """

    def __init__(
        self, dim: int, feedforward_dim: int, num_levels: int, num_heads: int, num_points: int, text_dim: int = 0
    ):
        super().__init__()
        self.self_attn = MSDeformAttn(dim, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        if text_dim:
            self.text_proj, self.text_attn = nn.Linear(text_dim, dim), Attention(dim, num_heads)
            self.text_gate = nn.Parameter(torch.full((dim,), 0.01))

    def forward(self, x, position, reference, shapes, starts, text=None):
        """
        Args:
            x: (B, S, C), the tokens of all levels.
            position: (1, S, C), position embeddings.
            reference: (1, S, L, 2), reference points (x, y) in [0, 1] for each of the L levels.
            shapes: (height, width) of each level.
            starts: index of each level's first token.
            text: (B, K', Dt), text embeddings of the selected classes, or None.
        Returns:
            (B, S, C).
        """
        x = self.norm1(x + self.self_attn(x + position, reference, x, shapes, starts))
        if text is not None:
            names = self.text_proj(text)
            x = x + self.text_gate * self.text_attn(x, names, names)
        hidden = self.linear1(x)
        # In place saves a pass over memory at inference. In training it would cost five, as `hidden` is a view.
        return self.norm2(x + self.linear2(F.relu(hidden, inplace=not hidden.requires_grad)))


class Encoder(nn.Module):
    """A stack of encoder layers; a module of its own only to match Mask2Former's state-dict names."""

    def __init__(self, num_layers: int, *layer_args):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(*layer_args) for _ in range(num_layers))


class Transformer(nn.Module):
    """The encoder and its level embeddings, named as in Mask2Former's checkpoints.

    With `recompute`, the activations of its layers are computed again in the backward pass.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        feedforward_dim: int,
        num_heads: int,
        num_points: int,
        text_dim: int,
        recompute: bool,
    ):
        super().__init__()
        self.recompute = recompute
        self.level_embed = nn.Parameter(torch.randn(len(_LEVELS), dim))
        self.encoder = Encoder(num_layers, dim, feedforward_dim, len(_LEVELS), num_heads, num_points, text_dim)
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for layer in self.encoder.layers:
            layer.self_attn.reset_parameters()

    def forward(self, levels, text=None):
        """
        Args:
            levels: list of (B, C, h, w), coarse to fine.
            text: (B, K', Dt), text embeddings of the selected classes, or None.
        Returns:
            list of (B, C, h, w), the encoded levels in the same order.
        """
        shapes = [(x.shape[2], x.shape[3]) for x in levels]
        sizes = [h * w for h, w in shapes]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (B, S, C)
        position = torch.cat(
            [
                sine_position(h, w, x.shape[2], x.device).flatten(1).t() + embed
                for (h, w), embed in zip(shapes, self.level_embed)
            ]
        )[None]  # (1, S, C)
        reference = _reference_points(shapes, x.device)
        for layer in self.encoder.layers:
            x = run_layer(layer, x, position, reference, shapes, starts, text, recompute=self.recompute)
        # (B, S, C) -> (B, C, h, w) per level. The result is already channels-last in memory, even for a single image,
        # so the convolutions that follow need no copy.
        return [part.unflatten(1, shape).permute(0, 3, 1, 2) for part, shape in zip(x.split(sizes, dim=1), shapes)]


class PixelDecoder(nn.Module):
    """Multi-scale deformable attention pixel decoder; see the module docstring."""

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        conv_dim: int,
        mask_dim: int,
        num_layers: int,
        num_heads: int,
        num_points: int,
        feedforward_dim: int,
        text_dim: int = 0,
        recompute: bool = False,
    ):
        """
        Args:
            input_shape: the backbone's `output_shape()`.
            conv_dim: channels of the memory F1..F3.
            mask_dim: channels of the mask features M.
            num_layers, num_heads, num_points, feedforward_dim: settings of the deformable encoder.
            text_dim: width of the text embeddings that the encoder layers attend to; 0 for an encoder without text.
            recompute: compute the encoder's activations again in the backward pass instead of keeping them.
        """
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(input_shape[name].channels, conv_dim, 1), nn.GroupNorm(32, conv_dim))
            for name in _LEVELS
        )
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        self.transformer = Transformer(
            num_layers, conv_dim, feedforward_dim, num_heads, num_points, text_dim, recompute
        )
        self.text_aware = text_dim > 0
        self.adapter_1 = Conv2d(input_shape["res2"].channels, conv_dim, 1, bias=False, norm=nn.GroupNorm(32, conv_dim))
        self.layer_1 = Conv2d(
            conv_dim, conv_dim, 3, padding=1, bias=False, norm=nn.GroupNorm(32, conv_dim), activation=F.relu
        )
        self.mask_features = nn.Conv2d(conv_dim, mask_dim, 1)
        for conv in (self.adapter_1, self.layer_1, self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    @classmethod
    def from_config(cls, cfg, input_shape, text_dim=0):
        options = cfg.MODEL.PIXEL_DECODER
        return {
            "input_shape": input_shape,
            "conv_dim": options.CONV_DIM,
            "mask_dim": options.MASK_DIM,
            "num_layers": options.ENC_LAYERS,
            "num_heads": options.NUM_HEADS,
            "num_points": options.NUM_POINTS,
            "feedforward_dim": options.FEEDFORWARD_DIM,
            "text_dim": text_dim if options.TEXT_AWARE else 0,
            "recompute": "pixel_decoder" in cfg.SOLVER.ACTIVATION_CHECKPOINTING,
        }

    def forward(self, features, text=None):
        """
        Args:
            features: dict of res2..res5, each (B, C, h, w).
            text: (B, K', Dt), text embeddings of the selected classes; ignored unless the decoder is text-aware.
        Returns:
            (memory [F1, F2, F3], each (B, conv_dim, h, w); mask features M (B, mask_dim, H/4, W/4)).
        """
        memory = self.transformer(
            [project(features[name]) for project, name in zip(self.input_proj, _LEVELS)],
            text if self.text_aware else None,
        )
        lateral = self.adapter_1(features["res2"])
        top_down = F.interpolate(memory[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return memory, self.mask_features(self.layer_1(lateral + top_down))


def _reference_points(shapes, device):
    """Center of every token as (x, y) in [0, 1], repeated for each of the L levels: (1, S, L, 2)."""
    points = []
    for h, w in shapes:
        y = (torch.arange(h, device=device) + 0.5) / h
        x = (torch.arange(w, device=device) + 0.5) / w
        points.append(torch.cartesian_prod(y, x).flip(1))  # (h*w, 2) as (x, y)
    return torch.cat(points)[None, :, None, :].expand(-1, -1, len(shapes), -1)
