"""Training steps with four backbones: images per second and memory in three number formats, and shares of time.

8 labeled and 8 unlabeled images of noise, these in three streams (two strong views, one with feature dropout), or fewer
if they do not fit; without reading data.
"""

import tempfile

from hiervl.semi.precision import MixedPrecision

from . import networks, timing
from .findings import Findings, Settings
from .step_trainer import OVERRIDES, StepTrainer, step_parts

ORDER = ("CLIP ViT-B/16", "R50", "DINOv2 ViT-B/14", "DINOv2 ViT-S/14")
BATCHES = (8, 4, 2, 1)
_NETWORK_SECONDS = 12  # below it, no other network starts
_ROUNDS, _KERNELS = 3, 10


def run(settings: Settings, findings: Findings) -> None:
    names = ORDER[-1:] if settings.tiny else ORDER
    for name in names:
        if findings.seconds_left < _NETWORK_SECONDS:
            findings.note(f"Not measured, out of time: {name}.")
            continue
        with tempfile.TemporaryDirectory() as output, networks.untrained_clip():
            trainer = StepTrainer(networks.config(name, settings, *OVERRIDES, "OUTPUT_DIR", output))
            for number_format, (dtype, tf32) in timing.formats(settings).items():
                trainer.precision = MixedPrecision(trainer.student.device, dtype is not None, "bfloat16")
                with timing.products_in_tf32(tf32):
                    ms = measure(trainer, name, number_format, settings, findings)
                    if ms and dtype:
                        show_parts(trainer, name, settings, findings)
                        if name == names[0]:
                            show_kernels(trainer, name, ms, settings, findings)
            del trainer
        timing.forget_peak(settings)


def measure(trainer: StepTrainer, name: str, number_format: str, settings: Settings, findings: Findings) -> float:
    """The row of one network in one format. Returns milliseconds of a step; 0 if it does not fit into memory."""
    size = networks.image_size(name, settings)
    images = largest_batch(trainer, size, settings)
    if not images:
        findings.note(f"Not measured, out of memory: {name} in {number_format}.")
        return 0.0
    timing.forget_peak(settings)
    ms = timing.medians({"step": trainer.step}, settings, _ROUNDS)["step"]
    seen = images * (1 + trainer.streams)
    batch = f"{images} + {images} x {trainer.streams}"
    row = {"network": name, "image": size, "type": number_format, "images": batch, "step ms": ms}
    findings.row("Training step", row | {"images/s": 1e3 * seen / ms, "peak GiB": timing.peak_gib(settings)})
    return ms


def largest_batch(trainer: StepTrainer, size: int, settings: Settings) -> int:
    """The first of BATCHES whose step fits into memory; 0 if none does."""
    for images in BATCHES[-1:] if settings.tiny else BATCHES:
        trainer.use_batch(images, size)
        is_first = not trainer.optimizer.state  # it makes the optimizer's state, which the next one must fit beside
        if timing.fits(trainer.step) and (not is_first or timing.fits(trainer.step)):
            return images
        trainer.forget()
        timing.forget_peak(settings)
    return 0


def show_parts(trainer: StepTrainer, name: str, settings: Settings, findings: Findings) -> None:
    """Where the time of a step goes, by part of the network."""
    parts = step_parts(trainer, settings)
    whole = sum(parts.values())
    for part, ms in parts.items():
        row = {"network": name, "part": part, "ms": ms, "share %": 100 * ms / whole}
        findings.row("Parts of a step in bfloat16", row)


def show_kernels(trainer: StepTrainer, name: str, step_ms: float, settings: Settings, findings: Findings) -> None:
    """Where the time of a step goes, by kernel; the share of all of them is that in which the GPU works."""
    kernels = timing.kernel_times(trainer.step, settings)
    own = sum(ms for kernel, ms in kernels.items() if "hiervl" in kernel)
    summary = (("all", sum(kernels.values())), ("hiervl's own", own))
    for kernel, ms in (*summary, *list(kernels.items())[:_KERNELS]):
        row = {"network": name, "kernel": kernel[:100], "ms": ms, "share of the step %": 100 * ms / step_ms}
        findings.row("Kernels of a step in bfloat16", row)
