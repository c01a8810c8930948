"""Inference of HierVL with four backbones: images per second and memory, of one image and of eight."""

import functools

import torch

from . import networks, timing
from .findings import Findings, Settings
from .step_speed import ORDER

_NETWORK_SECONDS = 8  # below it, no other network starts


def run(settings: Settings, findings: Findings) -> None:
    for name in ORDER[-1:] if settings.tiny else ORDER:
        if findings.seconds_left < _NETWORK_SECONDS:
            findings.note(f"Not measured, out of time: {name}.")
            continue
        model = networks.build(networks.config(name, settings)).eval()
        for images in (1, 8):
            for number_format in timing.formats(settings):
                arguments = model, name, images, number_format, settings, findings
                if not timing.fits(functools.partial(measure, *arguments)):
                    findings.note(f"Not measured, out of memory: {name}, {images} images in {number_format}.")
        del model
        timing.forget_peak(settings)


@torch.no_grad()
def measure(model, name: str, images: int, number_format: str, settings: Settings, findings: Findings) -> None:
    """The row of one network, batch and format."""
    size = networks.image_size(name, settings)
    random = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (images, 3, size, size), generator=random).float().to(settings.device)
    timing.forget_peak(settings)
    dtype, tf32 = timing.formats(settings)[number_format]
    autocast = torch.autocast(settings.device, dtype or torch.bfloat16, enabled=dtype is not None)
    with timing.products_in_tf32(tf32), autocast:
        ms = timing.medians({"predict": lambda: model.predict(batch)}, settings, rounds=5)["predict"]
    row = {"network": name, "image": size, "type": number_format, "images": images, "ms": ms}
    findings.row("Inference", row | {"images/s": 1e3 * images / ms, "peak GiB": timing.peak_gib(settings)})
