"""Convolutions with a frozen batch norm behind them, computed as one convolution.

A frozen norm is a fixed scale and shift per channel. Scaling the filters instead of the feature map gives the same
numbers and the same gradients, and saves two passes over every feature map (forward and backward): on a CPU, where
these layers wait for memory, about a third of MobileNetV2's time (docs/DECISIONS.md).
"""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn


class FrozenNormConv2d(nn.Conv2d):
    """The convolution `conv` followed by the norm `norm` with frozen statistics, scale and shift."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=False,
        )
        self.weight = conv.weight
        scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", norm.bias.detach() - norm.running_mean * scale)

    def forward(self, x):
        return _scaled_conv(self, x, self.scale, self.shift)


class NamedFrozenNormConv2d(Conv2d):
    """Detectron2's convolution with a frozen norm. The norm keeps its own tensors, under the names by which
    detectron2's and Mask2Former's checkpoints know them; they become scale and shift in every call."""

    def forward(self, x):
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        x = _scaled_conv(self, x, scale, self.norm.bias - self.norm.running_mean * scale)
        return x if self.activation is None else self.activation(x)


def _scaled_conv(conv: nn.Conv2d, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """conv(x) * scale + shift, with the scale moved into the filters."""
    weight = conv.weight * scale[:, None, None, None]  # (out, in/groups, kh, kw)
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def freeze_norms(module: nn.Module) -> nn.Module:
    """Freeze every batch norm: those directly behind a convolution (in an nn.Sequential, or as the norm of one of
    detectron2's) are computed with it, the others become detectron2's FrozenBatchNorm2d. Returns the module to use."""
    module = FrozenBatchNorm2d.convert_frozen_batchnorm(_fold(module))
    for conv in module.modules():
        if type(conv) is Conv2d and conv.bias is None and isinstance(conv.norm, FrozenBatchNorm2d):
            conv.__class__ = NamedFrozenNormConv2d  # the same parameters, another forward
    return module


def _fold(module):
    for child in module.children():
        _fold(child)
    if isinstance(module, nn.Sequential):
        layers = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in zip(layers, layers[1:]):
            if type(conv) is nn.Conv2d and conv.bias is None and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, FrozenNormConv2d(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return module
