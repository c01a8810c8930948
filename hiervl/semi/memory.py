"""Memory of a GPU: the largest step is tried before training starts, and running out of memory later names the way out.

A semi-supervised run starts with labeled images only and grows severalfold when burn-in ends. Whether that step fits
should not turn out hours later.
"""

import gc
import logging
import math

import torch
from detectron2.utils import comm

from ..errors import UserError
from .pseudo_label import split_evenly

logger = logging.getLogger(__name__)
_GB = 2**30


class LargestStep:
    """The largest step of a run: all views of all images, with as many classes and segments as an image may have.

    Args:
        trainer: the trainer that is to take the step. Nothing of its state changes.
        crop_size: (height, width) of the images, pixels.
        num_labeled, num_unlabeled: images of this process.
        strong_views: of an unlabeled image.
        num_classes, num_segments: in one image.
    """

    def __init__(self, trainer, *, crop_size, num_labeled, num_unlabeled, strong_views, num_classes, num_segments):
        self.trainer = trainer
        height, width = self.size = tuple(crop_size)
        self.streams = strong_views + (trainer.pseudo_label_hook.feature_dropout > 0)
        tiles = tile_map(height, width, max(num_classes, num_segments))
        self.labels = tiles % num_classes
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        self.labeled = [{"image": image, "sem_seg": self.labels, "instances": tiles + 1}] * num_labeled
        self.unlabeled = [
            {
                "image": image,
                "strong": [image] * strong_views,
                "cutmix_box": [(0, 0, height // 2, width // 2)] * strong_views,
                "partner": i ^ 1 if i ^ 1 < num_unlabeled else i,
                "valid": torch.ones(height, width, dtype=torch.bool),
                "padded": False,
            }
            for i in range(num_unlabeled)
        ]

    @classmethod
    def from_config(cls, cfg, trainer):
        processes, num_classes = comm.get_world_size(), trainer.student.num_classes
        return cls(
            trainer,
            crop_size=cfg.INPUT.CROP_SIZE,
            num_labeled=cfg.SOLVER.IMS_PER_BATCH // processes,
            num_unlabeled=cfg.SEMI.UNLABELED_PER_BATCH // processes,
            strong_views=cfg.SEMI.STRONG_VIEWS,
            num_classes=min(num_classes, cfg.MODEL.HSQG.TOP_K) if cfg.MODEL.HSQG.ENABLED else num_classes,
            num_segments=trainer.student.target_builder.max_segments,
        )

    def __str__(self):
        pseudo = f" and {self.streams} views of {len(self.unlabeled)} unlabeled" if self.unlabeled else ""
        return "{} labeled{} images of {}x{} pixels".format(len(self.labeled), pseudo, *self.size)

    @property
    def num_images(self) -> int:
        return len(self.labeled) + self.streams * len(self.unlabeled)

    def peak(self, accumulate: int) -> int | None:
        """Take the step in this many micro-batches: peak of the memory in bytes, None if it does not fit."""
        trainer, student = self.trainer, self.trainer.student
        buffers = {name: value.clone() for name, value in student.named_buffers()}  # statistics of batch norms
        before, trainer.accumulate = trainer.accumulate, accumulate
        try:
            _reset_peak(student.device)
            moments = [] if trainer.optimizer.state else [torch.zeros_like(p) for p in student.parameters()] * 2
            self._forward_and_backward()
            del moments
            return _peak(student.device)
        except torch.OutOfMemoryError:
            return None
        finally:
            trainer.accumulate = before
            student.zero_grad(set_to_none=True)
            for name, value in student.named_buffers():
                value.copy_(buffers[name])
            gc.collect()
            torch.cuda.empty_cache()

    def _forward_and_backward(self):
        trainer, student = self.trainer, self.trainer.student
        inputs = list(self.labeled)
        if self.unlabeled:
            hook = trainer.pseudo_label_hook
            pseudo = hook.predict_pseudo_labels(self.unlabeled)
            pseudo.labels = self.labels.to(student.device).expand_as(pseudo.labels)
            inputs = hook.student_inputs(self.unlabeled, pseudo, pseudo.valid.float()) + inputs
        for part in [student.prepare_batch(inputs) for inputs in split_evenly(inputs, trainer.accumulate)]:
            with trainer.precision.autocast():
                losses = student(part)
            trainer.precision.backward(sum(value for of_kind in losses.values() for value in of_kind.values()))

    def check(self):
        """Take the step as configured and log its peak.

        Raises:
            UserError: it does not fit; names the SOLVER.ACCUMULATE with which it does.
        """
        accumulate = self.trainer.accumulate
        peak = self.peak(accumulate)
        if peak is not None:
            logger.info("The largest step, %s, fits: %.1f GB at its peak", self, peak / _GB)
            return
        message = f"SOLVER.ACCUMULATE is {accumulate}, but the largest step, {self}, does not fit into the GPU's memory"
        while accumulate < self.num_images:
            accumulate = min(2 * accumulate, self.num_images)
            peak = self.peak(accumulate)
            if peak is not None:
                raise UserError(f"{message}; set SOLVER.ACCUMULATE to {accumulate} (about {peak / _GB:.0f} GB).")
        raise UserError(
            f"{message}, not even image by image; set SOLVER.ACTIVATION_CHECKPOINTING to ('pixel_decoder', 'decoder'), "
            "and 'backbone' for a ViT, make INPUT.CROP_SIZE smaller, or train in mixed precision (SOLVER.AMP.ENABLED "
            "True)."
        )


def tile_map(height: int, width: int, count: int) -> torch.Tensor:
    """(height, width) int64: at least `count` rectangles, numbered row by row."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return row[:, None] * columns + column


def out_of_memory(trainer, error) -> UserError:
    """The message for a run that ran out of memory in the middle."""
    files = ", ".join(x["file_name"] for kind in trainer.batch.values() for x in kind)
    last = trainer.checkpointer.get_checkpoint_file() if trainer.checkpointer.has_checkpoint() else ""
    kept = (
        f"{last} is kept: continue from it with --resume and"
        if last
        else "There is no checkpoint yet: start again with"
    )
    return UserError(
        f"iteration {trainer.iter}: the GPU ran out of memory ({str(error).split('.')[0]}) with the images {files}. "
        f"{kept} SOLVER.ACCUMULATE {2 * trainer.accumulate}."
    )


def _reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device) -> int:
    """Bytes: of the GPU, or of this process for a network on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
