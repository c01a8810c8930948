"""Build the configured backbone and freeze the norms and parameters that the config says to freeze."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from ...errors import UserError
from .frozen_norm import freeze_norms

# Keys of MODEL.BACKBONE that a backbone ignores, and the key to use instead.
_IGNORED_KEYS = {
    "CLIPBackbone": {"FREEZE_AT": "MODEL.BACKBONE.FREEZE", "WEIGHTS": "MODEL.BACKBONE.CLIP.PRETRAINED"},
    "TimmBackbone": {"FREEZE_AT": "MODEL.BACKBONE.FREEZE"},
    "build_resnet_backbone": {"WEIGHTS": "MODEL.WEIGHTS"},
}


def build_backbone(cfg):
    """Return the backbone module for cfg.MODEL.BACKBONE.

    Raises:
        UserError: MODEL.BACKBONE.NAME is not registered, or a key is set that this backbone ignores or cannot fulfill.
    """
    options = cfg.MODEL.BACKBONE
    if options.NAME not in BACKBONE_REGISTRY:
        known = ", ".join(sorted(key for key, _ in BACKBONE_REGISTRY))
        raise UserError(f"MODEL.BACKBONE.NAME: unknown backbone {options.NAME!r}; available: {known}.")
    for key, instead in _IGNORED_KEYS.get(options.NAME, {}).items():
        if options[key]:
            raise UserError(f"MODEL.BACKBONE.{key} has no effect on {options.NAME}; use {instead}.")
    backbone = BACKBONE_REGISTRY.get(options.NAME)(cfg, ShapeSpec(channels=3))
    if "backbone" in cfg.SOLVER.ACTIVATION_CHECKPOINTING:
        _checkpoint_activations(backbone, options.NAME)
    if options.FREEZE_BN:
        backbone = freeze_norms(backbone)
    _freeze_parameters(backbone, cfg)
    return backbone


def _checkpoint_activations(backbone, name):
    """Let a backbone compute the activations of its blocks again in the backward pass instead of keeping them."""
    if not hasattr(backbone, "checkpoint_activations"):
        raise UserError(
            f"SOLVER.ACTIVATION_CHECKPOINTING: {name} has no blocks for it; take backbone out of the list, or use "
            "TimmBackbone or a ViT of CLIPBackbone."
        )
    backbone.checkpoint_activations()


def _freeze_parameters(backbone, cfg):
    """Apply FREEZE or ATTENTION_ONLY. A feature pyramid is always trained, because it has no pretrained weights."""
    options = cfg.MODEL.BACKBONE
    if options.FREEZE and options.ATTENTION_ONLY:
        raise UserError("MODEL.BACKBONE: FREEZE and ATTENTION_ONLY exclude each other; set only one of them.")
    pretrained = {name: p for name, p in backbone.named_parameters() if not name.startswith("pyramid.")}
    if options.ATTENTION_ONLY and not any(".attn." in name for name in pretrained):
        raise UserError(
            f"MODEL.BACKBONE.ATTENTION_ONLY: {options.NAME} has no attention layers in this configuration; set it to "
            "False."
        )
    for name, parameter in pretrained.items():
        if options.FREEZE or (options.ATTENTION_ONLY and ".attn." not in name):
            parameter.requires_grad_(False)
