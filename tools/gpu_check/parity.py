"""The same weights, images and random points on the CPU and on the GPU: losses, gradients, probabilities.

In float32 without TF32. On a CPU alone, the second network uses the PyTorch path of the deformable attention instead of
the kernel: as on a GPU, sums are then rounded differently.
"""

import contextlib
import math

import torch

from hiervl.ops.function import reference_path

from . import networks
from .findings import Findings, Settings

RELATIVE, ABSOLUTE = 1e-3, 1e-4  # of losses and gradients; of probabilities
_SMALL_LOSS = 0.01  # below it, the difference counts rather than the ratio
# name: (images of each kind, their side)
CASES = {"shapes": (4, 64), "CamVid": (2, 128), "CLIP ViT-B/16": (1, 128)}


def run(settings: Settings, findings: Findings) -> None:
    for name, (images, size) in CASES.items():
        compare(name, 1 if settings.tiny else images, networks.TINY_SIZE if settings.tiny else size, settings, findings)


def compare(name: str, images: int, size: int, settings: Settings, findings: Findings) -> None:
    """Checks and a row of one network."""
    cfg = networks.config(name, settings)
    network = networks.build(cfg)
    networks.leave_pixel_centers(network)
    cfg.MODEL.DEVICE = "cpu"
    expected = networks.build(cfg)
    expected.load_state_dict({key: value.cpu() for key, value in network.state_dict().items()})
    inputs = networks.training_inputs(images, images, size, network)
    images = torch.stack([x["image"] for x in inputs]).float()
    results = []
    for model, other_path in ((network, not settings.on_gpu), (expected, False)):
        with reference_path() if other_path else contextlib.nullcontext():
            with torch.no_grad():
                probabilities = model.eval().predict(images.to(model.device)).dense().cpu()
            results.append((*networks.losses_and_gradients(model, model, inputs), probabilities))
    (losses, gradients, probabilities), (true_losses, true_gradients, true_probabilities) = results
    findings.check(f"{name}: the same losses", losses.keys() == true_losses.keys(), len(losses), len(true_losses))
    loss, error = worst(loss_errors(losses, true_losses))
    findings.at_most(f"{name}: {loss}, relative", error, RELATIVE)
    of_part = gradient_errors(gradients, true_gradients)
    part, error = worst(of_part)
    findings.at_most(f"{name}: gradients of {part}, relative", error, RELATIVE)
    difference = float((probabilities - true_probabilities).abs().max())
    findings.at_most(f"{name}: probabilities", difference, ABSOLUTE)
    for part, error in of_part.items():
        findings.row("Relative difference of the gradients", {"network": name, "part": part, "difference": error})


def worst(errors: dict[str, float]) -> tuple[str, float]:
    """The name with the greatest error, and the error; NaN is the greatest."""
    return max(errors.items(), key=lambda item: (math.isnan(item[1]), item[1]))


def loss_errors(losses: dict, expected: dict) -> dict[str, float]:
    """Relative difference of each loss."""
    return {name: abs(losses[name] - value) / max(abs(value), _SMALL_LOSS) for name, value in expected.items()}


def gradient_errors(gradients: dict, expected: dict) -> dict[str, float]:
    """Norm of the difference over the norm, of the parameters of each part of the network together."""
    errors = {}
    for part in dict.fromkeys(name.split(".")[0] for name in expected):
        names = [name for name in expected if name.split(".")[0] == part]
        norm = torch.cat([expected[name].flatten() for name in names]).norm()
        difference = torch.cat([(gradients[name] - expected[name]).flatten() for name in names]).norm()
        errors[part] = float(difference / norm.clamp(min=1e-12))
    return errors
