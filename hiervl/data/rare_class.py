"""Rare-class sampling of labeled crops."""

import numpy as np

from ..errors import UserError


class RareClassSampler:
    """Draws a class, favoring rare ones, and an image that contains it.

    Follows DAFormer (Hoyer et al., CVPR 2022): P(c) = softmax_c((1 - f_c) / T), where f_c is the fraction of all
    labeled pixels that belong to class c. Classes without labeled pixels are never drawn.
    """

    def __init__(self, counts: np.ndarray, temperature: float, min_pixels: int) -> None:
        """
        Args:
            counts: int (num_images, num_classes), pixels of each class in each labeled image.
            temperature: T > 0; smaller values favor rare classes more.
            min_pixels: images (and, in the mapper, crops) with fewer pixels of the class are avoided.

        Raises:
            UserError: no pixel is labeled, or the temperature is not positive.
        """
        totals = counts.sum(axis=0)
        if not totals.any():
            raise UserError(
                "the labeled masks have no pixel of any class; check them, or disable SEMI.RARE_CLASS.ENABLED"
            )
        if temperature <= 0:
            raise UserError(f"SEMI.RARE_CLASS.TEMPERATURE is {temperature}; it must be positive")
        logits = (1 - totals / totals.sum()) / temperature
        weights = np.where(totals > 0, np.exp(logits - logits.max()), 0)
        self.probabilities = weights / weights.sum()
        self.min_pixels = min_pixels
        self._images = [self._candidates(pixels, min_pixels) for pixels in counts.T]

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draws (image index, class id)."""
        class_id = int(rng.choice(len(self.probabilities), p=self.probabilities))
        return int(rng.choice(self._images[class_id])), class_id

    @staticmethod
    def _candidates(pixels: np.ndarray, min_pixels: int) -> np.ndarray:
        """Indices of images with at least ``min_pixels`` of a class; if none, of all images that contain it.

        Args:
            pixels: (num_images,) pixels of the class.
        """
        enough = np.flatnonzero(pixels >= max(1, min_pixels))
        return enough if len(enough) else np.flatnonzero(pixels)
