"""The trainer on one batch in memory: whole iterations without reading data, logging or evaluation."""

import contextlib
import itertools
from unittest import mock

import torch
from detectron2.utils.events import EventStorage

from hiervl.semi.ema import EMAHook
from hiervl.semi.pseudo_label import PseudoLabelHook
from hiervl.semi.trainer import SemiSupervisedTrainer
from tools.benchmark.models import make_inputs, stage_marks

from . import timing
from .findings import Settings

# Pseudo-labels from the start, all of them kept; random weights are sure of nothing.
OVERRIDES = (
    "SEMI.BURN_IN", 0, "SEMI.RAMP", 0, "SEMI.FILTERS", ("confidence",), "SEMI.FILTER.CONFIDENCE.THRESHOLD", 0.0,
    "SOLVER.LOG_PERIOD", 10**9, "SOLVER.MAX_ITER", 10**6,
)  # fmt: skip
_PARTS_OF_OTHERS = ("scores",)  # modules that another module calls


class StepTrainer(SemiSupervisedTrainer):
    """`step()` is an iteration after burn-in on `use_batch`'s images."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.storage = EventStorage(0)
        self.model.train()
        self.iter = 1

    def build_hooks(self):
        return [hook for hook in super().build_hooks() if isinstance(hook, (PseudoLabelHook, EMAHook))]

    def use_batch(self, images: int, size: int) -> None:
        """As many labeled as unlabeled images of noise, in memory from which a GPU copies by itself."""
        pin = (lambda x: x.pin_memory()) if self.student.device.type == "cuda" else (lambda x: x)
        everything = make_inputs(2 * images, size, self.student.num_classes)
        everything = [{name: pin(value) for name, value in x.items()} for x in everything]
        valid = pin(torch.ones(size, size, dtype=torch.bool))
        shown = {"valid": valid, "padded": False, "file_name": "noise"}
        unlabeled = [
            {
                "image": x["image"],
                "strong": self.cfg.SEMI.STRONG_VIEWS * [x["image"]],
                "cutmix_box": self.cfg.SEMI.STRONG_VIEWS * [None],
                "partner": i,
                **shown,
            }
            for i, x in enumerate(everything[images:])
        ]
        batch = {"labeled": [x | shown for x in everything[:images]], "unlabeled": unlabeled}
        self._iterator = itertools.repeat(batch)

    def _loader_iterator(self):
        return self._iterator

    @property
    def streams(self) -> int:
        """Images that the student sees for each unlabeled one."""
        return self.cfg.SEMI.STRONG_VIEWS + (self.cfg.SEMI.FEATURE_DROPOUT > 0)

    def step(self) -> None:
        self.before_step()
        self.run_step()
        self.after_step()

    def forget(self) -> None:
        """Let go of what a step that did not fit into memory has left behind."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        self.batch, self.pseudo_inputs, self.log = None, [], {}


def step_parts(trainer: StepTrainer, settings: Settings) -> dict[str, float]:
    """Milliseconds of the parts of one step; forward by module."""
    spans = []

    def watched(name, function):
        def run(*arguments):
            before = timing.mark(settings)
            result = function(*arguments)
            spans.append((name, before, timing.mark(settings)))
            return result

        return run

    precision = trainer.precision
    with contextlib.ExitStack() as stack:
        modules = stack.enter_context(stage_marks(trainer.student, lambda: timing.mark(settings)))
        for owner, attribute, name in (
            (trainer, "before_step", "teacher, filters"),
            (trainer, "run_step", "student"),
            (trainer, "after_step", "EMA"),
            (precision, "backward", "backward"),
            (precision, "step", "clipping, AdamW"),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, watched(name, getattr(owner, attribute))))
        trainer.step()
    timing.synchronize(settings)
    spans += [(f"forward: {name}", *marks) for name, *marks in modules if name not in _PARTS_OF_OTHERS]
    times: dict[str, float] = {}
    for name, before, after in spans:
        times[name] = times.get(name, 0.0) + timing.milliseconds(before, after)
    inside = sum(
        ms for name, ms in times.items() if name.startswith("forward") or name in ("backward", "clipping, AdamW")
    )
    return times | {"student: rest": times.pop("student") - inside}
