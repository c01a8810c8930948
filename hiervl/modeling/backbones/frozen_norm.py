"""A convolution followed by a frozen batch norm, computed as a single convolution.

A frozen norm is a fixed scale and shift per channel. Scaling the filters instead of the feature map gives the same
outputs and gradients, and saves two passes over every feature map (one forward, one backward). On a CPU, where these
layers are bound by memory bandwidth, this saves about a third of MobileNetV2's time (docs/DECISIONS.md).
"""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn


class FrozenNormConv2d(nn.Conv2d):
    """The convolution `conv` followed by the norm `norm`, whose statistics, weight and bias are frozen."""

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
    """Detectron2's convolution with a frozen norm.

    The norm keeps its tensors, so that the state-dict names match those of Detectron2's and Mask2Former's checkpoints.
    Scale and shift are computed from them in every call.
    """

    def forward(self, x):
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        x = _scaled_conv(self, x, scale, self.norm.bias - self.norm.running_mean * scale)
        return x if self.activation is None else self.activation(x)


def _scaled_conv(conv: nn.Conv2d, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """conv(x) * scale + shift, with the filters scaled instead of the output. scale, shift: (out,)."""
    weight = conv.weight * scale[:, None, None, None]  # (out, in/groups, kh, kw)
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def freeze_norms(module: nn.Module) -> nn.Module:
    """Freeze every batch norm in `module`, which is modified, and return the module to use.

    A norm directly after a convolution (in an nn.Sequential, or as the `norm` of a Detectron2 Conv2d) is computed
    together with it; any other becomes Detectron2's FrozenBatchNorm2d.
    """
    module = FrozenBatchNorm2d.convert_frozen_batchnorm(_fold(module))
    for conv in module.modules():
        if type(conv) is Conv2d and conv.bias is None and isinstance(conv.norm, FrozenBatchNorm2d):
            conv.__class__ = NamedFrozenNormConv2d  # same parameters, different forward
    return module


def _fold(module):
    """Replace each convolution that a batch norm follows in an nn.Sequential by one that includes the norm."""
    for child in module.children():
        _fold(child)
    if isinstance(module, nn.Sequential):
        layers = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in zip(layers, layers[1:]):
            if type(conv) is nn.Conv2d and conv.bias is None and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, FrozenNormConv2d(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return module
