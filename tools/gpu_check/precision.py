"""The same 20 iterations in each number format: losses are finite and close to those of float32."""

import math
import statistics

from hiervl.errors import UserError

from . import shapes_run
from .findings import Findings, Settings

FORMATS = {
    "float32": ("SOLVER.TF32", False),
    "bfloat16": ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"),
    "float16": ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"),
}
FIRST, ALL = 0.01, 0.05  # relative difference to float32: of the first loss (same weights), of the mean over all
# float16 starts at 2**16 and skips steps until nothing overflows; a run of 20 iterations starts where that ends.
_SCALE = 2.0**8


def run(settings: Settings, findings: Findings) -> None:
    iterations = 4 if settings.tiny else 20
    found = {}
    with shapes_run.shapes_folder() as folder:
        for name, options in FORMATS.items():
            pairs = shapes_run.overrides(settings, folder / name, iterations, *options)
            try:
                trainer = shapes_run.make_trainer(pairs, shapes_run.ShortRun)
            except UserError as reason:  # a card without this format
                findings.note(f"{name}: not run: {reason}")
                continue
            if trainer.precision.scaler.is_enabled():
                trainer.precision.scaler.load_state_dict(trainer.precision.scaler.state_dict() | {"scale": _SCALE})
            trainer.train()
            found[name] = shapes_run.logged(folder / name, "total_loss")
            judge(name, found, iterations, findings)
            mean = statistics.mean(found[name])
            row = {"format": name, "first loss": found[name][0], "mean loss": mean, "last loss": found[name][-1]}
            findings.row("Losses", row | {"skipped steps": trainer.precision.skipped})
            del trainer


def judge(name: str, found: dict[str, list[float]], iterations: int, findings: Findings) -> None:
    """Checks of one format."""
    losses, expected = found[name], found["float32"]
    finite = len(losses) == iterations and all(map(math.isfinite, losses))
    findings.check(f"{name}: {iterations} finite losses", finite, len(losses), iterations)
    if name != "float32":
        findings.at_most(f"{name}: first loss against float32", abs(losses[0] / expected[0] - 1), FIRST)
        difference = abs(statistics.mean(losses) / statistics.mean(expected) - 1)
        findings.at_most(f"{name}: mean loss against float32", difference, ALL)
