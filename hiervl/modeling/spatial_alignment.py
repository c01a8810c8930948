"""CMSAM, the cross-modal spatial alignment module (docs/how-it-works.md).

For each scale e and selected class k, the alignment map A_{e,k}(x) is the cosine between the class's query and pixel x.
The maps route features both ways: queries gather the pixels they resemble, and pixels gather the classes they resemble.
Averaged over the three scales, the maps form the pixel-text similarity. Every class has maps of its own throughout.
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
        queries: (B, E, K', d), updated with features from the pixels.
        memory: [F1, F2, F3], each (B, C, h, w), updated with features from the class queries.
        maps: E alignment maps (B, K', h, w) of cosines, coarse to fine.
        similarity: (B, K', H/4, W/4), the pixel-text similarity: mean of the upsampled maps, in [-1, 1].
    """

    queries: torch.Tensor
    memory: list
    maps: list
    similarity: torch.Tensor

    def __getitem__(self, images: slice) -> "AlignmentOutput":
        """The alignment of a slice of the batch."""
        return AlignmentOutput(
            self.queries[images],
            [x[images] for x in self.memory],
            [x[images] for x in self.maps],
            self.similarity[images],
        )


class ScaleAlignment(nn.Module):
    """Alignment and feature exchange at one scale. Both gates of the exchange start near zero."""

    def __init__(self, dim: int, memory_dim: int):
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.pixel = nn.Conv2d(memory_dim, dim, 1)
        self.to_query = nn.Linear(memory_dim, dim)
        self.to_pixel = nn.Linear(dim, memory_dim)
        self.over_pixels, self.over_classes = Temperature(0.1, 0.02, 1.0), Temperature(0.1, 0.02, 1.0)
        self.none_of_these = nn.Parameter(torch.zeros(()))  # the cosine of "no class"
        self.query_gate = nn.Parameter(torch.full((dim,), -3.0))
        self.pixel_gate = nn.Conv2d(2 * memory_dim + 1, 1, 3, padding=1)
        nn.init.zeros_(self.pixel_gate.weight)
        nn.init.constant_(self.pixel_gate.bias, -3.0)

    def align(self, queries, pixels):
        """Alignment map: queries (B, K', d), pixels (B, C, h, w) -> cosines (B, K', h, w)."""
        keys, queries = self.pixel(pixels).float(), self.query(queries).float()
        # In float32, because dividing by temperatures down to 0.02 would amplify bfloat16's rounding errors.
        with torch.autocast(pixels.device.type, enabled=False):
            # (B, K', d) @ (B, d, h*w) -> (B, K', h*w)
            alignment = F.normalize(queries, dim=2) @ l2_normalize(keys).flatten(2)
        return alignment.unflatten(2, pixels.shape[-2:])

    def exchange(self, queries, log_relevance, pixels, alignment, valid_mask=None):
        """Exchange features between queries and pixels through the alignment map.

        Args:
            queries: (B, K', d).
            log_relevance: (B, K').
            pixels: (B, C, h, w).
            alignment: (B, K', h, w), from `align`.
            valid_mask: (B, h, w) bool, False on padding, or None.
        Returns:
            (queries (B, K', d), pixels (B, C, h, w)), both updated.
        """
        flat = alignment.flatten(2)
        pixel_update = self._pixel_to_text(flat, pixels.flatten(2).transpose(1, 2), valid_mask)
        text_update = self._text_to_pixel(flat, log_relevance, queries).unflatten(2, pixels.shape[-2:])  # (B, C, h, w)
        gate_input = torch.cat((pixels, text_update, alignment.amax(1, keepdim=True)), dim=1)  # (B, 2C+1, h, w)
        return (
            queries + self.query_gate.sigmoid() * pixel_update,
            pixels + self.pixel_gate(gate_input).sigmoid() * text_update,
        )

    def _pixel_to_text(self, alignment, tokens, valid_mask):
        """Each query gathers the pixels it resembles.

        alignment (B, K', h*w), tokens (B, h*w, C), valid_mask (B, h, w) bool or None -> (B, K', d).
        """
        attention = alignment / self.over_pixels()
        if valid_mask is not None:
            attention = attention.masked_fill(~valid_mask.flatten(1)[:, None], -torch.inf)
        return self.to_query(attention.softmax(2).to(tokens) @ tokens)

    def _text_to_pixel(self, alignment, log_relevance, queries):
        """Each pixel gathers the classes it resembles, or nothing where "no class" is more likely.

        alignment (B, K', h*w), log_relevance (B, K'), queries (B, K', d) -> (B, C, h*w).
        """
        temperature = self.over_classes()
        no_class = (self.none_of_these / temperature).expand(len(alignment), 1, alignment.shape[2])
        attention = torch.cat((alignment / temperature + log_relevance[..., None], no_class), dim=1).softmax(1)
        attention = attention[:, :-1].transpose(1, 2)  # (B, h*w, K')
        return (attention.to(queries) @ self.to_pixel(queries)).transpose(1, 2)


