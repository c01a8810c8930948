"""The training loop: one student for labeled and pseudo-labeled images, and its EMA teacher.

One iteration: fetch the batch → PseudoLabelHook (teacher, filters, CutMix) → losses, gradients, step → EMAHook.
Data, point sampling and dropout depend on (seed, iteration, rank) alone, so that a resumed run continues exactly.
"""

import contextlib
import logging
import os
import time
import zlib

import detectron2.utils.comm as comm
import torch
from detectron2.engine import TrainerBase, create_ddp_model
from detectron2.engine import hooks as d2_hooks
from detectron2.modeling import build_model
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from fvcore.nn.precise_bn import get_bn_modules

from ..checkpoint import AtomicCheckpointer, TrainedNames
from ..losses.criterion import Normalizers
from ..losses.regularizers import LABELED, PSEUDO
from ..data.loaders import build_train_loader
from ..errors import UserError
from ..evaluation.report import summary_table
from ..evaluation.runner import Evaluation
from ..utils.processes import main_process_first
from .solver import build_lr_scheduler, build_optimizer
from .ema import EMAHook, EMATeacher
from .memory import LargestStep, out_of_memory
from .precision import MixedPrecision
from .pseudo_label import PseudoLabelHook, split_evenly

logger = logging.getLogger(__name__)


