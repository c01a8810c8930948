"""Build the backbone that the config names, load its ImageNet weights, freeze what is to be frozen."""
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from ..errors import UserError
from .frozen_norm import freeze_norms


def build_backbone(cfg):
    """Return the backbone module for cfg.MODEL.BACKBONE.

    Raises:
        UserError: MODEL.BACKBONE.NAME is not registered.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONE_REGISTRY:
        known = ", ".join(sorted(key for key, _ in BACKBONE_REGISTRY))
        raise UserError(f"MODEL.BACKBONE.NAME: no backbone called {name!r}; known are {known}.")
    backbone = BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3))
    if cfg.MODEL.BACKBONE.FREEZE_BN:
        backbone = freeze_norms(backbone)
    return backbone
