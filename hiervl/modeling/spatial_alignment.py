"""CMSAM, the cross-modal spatial alignment module (docs/how-it-works.md, "alignment maps").

At each scale e and for each selected class k, A_{e,k}(x) is the cosine between the class's query and the pixel. It
moves what the pixels know into the queries and what the names know into the pixels; the three maps together are the
pixel-text scores. A class's identity is never averaged away.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from .layers import Temperature, downsample_mask, l2_normalize
from .query_generator import NUM_SCALES, SelectedClasses


@dataclass
class AlignmentOutput:
    """
    Attributes:
        queries: (B, E, K', d), with what the pixels add. memory: [F1, F2, F3] with what the names add.
        maps: E maps (B, K', h, w) of cosines, coarse to fine.
        similarity: (B, K', H/4, W/4), the pixel-text scores: mean of the upsampled maps, in [-1, 1].
    """

    queries: torch.Tensor
    memory: list
    maps: list
    similarity: torch.Tensor

    def __getitem__(self, images: slice) -> "AlignmentOutput":
        """Those of some of the images."""
        return AlignmentOutput(
            self.queries[images],
            [x[images] for x in self.memory],
            [x[images] for x in self.maps],
            self.similarity[images],
        )


class ScaleAlignment(nn.Module):
    """Alignment at one scale, and the two flows through it; both gates start near zero."""

    def __init__(self, dim: int, memory_dim: int):
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.pixel = nn.Conv2d(memory_dim, dim, 1)
        self.to_query = nn.Linear(memory_dim, dim)
        self.to_pixel = nn.Linear(dim, memory_dim)
        self.over_pixels, self.over_classes = Temperature(0.1, 0.02, 1.0), Temperature(0.1, 0.02, 1.0)
        self.none_of_these = nn.Parameter(torch.zeros(()))  # a cosine that a class has to beat
        self.query_gate = nn.Parameter(torch.full((dim,), -3.0))
        self.pixel_gate = nn.Conv2d(2 * memory_dim + 1, 1, 3, padding=1)
        nn.init.zeros_(self.pixel_gate.weight)
        nn.init.constant_(self.pixel_gate.bias, -3.0)

    def align(self, queries, pixels):
        """A: queries (B, K', d), pixels (B, C, h, w) -> cosines (B, K', h, w)."""
        keys, queries = self.pixel(pixels).float(), self.query(queries).float()
        with torch.autocast(pixels.device.type, enabled=False):  # temperatures down to 0.02 would show 8 bits
            alignment = F.normalize(queries, dim=2) @ l2_normalize(keys).flatten(2)  # (B, K', h*w)
        return alignment.unflatten(2, pixels.shape[-2:])

    def exchange(self, queries, log_relevance, pixels, alignment, valid_mask=None):
        """Both flows through the alignment (B, K', h, w); log_relevance (B, K'), valid_mask (B, h, w) bool or None
        -> (queries (B, K', d), pixels (B, C, h, w))."""
        flat = alignment.flatten(2)
        pixel_update = self._pixel_to_text(flat, pixels.flatten(2).transpose(1, 2), valid_mask)
        text_update = self._text_to_pixel(flat, log_relevance, queries).unflatten(2, pixels.shape[-2:])  # (B, C, h, w)
        seen = torch.cat((pixels, text_update, alignment.amax(1, keepdim=True)), dim=1)
        return (
            queries + self.query_gate.sigmoid() * pixel_update,
            pixels + self.pixel_gate(seen).sigmoid() * text_update,
        )

    def _pixel_to_text(self, alignment, tokens, valid_mask):
        """Pixel to query: each query gathers the pixels that it resembles. -> (B, K', d)."""
        attention = alignment / self.over_pixels()
        if valid_mask is not None:
            attention = attention.masked_fill(~valid_mask.flatten(1)[:, None], -torch.inf)
        return self.to_query(attention.softmax(2).to(tokens) @ tokens)

    def _text_to_pixel(self, alignment, log_relevance, queries):
        """Text to pixel: each pixel is told the classes that it resembles, if any. -> (B, C, h*w)."""
        temperature = self.over_classes()
        nothing = (self.none_of_these / temperature).expand(len(alignment), 1, alignment.shape[2])
        likely = torch.cat((alignment / temperature + log_relevance[..., None], nothing), dim=1).softmax(1)
        return (likely[:, :-1].transpose(1, 2).to(queries) @ self.to_pixel(queries)).transpose(1, 2)


class SpatialAlignment(nn.Module):
    """See the module's docstring.

    Args:
        dim: width of the queries. memory_dim: width of F1..F3.
        feature_exchange: let pixels and queries tell each other what they know; without, the maps alone are made.
        guided_upsampling: upsample the maps along the edges of M; without, bilinearly.
    """

    @configurable
    def __init__(self, *, dim: int, memory_dim: int, feature_exchange: bool = True, guided_upsampling: bool = True):
        super().__init__()
        self.feature_exchange, self.guided_upsampling = feature_exchange, guided_upsampling
        self.scales = nn.ModuleList(ScaleAlignment(dim, memory_dim) for _ in range(NUM_SCALES))
        self.score_temperature = Temperature(0.07, 0.02, 1.0)  # of the scores in the vision-language loss

    @classmethod
    def from_config(cls, cfg):
        return {
            "dim": cfg.MODEL.DECODER.HIDDEN_DIM,
            "memory_dim": cfg.MODEL.PIXEL_DECODER.CONV_DIM,
            "feature_exchange": cfg.MODEL.CMSAM.FEATURE_EXCHANGE,
            "guided_upsampling": cfg.MODEL.CMSAM.GUIDED_UPSAMPLING,
        }

    def forward(self, selected: SelectedClasses, memory, mask_features, valid_mask=None) -> AlignmentOutput:
        """
        Args:
            memory: [F1, F2, F3], each (B, C, h, w). mask_features: M (B, Cm, H/4, W/4).
            valid_mask: (B, H, W) bool at any size, False on padding; None: there is none.
        """
        queries, pixels, maps = [], [], []
        for e, scale in enumerate(self.scales):
            level = memory[e]
            level_mask = None if valid_mask is None else downsample_mask(valid_mask, level.shape[-2:])
            alignment = self._align(scale, selected, e, level)
            updated = (
                scale.exchange(selected.queries[:, e], selected.log_relevance, level, alignment, level_mask)
                if self.feature_exchange
                else (selected.queries[:, e], level)
            )
            queries.append(updated[0])
            pixels.append(updated[1])
            maps.append(alignment)
        return AlignmentOutput(torch.stack(queries, dim=1), pixels, maps, self._similarity(maps, mask_features))

    @staticmethod
    def _align(scale, selected, e, level):
        """(B, K', h, w). Of several texts of a class, the one that fits a pixel best counts there."""
        if selected.variants is None:
            return scale.align(selected.queries[:, e], level)
        each = scale.align(selected.variants[:, e].flatten(1, 2), level)  # (B, K'*R, h, w)
        return each.unflatten(1, selected.variants.shape[2:4]).amax(2)

    def _similarity(self, maps, mask_features):
        """Mean of the maps at the size of M; each is brought from scale to scale together with the coarser ones."""
        guide = mask_features.detach()
        total = maps[0]
        for finer in (*maps[1:], None):
            size = guide.shape[-2:] if finer is None else finer.shape[-2:]
            total = (
                guided_upsample(total, F.adaptive_avg_pool2d(guide, size))
                if self.guided_upsampling
                else F.interpolate(total, size=size, mode="bilinear", align_corners=False)
            )
            total = total if finer is None else total + finer
        return total / NUM_SCALES


def guided_upsample(maps: torch.Tensor, guide: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Double the size of maps (B, K, h, w) along the edges of guide (B, C, 2h, 2w), which gets no gradient.

    A fine position takes its four coarse neighbors with bilinear weights times exp(cosine of the guide there and
    at the neighbor / temperature), normalized: where the guide is even this is bilinear interpolation, at an edge
    each side takes its own (joint bilateral upsampling, Kopf et al. 2007, with learned features).
    """
    height, width = maps.shape[-2:]
    with torch.no_grad():
        fine = l2_normalize(guide.float())
        near = F.pad(l2_normalize(F.avg_pool2d(fine, 2)), (1, 1, 1, 1), mode="replicate")
    around = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    parts = []
    for row, column in itertools.product((0, 1), (0, 1)):  # position within its coarse cell
        own = fine[:, :, row::2, column::2].contiguous()  # (B, C, h, w)
        total = norm = 0
        for y, x in itertools.product((0, 2 * row - 1), (0, 2 * column - 1)):  # that cell, and those it is nearest to
            cells = (..., slice(1 + y, 1 + y + height), slice(1 + x, 1 + x + width))
            bilinear = (0.25 if y else 0.75) * (0.25 if x else 0.75)
            cosine = (own * near[cells]).sum(1, keepdim=True)
            weight = bilinear * ((cosine - 1) / temperature).exp()  # (B, 1, h, w)
            total, norm = total + weight * around[cells], norm + weight
        parts.append(total / norm)
    return F.pixel_shuffle(torch.stack(parts, dim=2).flatten(1, 2), 2)
