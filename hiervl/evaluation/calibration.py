"""Reliability of the predicted probabilities: when the model says 0.9, is it right nine times in ten?

Pseudo-labels are chosen by confidence, so a threshold means something only if the answer is close to yes.
"""

import numpy as np
import torch

NUM_BINS = 15
# Confidences are counted in fine bins, 4096 to each of the 15: all that is reported later can be read off one
# histogram of constant size, and the rounding (less than 1e-5) is far below what is printed.
_FINE_PER_BIN = 4096
_FINE = NUM_BINS * _FINE_PER_BIN
_WRONG, _RIGHT, _IGNORED = range(3)


class Calibration:
    """Streaming histogram of the top class's probability and of whether that class was right.

    Attributes:
        counts: (61440, 2) int64: pixels per fine bin of confidence, [:, 0] wrong and [:, 1] right.
    """

    def __init__(self):
        self.counts = np.zeros((_FINE, 2), np.int64)

    def update(self, confidence: torch.Tensor, right: np.ndarray, valid: np.ndarray) -> None:
        """Counts one image.

        Args:
            confidence: (H, W) float, max over classes of p̂, in [0, 1] up to rounding.
            right: (H, W) bool, the top class is the labeled one.
            valid: (H, W) bool, the pixel has a label.

        Raises:
            ValueError: a confidence outside [0, 1]: the scores are not probabilities.
        """
        low, high = (float(v) for v in torch.aminmax(confidence))
        if not (low >= -1e-4 and high <= 1 + 1e-3):
            raise ValueError(f"confidences from {low:.4g} to {high:.4g} are not probabilities")
        outcome = np.where(valid, right, np.uint8(_IGNORED))
        fine = (confidence.detach().float().cpu().reshape(-1) * _FINE).to(torch.int32).clamp_(0, _FINE - 1)
        cells = fine.mul_(3).add_(torch.from_numpy(outcome.reshape(-1)))
        counts = torch.bincount(cells, minlength=3 * _FINE).view(_FINE, 3)
        self.counts += counts[:, [_WRONG, _RIGHT]].numpy()

    def merge(self, other: "Calibration") -> None:
        """Adds the counts of another histogram (another rank's)."""
        self.counts += other.counts

    def bins(self) -> list[dict]:
        """The 15 bins of the reliability diagram.

        Returns:
            one dict per bin: ``low`` and ``high`` (its ends), ``pixels``, and ``confidence`` and ``accuracy``
            (means in [0, 1]; None for an empty bin).
        """
        center = (np.arange(_FINE) + 0.5) / _FINE
        fine_pixels = self.counts.sum(1)
        pixels = fine_pixels.reshape(NUM_BINS, -1).sum(1)
        right = self.counts[:, _RIGHT].reshape(NUM_BINS, -1).sum(1)
        confidence = (fine_pixels * center).reshape(NUM_BINS, -1).sum(1)
        return [
            {
                "low": i / NUM_BINS,
                "high": (i + 1) / NUM_BINS,
                "pixels": int(n),
                "confidence": float(confidence[i] / n) if n else None,
                "accuracy": float(right[i] / n) if n else None,
            }
            for i, n in enumerate(pixels)
        ]

    def ece(self) -> float:
        """Expected calibration error: mean over pixels of |accuracy - confidence| of their bin, in [0, 1].

        Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3. NaN if nothing was counted.
        """
        bins = [b for b in self.bins() if b["pixels"]]
        total = sum(b["pixels"] for b in bins)
        if not total:
            return float("nan")
        return sum(b["pixels"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / total

    def above(self, threshold: float) -> dict:
        """What a confidence threshold would keep.

        Returns:
            ``threshold``, ``kept`` (share of valid pixels at or above it) and ``accuracy`` (of these; None if none).
        """
        total, first = int(self.counts.sum()), round(threshold * _FINE)
        pixels, right = int(self.counts[first:].sum()), int(self.counts[first:, _RIGHT].sum())
        return {
            "threshold": threshold,
            "kept": pixels / total if total else None,
            "accuracy": right / pixels if pixels else None,
        }
