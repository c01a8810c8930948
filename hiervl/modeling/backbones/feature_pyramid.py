"""Simple feature pyramid (ViTDet, arXiv 2203.16527, section 3): strides 4 to 32 from a plain ViT's last map.

Images are padded on the right and at the bottom to a multiple of the patch size. The padding is zero, which is the mean
color after normalization, and does not show in the outputs: maps have ceil(H / stride) x ceil(W / stride) cells, and
cell i is centered on pixel coordinate (i + 0.5) * stride, as in a convolutional network. With patches of 16 pixels, the
surplus cells are cropped. With patches of 14, the maps have strides of 3.5 to 28 and are resampled to these centers.

Patches of 14 do not divide the canvas that the rest of the network works on, a multiple of 32. There the ViT sees only
as many patches as the image itself needs (37 in a row for 518 pixels; the canvas of 544 would take 39), and cells of
the canvas beyond the image repeat its border.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from timm.layers import LayerNorm2d
from torch import nn

from ...utils.padding import pad_to_multiple

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class SimpleFeaturePyramid(nn.Module):
    """Turns a ViT's map (B, C, h, w) into res2 (C/4 channels), res3 (C/2), res4 (C) and res5 (C).

    Args:
        channels: C.
        patch: side of a patch in pixels.
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
        """
        Args:
            x: (B, C, h, w), the ViT's last map.
            size: (H, W) of the canvas.
        Returns:
            dict of (B, C_i, ceil(H / stride), ceil(W / stride)) for res2..res5.
        """
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


def crop_to_patches(image, size, patch: int):
    """The part of a canvas that a ViT has to see.

    Args:
        image: (B, 3, H, W), a canvas with the image at its top left.
        size: (height, width) of the image; None: it fills the canvas.
        patch: side of a patch in pixels.
    Returns:
        (B, 3, h, w), h and w multiples of the patch.
    """
    if size is not None and STRIDES["res5"] % patch:
        image = image[..., : size[0], : size[1]]
    return pad_to_multiple(image, patch)


def at_stride(x, stride: float, target_stride: int, size):
    """Resample a map of one stride to another, and crop the padding.

    Args:
        x: (B, C, h, w), a map of the image, padded to whole patches.
        stride: stride of `x` in pixels.
        target_stride: stride of the result in pixels.
        size: (H, W) of the canvas.
    Returns:
        (B, C, ceil(H / target_stride), ceil(W / target_stride)).
    """
    height, width = (-(-side // target_stride) for side in size)
    if stride == target_stride:
        return x[..., :height, :width]
    # Centers of the target cells as fractions of the padded image.
    center_y, center_x = (
        (torch.arange(num_cells, device=x.device, dtype=torch.float32) + 0.5) * target_stride / (source_cells * stride)
        for num_cells, source_cells in ((height, x.shape[2]), (width, x.shape[3]))
    )
    grid = torch.stack(torch.meshgrid(center_x, center_y, indexing="xy"), dim=-1) * 2 - 1  # (h', w', 2) as (x, y)
    return F.grid_sample(
        x.float(), grid.expand(len(x), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    ).to(x.dtype)
