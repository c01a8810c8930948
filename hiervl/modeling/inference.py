"""From queries to class probabilities per pixel, and the ways to cover an image with them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn


@dataclass
class Probabilities:
    """What the network says of B images.

    Attributes:
        values: (B, K', H, W) probabilities of the selected classes.
        index: (B, K'), their positions in the list of names.
        num_classes: K. relevance: (B, K) of all names; pixel_text: (B, K', H/4, W/4), the pixel-text similarity; both
            None in a network without language modules.
    """

    values: torch.Tensor
    index: torch.Tensor
    num_classes: int
    relevance: torch.Tensor | None = None
    pixel_text: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """(B, K, H, W): a class that was not selected has probability 0."""
        return self.scatter_to_all_classes(self.values)

    def scatter_to_all_classes(self, maps: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Maps (B, K', h, w) of the selected classes -> (B, K, h, w), `fill` for the others."""
        index = self.index[..., None, None].expand_as(maps)
        return maps.new_full((len(maps), self.num_classes, *maps.shape[2:]), fill).scatter(1, index, maps)


class ClassScoreHead(nn.Module):
    """Evidence u_k(x) and probability p_k = u_k / (epsilon + sum_j u_j).

    u_k = s_k * (w_s * mean_e g_ek * sigmoid(mask) + w_i * sum_n softmax(class)_k * sigmoid(mask)), with the relevance
    s_k and the first term only where there are semantic queries. g_ek = 1 - (1 - presence)(1 - s_k): a class is taken
    for absent only if its query and its relevance agree; presence alone loses small objects (docs/DECISIONS.md).
    w and epsilon are learnable and positive; epsilon is the class_scores a pixel must gather before it can be sure.
    Without it the scores of a mask transformer are no probabilities, and no confidence threshold means anything.
    """

    def __init__(self, epsilon: float = 0.03, semantic: bool = False):
        super().__init__()
        self.semantic = semantic
        self.log_instance_weight = nn.Parameter(torch.zeros(()))
        if semantic:
            self.log_semantic_weight = nn.Parameter(torch.zeros(()))
        self.log_epsilon = nn.Parameter(torch.tensor(float(epsilon)).log())

    @property
    def epsilon(self) -> torch.Tensor:
        return self.log_epsilon.exp()

    def forward(self, class_logits, mask_logits, presence_logits=None, region_logits=None, relevance=None):
        """
        Args:
            class_logits: (..., N, K+1). mask_logits: (..., N, P), at P point_coords.
            presence_logits: (..., E, K), region_logits: (..., E, K, P), of the semantic queries, or None.
            relevance: (B, K), B being the last of the leading dimensions; or None, without semantic queries.
        Returns:
            class_scores (..., K, P).
        """
        classes = class_logits.float().softmax(-1)[..., :-1]
        class_scores = torch.einsum("...nk,...np->...kp", classes, mask_logits.float().sigmoid())
        class_scores = self.log_instance_weight.exp() * class_scores
        if region_logits is not None:
            gate = 1 - (-presence_logits.float()).sigmoid() * (1 - relevance[:, None])  # (..., E, K)
            weight = self.log_semantic_weight.exp() / gate.shape[-2]
            class_scores = class_scores + torch.einsum(
                "...ek,...ekp->...kp", weight * gate, region_logits.float().sigmoid()
            )
        return class_scores if relevance is None else relevance[..., None] * class_scores

    def normalize(self, class_scores):
        """(B, K, H, W) class_scores -> probabilities; they sum to less than 1 where class_scores is thin."""
        return class_scores / (self.epsilon + class_scores.sum(dim=1, keepdim=True))


class InferenceProtocol:
    """How a test image is covered, as config section TEST says; `str()` of it states that in results.

    Args:
        mode: "whole" image or "sliding" window. window, stride: (height, width) in pixels of a sliding window.
        scales: factors on the image's size; the probabilities at all of them are averaged. flip: and those of the
            mirrored images.
        selected_only: return the selected classes only, not all K. short_side: to which the loader resizes test images;
            only stated here.

    Which values go together is checked by config.validate.
    """

    @configurable
    def __init__(
        self,
        mode="whole",
        window=(512, 512),
        stride=(341, 341),
        scales=(1.0,),
        flip=False,
        selected_only=False,
        short_side=0,
    ):
        self.mode, self.window, self.stride = mode, tuple(window), tuple(stride)
        self.scales, self.flip, self.selected_only, self.short_side = tuple(scales), flip, selected_only, short_side

    @classmethod
    def from_config(cls, cfg):
        test = cfg.TEST
        return {
            "mode": test.MODE,
            "window": test.WINDOW,
            "stride": test.STRIDE,
            "scales": test.SCALES,
            "flip": test.FLIP,
            "selected_only": test.SELECTED_ONLY,
            "short_side": cfg.INPUT.TEST_SHORT_SIDE,
        }

    def __str__(self):
        parts = ["whole image"]
        if self.mode == "sliding":
            parts = ["sliding window {}x{}, stride {}x{}".format(*self.window, *self.stride)]
        if self.short_side:
            parts.append(f"short side {self.short_side}")
        if self.scales != (1.0,):
            parts.append("scales " + " ".join(f"{scale:g}" for scale in self.scales))
        return ", ".join(parts + ["mirrored too"] * self.flip)

    def predict_images(self, images, size, predict) -> list:
        """Class probabilities of B images of one size.

        Args:
            images: (B, 3, H, W). size: (height, width) of the results.
            predict: function, images (B, 3, h, w) -> Probabilities.
        Returns:
            for each image {"sem_seg": (K, *size)}; with selected_only (K', *size) and "classes" (K',), their indices.
        """
        if self.selected_only:
            prediction = predict(self._scaled(images, self.scales[0]))
            maps = resize_maps(prediction.values, size)
            return [{"sem_seg": maps[b], "classes": prediction.index[b]} for b in range(len(maps))]
        total, views = 0, 0
        for scale in self.scales:
            scaled = self._scaled(images, scale)
            for mirrored in (False, True)[: 1 + self.flip]:
                dense = self._dense(scaled.flip(3) if mirrored else scaled, predict)
                total = total + resize_maps(dense.flip(3) if mirrored else dense, size)
                views += 1
        return [{"sem_seg": maps} for maps in total / views]

    def _dense(self, images, predict):
        """(B, K, H, W) of one view."""
        if self.mode == "whole":
            return predict(images).dense()
        return sliding_window(images, lambda part: predict(part).dense(), self.window, self.stride)

    @staticmethod
    def _scaled(images, scale):
        size = [max(1, round(edge * scale)) for edge in images.shape[2:]]
        return resize_maps(images, size, antialias=scale < 1)


def upsample_to_image(maps: torch.Tensor, size) -> torch.Tensor:
    """Maps at a quarter of the padded images' size, (B, C, h, w) -> (B, C, *size) of the images, without padding."""
    maps = F.interpolate(maps, scale_factor=4, mode="bilinear", align_corners=False)
    return maps[..., : size[0], : size[1]]


def resize_maps(maps, size, antialias=False):
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    if tuple(size) == tuple(maps.shape[2:]):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)


def sliding_window(images, predict, window, stride):
    """Average `predict` over overlapping windows.

    Args:
        images: (B, 3, H, W). predict: (B, 3, h, w) -> (B, K, h, w). window, stride: (h, w) in pixels; an image
        smaller than the window is one window.
    """
    height, width = images.shape[-2:]
    total = count = None
    for top in _window_starts(height, window[0], stride[0]):
        for left in _window_starts(width, window[1], stride[1]):
            area = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            part = predict(images[area])
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
                count = part.new_zeros(height, width)
            total[area] += part
            count[area] += 1
    return total / count


def _window_starts(length, window, stride):
    """Window starts that cover `length`; the last window ends at the border."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]
