"""Simple feature pyramid (ViTDet, arXiv 2203.16527, section 3): strides 4 to 32 from a plain ViT's last map.

Padding. A ViT's image is padded at the right and at the bottom with zeros, the mean color, to whole patches. No
output shows it: maps have ceil(H / stride) x ceil(W / stride) cells, and cell i lies where a convolutional network's
lies, centerd on pixel (i + 0.5) stride. With patches of 16 the surplus cells are cut off; with patches of 14 the maps,
of strides 3.5 to 28, are resampled to these point_coords.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from timm.layers import LayerNorm2d
from torch import nn

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class SimpleFeaturePyramid(nn.Module):
    """One map (B, C, h, w) of patches -> res2 (C/4), res3 (C/2), res4 (C), res5 (C channels).

    Args:
        channels: C. patch: the patches' side in pixels.
    """

    def __init__(self, channels: int, patch: int):
        super().__init__()
        self.channels, self.patch = channels, patch
        self.norm = LayerNorm2d(channels)
        half = channels // 2
        self.res2 = nn.Sequential(
            nn.ConvTranspose2d(channels, half, 2, stride=2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, half // 2, 2, stride=2),
        )
        self.res3 = nn.ConvTranspose2d(channels, half, 2, stride=2)
        self.res5 = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, x, size):
        """x (B, C, h, w); size: (H, W) of the image without padding. Returns dict of (B, C, H/stride, W/stride)."""
        x = self.norm(x)
        maps = {"res2": self.res2(x), "res3": self.res3(x), "res4": x, "res5": self.res5(x)}
        factor = {"res2": 0.25, "res3": 0.5, "res4": 1, "res5": 2}
        return {name: at_stride(value, self.patch * factor[name], STRIDES[name], size) for name, value in maps.items()}

    def output_shape(self):
        channels = {
            "res2": self.channels // 4,
            "res3": self.channels // 2,
            "res4": self.channels,
            "res5": self.channels,
        }
        return {name: ShapeSpec(channels=channels[name], stride=STRIDES[name]) for name in STRIDES}


def pad_to_patches(image, patch: int):
    """Pad (B, 3, H, W) with zeros at the right and at the bottom to multiples of `patch`."""
    height, width = image.shape[-2:]
    if height % patch == 0 and width % patch == 0:
        return image
    return F.pad(image, (0, -width % patch, 0, -height % patch))


def at_stride(x, stride: float, wanted: int, size):
    """Bring a map whose cells have `stride` pixels to `wanted` pixels: (B, C, h, w) -> (B, C, ceil(H / wanted), ...).

    size: (H, W), the part of the image to be covered.
    """
    rows, columns = (-(-side // wanted) for side in size)
    if stride == wanted:
        return x[..., :rows, :columns]
    y, x_position = (
        (torch.arange(cells, device=x.device, dtype=torch.float32) + 0.5) * wanted / (total * stride)
        for cells, total in ((rows, x.shape[2]), (columns, x.shape[3]))
    )  # 0..1 of the padded image
    grid = torch.stack(torch.meshgrid(x_position, y, indexing="xy"), dim=-1) * 2 - 1  # (rows, columns, 2) as (x, y)
    return F.grid_sample(
        x.float(), grid.expand(len(x), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    ).to(x.dtype)
