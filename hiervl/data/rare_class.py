"""Rare-class sampling of labeled crops."""

import numpy as np

from ..errors import UserError


class RareClassSampler:
    """Draws a class, rare ones more often, and an image that has it.

    The rule of DAFormer (Hoyer et al., CVPR 2022): P(c) = softmax_c((1 - f_c) / T), f_c the class's share of
    all labeled pixels. Classes without a labeled pixel are never drawn.
    """

    def __init__(self, counts: np.ndarray, temperature: float, min_pixels: int) -> None:
        """
        Args:
            counts: int (images, classes), pixels of each class in each labeled image.
            temperature: T; the smaller, the more often rare classes are drawn.
            min_pixels: images (and, in the mapper, crops) with fewer pixels of the class are avoided.
        """
        totals = counts.sum(axis=0)
        if not totals.any():
            raise UserError("the labeled masks hold no pixel of any class; rare-class sampling has nothing to draw")
        if temperature <= 0:
            raise UserError(f"SEMI.RARE_CLASS.TEMPERATURE is {temperature}; it must be positive")
        logits = (1 - totals / totals.sum()) / temperature
        weights = np.where(totals > 0, np.exp(logits - logits.max()), 0)
        self.probabilities = weights / weights.sum()
        self.min_pixels = min_pixels
        self._images = [self._candidates(of_class, min_pixels) for of_class in counts.T]

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """(image, class)."""
        drawn = int(rng.choice(len(self.probabilities), p=self.probabilities))
        return int(rng.choice(self._images[drawn])), drawn

    @staticmethod
    def _candidates(pixels: np.ndarray, min_pixels: int) -> np.ndarray:
        enough = np.flatnonzero(pixels >= max(1, min_pixels))
        return enough if len(enough) else np.flatnonzero(pixels)
