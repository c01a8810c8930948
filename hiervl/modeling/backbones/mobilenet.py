"""MobileNetV2 as torchvision defines it, so that torchvision's ImageNet weights load strictly."""

import os

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import nn
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

from ...checkpoint import load_strictly
from ...download import local_weights
from ...errors import UserError

# The last block of each stride in torchvision's `features`; the 1280-channel head behind res5 is not used.
_STAGES = {"res2": slice(0, 4), "res3": slice(4, 7), "res4": slice(7, 14), "res5": slice(14, 18)}
_CHANNELS = {"res2": 24, "res3": 32, "res4": 96, "res5": 320}
_KEY = "MODEL.BACKBONE.WEIGHTS"
_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


@BACKBONE_REGISTRY.register()
class MobileNetV2(Backbone):
    """res2..res5 with 24, 32, 96, 320 channels at strides 4, 8, 16, 32.

    Args:
        weights: a torchvision `mobilenet_v2` state dict, as a file or a URL; "" for random weights.
        freeze_at: the first stages are not trained: 0 none, 2 up to res2, ... 5 all (detectron2's numbering).
    Raises:
        UserError: the weights are missing, cannot be fetched, or do not fit MobileNetV2 key by key.
    """

    @configurable
    def __init__(self, *, weights: str = "", freeze_at: int = 0):
        super().__init__()
        network = mobilenet_v2(weights=None)
        if weights:
            path = local_weights(weights, _KEY, "set it to '' to train from scratch")
            if not os.path.isfile(path):
                raise UserError(
                    f"{weights}: no such weights file ({_KEY}); torchvision's are at "
                    f"{MobileNet_V2_Weights.IMAGENET1K_V1.url}, which the key takes as well; '' trains from scratch."
                )
            load_strictly(network, path, _KEY)
        self.stages = nn.ModuleDict({name: network.features[blocks] for name, blocks in _STAGES.items()})
        for name in list(_STAGES)[: max(freeze_at - 1, 0)]:
            self.stages[name].requires_grad_(False)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {"weights": cfg.MODEL.BACKBONE.WEIGHTS, "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT}

    def forward(self, image):
        """(B, 3, H, W) -> dict of (B, C, H/stride, W/stride)."""
        features, x = {}, image
        for name, stage in self.stages.items():
            features[name] = x = stage(x)
        return features

    def output_shape(self):
        return {name: ShapeSpec(channels=_CHANNELS[name], stride=_STRIDES[name]) for name in _STAGES}
