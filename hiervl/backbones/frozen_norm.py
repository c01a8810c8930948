"""Convolutions with a frozen batch norm behind them, computed as one convolution.

A frozen norm is a fixed scale and shift per channel. Scaling the filters instead of the feature map gives the same
numbers and the same gradients, and saves two passes over every feature map (forward and backward): on a CPU, where
these layers wait for memory, about a third of MobileNetV2's time (docs/DECISIONS.md).
"""
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from torch import nn


class FrozenNormConv2d(nn.Conv2d):
    """The convolution `conv` followed by the norm `norm` with frozen statistics, scale and shift."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                         conv.dilation, conv.groups, bias=False)
        self.weight = conv.weight
        scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", norm.bias.detach() - norm.running_mean * scale)

    def forward(self, x):
        weight = self.weight * self.scale[:, None, None, None]  # (out, in/groups, kh, kw)
        return F.conv2d(x, weight, self.shift, self.stride, self.padding, self.dilation, self.groups)


def freeze_norms(module: nn.Module) -> nn.Module:
    """Freeze every batch norm: those directly behind a convolution in an nn.Sequential are folded into it, the
    others become detectron2's FrozenBatchNorm2d. Returns the module to use."""
    return FrozenBatchNorm2d.convert_frozen_batchnorm(_fold(module))


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