class SpatialAlignment(nn.Module):
    """Alignment at all scales; see the module docstring.

    Args:
        dim: width of the queries.
        memory_dim: channels of F1..F3.
        feature_exchange: exchange features between pixels and queries. If False, only the maps are computed.
        guided_upsampling: upsample the maps along the edges of M. If False, upsample bilinearly.
    """

    @configurable
    def __init__(self, *, dim: int, memory_dim: int, feature_exchange: bool = True, guided_upsampling: bool = True):
        super().__init__()
        self.feature_exchange, self.guided_upsampling = feature_exchange, guided_upsampling
        self.scales = nn.ModuleList(ScaleAlignment(dim, memory_dim) for _ in range(NUM_SCALES))
        self.score_temperature = Temperature(0.07, 0.02, 1.0)  # of the similarity in the vision-language loss

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
            selected: the selected classes and their queries.
            memory: [F1, F2, F3], each (B, C, h, w).
            mask_features: M (B, Cm, H/4, W/4).
            valid_mask: (B, H, W) bool at any resolution, False on padding; None if there is no padding.
        """
        queries, pixels, maps = [], [], []
        for e, scale in enumerate(self.scales):
            level = memory[e]
            level_mask = None if valid_mask is None else downsample_mask(valid_mask, level.shape[-2:])
            alignment = self._align(scale, selected, e, level)
            scale_queries = selected.queries[:, e]
            if self.feature_exchange:
                scale_queries, level = scale.exchange(
                    scale_queries, selected.log_relevance, level, alignment, level_mask
                )
            queries.append(scale_queries)
            pixels.append(level)
            maps.append(alignment)
        return AlignmentOutput(torch.stack(queries, dim=1), pixels, maps, self._similarity(maps, mask_features))

    @staticmethod
    def _align(scale, selected, e, level):
        """Alignment map (B, K', h, w) at scale e. If a class has several texts, the best one counts at each pixel."""
        if selected.variants is None:
            return scale.align(selected.queries[:, e], level)
        alignment = scale.align(selected.variants[:, e].flatten(1, 2), level)  # (B, K'*R, h, w)
        return alignment.unflatten(1, selected.variants.shape[2:4]).amax(2)  # (B, K', R, h, w) -> (B, K', h, w)

    def _similarity(self, maps, mask_features):
        """Mean of the maps at the size of M: (B, K', H/4, W/4).

        The running sum is upsampled from scale to scale, adding one map at each, so that each step doubles the size.
        """
        guide = mask_features.detach()
        total = maps[0]
        for finer in (*maps[1:], None):
            size = guide.shape[-2:] if finer is None else finer.shape[-2:]
            if self.guided_upsampling:
                total = guided_upsample(total, F.adaptive_avg_pool2d(guide, size))
            else:
                total = F.interpolate(total, size=size, mode="bilinear", align_corners=False)
            if finer is not None:
                total = total + finer
        return total / NUM_SCALES


def guided_upsample(maps: torch.Tensor, guide: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Upsample maps (B, K, h, w) to (B, K, 2h, 2w), preserving the edges of a guide (B, C, 2h, 2w).

    Joint bilateral upsampling (Kopf et al. 2007) with learned features. Each fine position averages its four nearest
    coarse cells. A cell's weight is its bilinear weight times exp(cos / temperature), where cos is the cosine between
    the guide at the fine position and at the cell; the weights are normalized to sum to 1. Where the guide is uniform,
    this is bilinear interpolation; at an edge, a position mostly takes values from its side of the edge. The guide
    gets no gradient.
    """
    height, width = maps.shape[-2:]
    with torch.no_grad():
        fine = l2_normalize(guide.float())
        coarse = F.pad(l2_normalize(F.avg_pool2d(fine, 2)), (1, 1, 1, 1), mode="replicate")  # (B, C, h+2, w+2)
    padded_maps = F.pad(maps, (1, 1, 1, 1), mode="replicate")  # (B, K, h+2, w+2)
    parts = []
    for row, column in itertools.product((0, 1), (0, 1)):  # one of the four positions within every coarse cell
        position_guide = fine[:, :, row::2, column::2].contiguous()  # (B, C, h, w)
        total = weight_sum = 0
        for y, x in itertools.product((0, 2 * row - 1), (0, 2 * column - 1)):  # offsets to the four nearest cells
            neighbors = (..., slice(1 + y, 1 + y + height), slice(1 + x, 1 + x + width))
            bilinear = (0.25 if y else 0.75) * (0.25 if x else 0.75)
            cosine = (position_guide * coarse[neighbors]).sum(1, keepdim=True)
            # Subtracting 1 keeps the exponent at or below 0; the factor cancels in the normalization.
            weight = bilinear * ((cosine - 1) / temperature).exp()  # (B, 1, h, w)
            total, weight_sum = total + weight * padded_maps[neighbors], weight_sum + weight
        parts.append(total / weight_sum)
    # 4 x (B, K, h, w) -> (B, K*4, h, w) -> (B, K, 2h, 2w)
    return F.pixel_shuffle(torch.stack(parts, dim=2).flatten(1, 2), 2)
