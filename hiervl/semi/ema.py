"""The teacher: an exponential moving average of the student's weights."""

import copy

import torch
from detectron2.engine import HookBase


def decay_at(step: int, horizon: float) -> float:
    """EMA decay after `step` updates: 1 - 1/horizon, and smaller at first so that initial weights fade quickly."""
    return min(1 - 1 / (step + 1), 1 - 1 / horizon)


class EMATeacher:
    """The teacher network, in eval mode, with parameters that need no gradient.

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
        teacher, new = self.model.state_dict(), student.state_dict()
        torch._foreach_copy_(list(teacher.values()), [new[name] for name in teacher])
        self.updates = 0

    @torch.no_grad()
    def update(self, student):
        """Move every floating-point tensor toward the student's; copy the others (counters)."""
        self.updates += 1
        weight = 1 - decay_at(self.updates, self.horizon)
        teacher, new = self.model.state_dict(), student.state_dict()
        floating = [name for name, value in teacher.items() if value.is_floating_point()]
        torch._foreach_lerp_([teacher[name] for name in floating], [new[name] for name in floating], weight)
        for name in teacher.keys() - set(floating):
            teacher[name].copy_(new[name])


class EMAHook(HookBase):
    """Updates `trainer.teacher` after every step.

    During burn-in the teacher is a copy of the student, so that evaluations and checkpoints never hold an untrained
    network.
    """

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
