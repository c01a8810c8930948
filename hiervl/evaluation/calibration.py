"""Calibration of the predicted probabilities: of the pixels predicted with confidence 0.9, are 90% correct?

Pseudo-labels are selected by confidence, so a threshold is meaningful only if confidence and accuracy agree.
"""

import numpy as np
import torch

NUM_BINS = 15
# Confidences are counted in fine bins, 4096 for each of the 15 bins. All reported values are computed from this one
# histogram of constant size, and the rounding error (less than 1e-5) is far below the printed precision.
_FINE_PER_BIN = 4096
_NUM_FINE = NUM_BINS * _FINE_PER_BIN
_WRONG, _RIGHT, _IGNORED = range(3)


class Calibration:
    """Streaming histogram of the top class's probability, split by whether that class is correct.

    Attributes:
        counts: (61440, 2) int64, pixels per fine confidence bin: [:, 0] incorrect, [:, 1] correct.
    """

    def __init__(self):
        self.counts = np.zeros((_NUM_FINE, 2), np.int64)

    def update(self, confidence: torch.Tensor, right: np.ndarray, valid: np.ndarray) -> None:
        """Counts one image.

        Args:
            confidence: (H, W) float, maximum over classes of the probabilities, in [0, 1] up to rounding.
            right: (H, W) bool, whether the top class is the labeled one.
            valid: (H, W) bool, whether the pixel has a label.

        Raises:
            ValueError: a confidence is outside [0, 1], so the scores are not probabilities.
        """
        low, high = (float(v) for v in torch.aminmax(confidence))
        if not (low >= -1e-4 and high <= 1 + 1e-3):
            raise ValueError(f"confidences from {low:.4g} to {high:.4g} are not probabilities")
        outcome = np.where(valid, right, np.uint8(_IGNORED))
        fine = (confidence.detach().float().cpu().reshape(-1) * _NUM_FINE).to(torch.int32).clamp_(0, _NUM_FINE - 1)
        cells = fine.mul_(3).add_(torch.from_numpy(outcome.reshape(-1)))  # (H*W,)
        counts = torch.bincount(cells, minlength=3 * _NUM_FINE).view(_NUM_FINE, 3)
        self.counts += counts[:, [_WRONG, _RIGHT]].numpy()

    def merge(self, other: "Calibration") -> None:
        """Adds the counts of another histogram, such as that of another rank."""
        self.counts += other.counts

    def bins(self) -> list[dict]:
        """Computes the 15 bins of the reliability diagram.

        Returns:
            one dict per bin with its bounds ``low`` and ``high``, ``pixels``, and the means ``confidence`` and
            ``accuracy`` in [0, 1], which are None for an empty bin.
        """
        center = (np.arange(_NUM_FINE) + 0.5) / _NUM_FINE
        fine_pixels = self.counts.sum(1)
        pixels = fine_pixels.reshape(NUM_BINS, -1).sum(1)  # (NUM_BINS * 4096,) -> (NUM_BINS,), like the sums below
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
        """Expected calibration error, in [0, 1]: mean over pixels of |accuracy - confidence| of the pixel's bin.

        Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3. NaN if nothing was counted.
        """
        bins = [b for b in self.bins() if b["pixels"]]
        total = sum(b["pixels"] for b in bins)
        if not total:
            return float("nan")
        return sum(b["pixels"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / total

    def above(self, threshold: float) -> dict:
        """Computes how many pixels pass a confidence threshold, and how accurate these are.

        Returns:
            ``threshold``; ``kept``, the share of valid pixels at or above it; ``accuracy`` of these pixels. The last
            two are None if there are no such pixels to average over.
        """
        total, first = int(self.counts.sum()), round(threshold * _NUM_FINE)
        pixels, right = int(self.counts[first:].sum()), int(self.counts[first:, _RIGHT].sum())
        return {
            "threshold": threshold,
            "kept": pixels / total if total else None,
            "accuracy": right / pixels if pixels else None,
        }
