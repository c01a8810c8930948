"""Backbones: image (B, 3, H, W) -> {"res2": (B, C, H/4, W/4), ..., "res5": (B, C, H/32, W/32)}.

Detectron2's ResNets come from Detectron2 itself (`build_resnet_backbone`). The backbones in this package register
themselves in its BACKBONE_REGISTRY, so that MODEL.BACKBONE.NAME selects among all of them.
"""

from .build import build_backbone
from .clip_model import CLIPBackbone
from .mobilenet import MobileNetV2
from .timm_model import TimmBackbone

__all__ = ["CLIPBackbone", "MobileNetV2", "TimmBackbone", "build_backbone"]
