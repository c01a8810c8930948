"""Build the backbone that the config names, load its ImageNet weights, freeze what is to be frozen."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from ...errors import UserError
from .frozen_norm import freeze_norms

# Keys of MODEL.BACKBONE that a backbone does not read, and what does the same there.
_UNREAD = {
    "CLIPBackbone": {"FREEZE_AT": "MODEL.BACKBONE.FREEZE", "WEIGHTS": "MODEL.BACKBONE.CLIP.PRETRAINED"},
    "TimmBackbone": {"FREEZE_AT": "MODEL.BACKBONE.FREEZE"},
    "build_resnet_backbone": {"WEIGHTS": "MODEL.WEIGHTS"},
}


def build_backbone(cfg):
    """Return the backbone module for cfg.MODEL.BACKBONE.

    Raises:
        UserError: MODEL.BACKBONE.NAME is not registered, or has no use for a key that is set.
    """
    options = cfg.MODEL.BACKBONE
    if options.NAME not in BACKBONE_REGISTRY:
        known = ", ".join(sorted(key for key, _ in BACKBONE_REGISTRY))
        raise UserError(f"MODEL.BACKBONE.NAME: no backbone called {options.NAME!r}; known are {known}.")
    for key, instead in _UNREAD.get(options.NAME, {}).items():
        if options[key]:
            raise UserError(f"MODEL.BACKBONE.{key} is not read by {options.NAME}; use {instead}.")
    backbone = BACKBONE_REGISTRY.get(options.NAME)(cfg, ShapeSpec(channels=3))
    if options.FREEZE_BN:
        backbone = freeze_norms(backbone)
    _choose_trained(backbone, cfg)
    return backbone


def _choose_trained(backbone, cfg):
    """FREEZE and ATTENTION_ONLY; a feature pyramid, which no weights come with, is always trained."""
    options = cfg.MODEL.BACKBONE
    if options.FREEZE and options.ATTENTION_ONLY:
        raise UserError("MODEL.BACKBONE: FREEZE and ATTENTION_ONLY exclude each other.")
    pretrained = {name: p for name, p in backbone.named_parameters() if not name.startswith("pyramid.")}
    if options.ATTENTION_ONLY and not any(".attn." in name for name in pretrained):
        raise UserError(f"MODEL.BACKBONE.ATTENTION_ONLY: {options.NAME} has no attention here.")
    for name, parameter in pretrained.items():
        if options.FREEZE or (options.ATTENTION_ONLY and ".attn." not in name):
            parameter.requires_grad_(False)
