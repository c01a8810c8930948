"""The evaluator on scores that the network has left on the GPU: images per second, and where the time goes."""

from tools.benchmark import evaluation

from .findings import Findings, Settings


def run(settings: Settings, findings: Findings) -> None:
    images, distinct = (2, 1) if settings.tiny else (60, 2)
    evaluation.evaluate(distinct, settings.device, distinct)  # loads the kernels
    result = evaluation.evaluate(images, settings.device, distinct)
    whole = float(result["whole"][0])
    size = f"{evaluation.WIDTH}x{evaluation.HEIGHT}"
    row = {"image": size, "classes": evaluation.CLASSES, "images": images, "images/s": images / whole}
    findings.row("Evaluation without the network", row)
    for part, seconds in result["times"].items():
        ms = 1e3 * float(seconds[0]) / images
        findings.row("Parts", {"part": part, "ms per image": ms, "share %": 100 * float(seconds[0]) / whole})