class SemiSupervisedTrainer(TrainerBase):
    """Built from the whole config, as Detectron2's DefaultTrainer is; everything below it takes plain arguments.

    Attributes that hooks use: student, teacher, precision, accumulate (number of micro-batches), batch ({"labeled",
    "unlabeled"} lists of dicts), pseudo_inputs (the student's pseudo-labeled inputs of this iteration), log (tensors
    to be written at the next log line).
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        torch.manual_seed(cfg.SEED)
        with main_process_first():  # it may download weights
            self.student = build_model(cfg)
        on_gpu = self.student.device.type == "cuda"
        self.model = create_ddp_model(
            self.student,
            broadcast_buffers=False,
            device_ids=[torch.cuda.current_device()] if on_gpu else None,
            find_unused_parameters=may_lack_gradients(cfg),
        )
        horizon = min(cfg.SEMI.EMA.HORIZON, cfg.SEMI.EMA.MAX_SHARE * cfg.SOLVER.MAX_ITER)
        self.teacher = EMATeacher(self.student, horizon)
        self.teacher.model.regularizers = None  # it has no losses, so it needs no copy of the initial backbone
        self.optimizer = build_optimizer(cfg, self.student)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.precision = MixedPrecision.from_config(cfg, self.student.device)
        self.max_iter, self.accumulate = cfg.SOLVER.MAX_ITER, cfg.SOLVER.ACCUMULATE
        self.evaluation = Evaluation(cfg, {"student": self.student, "teacher": self.teacher.model})
        self.checkpointer = AtomicCheckpointer(
            self.student,
            cfg.OUTPUT_DIR,
            teacher=self.teacher.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            trainer=self,
            trained_names=TrainedNames(self.student, self.teacher.model),
            **self._initial_backbone(),
        )
        self.log, self.pseudo_inputs, self.batch = {}, [], None
        self.register_hooks(self.build_hooks())

    def _initial_backbone(self) -> dict:
        """The frozen initial backbone as a checkpointable, if a regularizer uses it."""
        initial = self.student.regularizers.initial
        return {} if initial is None else {"initial_backbone": initial}

    def build_hooks(self):
        cfg = self.cfg
        self.pseudo_label_hook = PseudoLabelHook.from_config(cfg)
        hooks = [
            self.pseudo_label_hook,
            EMAHook(cfg.SEMI.BURN_IN),
            d2_hooks.IterationTimer(),
            d2_hooks.LRScheduler(optimizer=self.optimizer, scheduler=self.scheduler),
            d2_hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate),
        ]
        if comm.is_main_process():
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
            writers = [
                CommonMetricPrinter(self.max_iter, window_size=1),
                JSONWriter(f"{cfg.OUTPUT_DIR}/metrics.json"),
                TensorboardXWriter(cfg.OUTPUT_DIR),
            ]
            hooks += [
                d2_hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_iter=self.max_iter),
                d2_hooks.PeriodicWriter(writers, period=cfg.SOLVER.LOG_PERIOD),
            ]
        return hooks

    def resume_or_load(self, resume: bool):
        """Continue from the last checkpoint of OUTPUT_DIR, or initialize from MODEL.WEIGHTS."""
        with main_process_first():
            self._resume_or_load(resume)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise UserError(
                f"{self.cfg.OUTPUT_DIR}: the processes find different iterations to continue from ({starts}); put "
                "OUTPUT_DIR on a file system that all machines share."
            )

    def _resume_or_load(self, resume):
        if resume and self.checkpointer.has_checkpoint():
            self.checkpointer.resume_or_load("", resume=True)
            self.start_iter = self.iter + 1
            self.evaluation.load()
        elif self.cfg.MODEL.WEIGHTS:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
            self.teacher.reset(self.student)
            if self.student.regularizers.initial is not None:
                self.student.regularizers.keep_initial(self.student.backbone)

    def train(self):
        self._loader = build_train_loader(self.cfg, start_iter=self.start_iter)
        self.model.train()
        if self.student.device.type == "cuda":
            LargestStep.from_config(self.cfg, self).check()
        try:
            super().train(self.start_iter, self.max_iter)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self, error) from error
        if self.evaluation.results:  # the main process only
            logger.info(
                "The last evaluation, and the best, which was chosen on these images:\n%s",
                summary_table(self.evaluation.results),
            )
        return self.evaluation.results

    def load_for_evaluation(self):
        """Student and teacher of MODEL.WEIGHTS, or of the last checkpoint in OUTPUT_DIR."""
        with main_process_first():
            path = self.cfg.MODEL.WEIGHTS or self.checkpointer.get_checkpoint_file()
            if not path:
                raise UserError(f"{self.cfg.OUTPUT_DIR}: holds no checkpoint to evaluate; name one in MODEL.WEIGHTS.")
            rest = self.checkpointer.load(path, checkpointables=["teacher", "trained_names"])
        if "trainer" not in rest:  # weights of one network only
            self.teacher.reset(self.student)
        self.iter = rest.get("iteration", -1)

    def before_step(self):
        start = time.perf_counter()
        self.batch = next(self._loader_iterator())
        self._data_time = time.perf_counter() - start
        # Point sampling and dropout draw from torch's generator; its state is a function of the iteration.
        torch.manual_seed(zlib.crc32(f"{self.cfg.SEED}/{self.iter}/{comm.get_rank()}".encode()))
        self.student.regularizers.progress = self.iter / self.max_iter
        super().before_step()

    def _loader_iterator(self):
        if self.iter == self.start_iter:
            self._iterator = iter(self._loader)
        return self._iterator

    def run_step(self):
        batches = [self.student.prepare_batch(inputs) for inputs in self._micro_batches()]
        normalizers = self._normalizers(batches)
        self.optimizer.zero_grad(set_to_none=True)
        for i, batch in enumerate(batches):
            with self._gradient_sync(last=i == len(batches) - 1):
                with self.precision.autocast():
                    losses = self.model(batch, normalizers)
                self.precision.backward(self._total(losses))
            self._add_to_log(losses)
        try:
            norm = self.precision.step(self.optimizer, self.student.parameters(), self.cfg.SOLVER.CLIP_NORM)
        except FloatingPointError:
            self._report_non_finite()
        average_batch_statistics(self.student)
        self.log["grad_norm"] = norm
        self._write_log()

    def _micro_batches(self):
        """Split the student's inputs into SOLVER.ACCUMULATE parts of equal size, or of one image each.

        Labeled images are in the last parts: ranks exchange gradients after the very last one, and only the losses of
        labeled images reach every parameter.
        """
        inputs = self.pseudo_inputs + self.batch["labeled"]
        return split_evenly(inputs, self.accumulate)

    def _normalizers(self, batches) -> dict:
        """Denominators over all micro-batches, as a mean over ranks (distributed gradients are averaged)."""
        each = [self.student.normalizers(batch) for batch in batches]
        total = torch.stack([sum(n[kind].stack() for n in each) for kind in (LABELED, PSEUDO)])  # (2, 4)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(total)
        labeled, pseudo = total / comm.get_world_size()
        return {LABELED: Normalizers.unstack(labeled), PSEUDO: Normalizers.unstack(pseudo)}

    def _gradient_sync(self, last):
        """Gradients are exchanged between ranks once, after the last micro-batch."""
        return contextlib.nullcontext() if last or self.model is self.student else self.model.no_sync()

    def unlabeled_weight(self) -> float:
        """λ_u at this iteration: 0 during burn-in, then a linear ramp of SEMI.RAMP iterations to SEMI.WEIGHT."""
        semi = self.cfg.SEMI
        step = self.iter - semi.BURN_IN
        return semi.WEIGHT * min(1.0, (step + 1) / max(semi.RAMP, 1)) if step >= 0 else 0.0

    def _total(self, losses: dict):
        """What is minimized: the sum of the losses, those of the pseudo-labeled images times lambda_u."""
        weight = {LABELED: 1.0, PSEUDO: self.unlabeled_weight()}
        return sum(value * weight[kind] for kind, of_kind in losses.items() for value in of_kind.values())

    def _add_to_log(self, losses: dict):
        """Sum up the losses of the micro-batches: "loss_mask" of labeled images, "pseudo/loss_mask" of the others."""
        for kind, of_kind in losses.items():
            for name, value in of_kind.items():
                name = name if kind == LABELED else f"{kind}/{name}"
                self.log[name] = self.log.get(name, 0) + value.detach()

    def _report_non_finite(self):
        files = [x["file_name"] for kind in self.batch.values() for x in kind]
        bad = [name for name, value in self.log.items() if not torch.isfinite(value)]
        raise FloatingPointError(
            f"iteration {self.iter}: the gradient is not finite (losses not finite: "
            f"{', '.join(bad) or 'none'}); the weights were not touched. "
            f"Images: {', '.join(files)}"
        )

    def should_log(self) -> bool:
        return (self.iter + 1) % self.cfg.SOLVER.LOG_PERIOD == 0 or self.iter + 1 == self.max_iter

    def _write_log(self):
        """Move the scalars to the host together, and only in iterations that are logged."""
        if self.should_log():
            values = torch.stack([value.float() for value in self.log.values()]).tolist()
            log = dict(zip(self.log, values))
            losses = {
                LABELED: {name: value for name, value in log.items() if name.startswith("loss_")},
                PSEUDO: {name: value for name, value in log.items() if name.startswith(f"{PSEUDO}/loss_")},
            }
            self.storage.put_scalars(
                **log,
                unlabeled_weight=self.unlabeled_weight(),
                total_loss=self._total(losses),
                **self.precision.counters(),
                data_time=self._data_time,
                smoothing_hint=False,
            )
        self.log = {}

    def state_dict(self):
        return super().state_dict() | {"precision": self.precision.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if "precision" in state:  # absent from checkpoints of version 0.1.0
            self.precision.load_state_dict(state["precision"])

    def evaluate(self):
        """Evaluate student and teacher, and save the checkpoint that is best on the first test set."""
        done = min(self.iter + 1, self.max_iter)  # after the last iteration, `iter` is already one further
        return self.evaluation.run(done, lambda: self.checkpointer.save("model_best", iteration=done - 1))


@torch.no_grad()
def average_batch_statistics(network):
    """Replace the running statistics of trained batch norms by their mean over the ranks.

    Each rank sees different images, but evaluation, teacher, and checkpoint must hold the same network on all ranks.
    """
    if comm.get_world_size() == 1:
        return
    values = [value for norm in get_bn_modules(network) for value in (norm.running_mean, norm.running_var)]
    if values:
        together = torch.cat(values)
        torch.distributed.all_reduce(together)
        torch._foreach_copy_(values, (together / comm.get_world_size()).split([len(value) for value in values]))


def may_lack_gradients(cfg) -> bool:
    """Whether this config's network may have parameters that no loss reaches.

    Of a language module whose result is partly unused (an ablation), some weights get no gradient.
    DistributedDataParallel waits for every one and stops at the second iteration, unless asked to look for those
    that will not come; that search costs time at every iteration, so the full network goes without.
    """
    model = cfg.MODEL
    parts = (
        model.CMSAM.ENABLED,
        model.CMSAM.FEATURE_EXCHANGE,
        model.DECODER.SEMANTIC,
        model.REGULARIZERS.VISION_LANGUAGE,
        model.REGULARIZERS.DIVERSITY,
    )
    return model.HSQG.ENABLED and not all(parts)
