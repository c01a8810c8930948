"""Optimizer and learning-rate schedule: AdamW with a slower backbone, warm-up, then polynomial decay."""
import torch
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler


def build_optimizer(cfg, model) -> torch.optim.Optimizer:
    """AdamW; weight decay spares norms and embeddings, the backbone learns at SOLVER.BACKBONE_MULTIPLIER."""
    solver = cfg.SOLVER

    def factor(name):  # a ViT's feature pyramid has no pretrained weights to be careful with
        pretrained = name.startswith("backbone.") and not name.startswith("backbone.pyramid.")
        return solver.BACKBONE_MULTIPLIER if pretrained else 1.0

    groups = get_default_optimizer_params(
        model, base_lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM, lr_factor_func=factor)
    # fused: one pass over each tensor instead of eight.
    return torch.optim.AdamW(_spare_embeddings(model, groups), lr=solver.BASE_LR, fused=True)


def _spare_embeddings(model, groups):
    """Query, level and no-object embeddings and scalars are positions, not filters: no decay (Mask2Former)."""
    spared = {p for name, p in model.named_parameters() if p.ndim < 2 or "embed.weight" in name or "_feat." in name}
    result = []
    for group in groups:
        for params, decay in (([p for p in group["params"] if p not in spared], group["weight_decay"]),
                              ([p for p in group["params"] if p in spared], 0.0)):
            if params:
                result.append({**group, "params": params, "weight_decay": decay})
    return result


def build_lr_scheduler(cfg, optimizer) -> LRMultiplier:
    """Linear warm-up of SOLVER.WARMUP_ITERS iterations, then (1 - t)^SOLVER.POLY_POWER to zero."""
    solver = cfg.SOLVER
    schedule = WarmupParamScheduler(PolynomialDecayParamScheduler(1.0, solver.POLY_POWER), solver.WARMUP_FACTOR,
                                    min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0), "linear")
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)
