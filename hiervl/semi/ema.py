"""The teacher: an exponential moving average of the student's weights."""

import copy

import torch
from detectron2.engine import HookBase


def decay_at(step: int, horizon: float) -> float:
    """EMA decay after `step` updates: 1 - 1/horizon, less at first so that old weights do not linger."""
    return min(1 - 1 / (step + 1), 1 - 1 / horizon)


class EMATeacher:
    """Holds the teacher network, in eval mode, its parameters outside every graph.

    Args:
        student: the network (not its distributed wrapper).
        horizon: number of iterations over which weights are averaged (>= 1).
    """

    def __init__(self, student: torch.nn.Module, horizon: float):
        self.model = copy.deepcopy(student).eval().requires_grad_(False)
        self.horizon = max(horizon, 1.0)
        self.updates = 0

    @torch.no_grad()
    def reset(self, student):
        """teacher := student."""
        own, new = self.model.state_dict(), student.state_dict()
        torch._foreach_copy_(list(own.values()), [new[name] for name in own])
        self.updates = 0

    @torch.no_grad()
    def update(self, student):
        """Move every floating-point tensor toward the student's; copy the others (counters)."""
        self.updates += 1
        weight = 1 - decay_at(self.updates, self.horizon)
        own, new = self.model.state_dict(), student.state_dict()
        floating = [name for name, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_([own[name] for name in floating], [new[name] for name in floating], weight)
        for name in own.keys() - set(floating):
            own[name].copy_(new[name])


class EMAHook(HookBase):
    """Updates `trainer.teacher` after every step; during burn-in the teacher is the student, at every step, so that
    evaluations and checkpoints of that time hold no untrained network."""

    def __init__(self, burn_in: int):
        self.burn_in = burn_in

    def after_step(self):
        trainer = self.trainer
        if trainer.iter + 1 <= self.burn_in:
            trainer.teacher.reset(trainer.student)
        else:
            trainer.teacher.update(trainer.student)

    def state_dict(self):
        return {"updates": self.trainer.teacher.updates}

    def load_state_dict(self, state):
        self.trainer.teacher.updates = state["updates"]
