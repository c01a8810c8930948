"""Backbones: image (B, 3, H, W) -> {"res2": (B, C, H/4, W/4), ..., "res5": (B, C, H/32, W/32)}.

Importing this package registers its backbones in Detectron2's BACKBONE_REGISTRY, beside Detectron2's own ResNets
(`build_resnet_backbone`); MODEL.BACKBONE.NAME selects one of them.
"""

from .build import build_backbone
from .clip_model import CLIPBackbone
from .mobilenet import MobileNetV2
from .timm_model import TimmBackbone

__all__ = ["CLIPBackbone", "MobileNetV2", "TimmBackbone", "build_backbone"]
