"""Optimizer and learning-rate schedule: AdamW with a slower backbone, warm-up, then polynomial decay."""

import torch
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from torch import nn

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
# Suffixes of bare parameters that are position or type embeddings.
_POSITIONS = (
    "level_embed",
    "pos_embed",
    "positional_embedding",
    "class_embedding",
    "cls_token",
    "reg_token",
    "mask_token",
    "relative_position_bias_table",
)


def build_optimizer(cfg, model) -> torch.optim.Optimizer:
    """AdamW with parameter groups.

    Embeddings and vectors have no weight decay, norms have SOLVER.WEIGHT_DECAY_NORM, and the learning rate of the
    pretrained backbone is multiplied by SOLVER.BACKBONE_MULTIPLIER.
    """
    solver = cfg.SOLVER

    def factor(name):  # a ViT's feature pyramid is not pretrained
        pretrained = name.startswith("backbone.") and not name.startswith("backbone.pyramid.")
        return solver.BACKBONE_MULTIPLIER if pretrained else 1.0

    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        lr_factor_func=factor,
    )
    # fused: one pass over each tensor instead of eight.
    return torch.optim.AdamW(_spare_embeddings(model, groups), lr=solver.BASE_LR, fused=True)


def _spare_embeddings(model, groups):
    """Move embeddings, biases, gates, and scalars to groups without weight decay, as Mask2Former does.

    Linear layers keep it, including those called class_embed and mask_embed.
    """
    spared = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    spared |= {p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(_POSITIONS)}
    spared -= {p for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    result = []
    for group in groups:
        for params, decay in (
            ([p for p in group["params"] if p not in spared], group["weight_decay"]),
            ([p for p in group["params"] if p in spared], 0.0),
        ):
            if params:
                result.append({**group, "params": params, "weight_decay": decay})
    return result


def build_lr_scheduler(cfg, optimizer) -> LRMultiplier:
    """Linear warm-up of SOLVER.WARMUP_ITERS iterations, then (1 - t)^SOLVER.POLY_POWER to zero."""
    solver = cfg.SOLVER
    schedule = WarmupParamScheduler(
        PolynomialDecayParamScheduler(1.0, solver.POLY_POWER),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        "linear",
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)
