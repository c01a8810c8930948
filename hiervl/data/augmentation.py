"""The strong view: color changes that leave every pixel where it is.

Jitter, gray and blur with the strengths of UniMatch, plus CutMix boxes. Images
are uint8 (H, W, 3) RGB; brightness, contrast and hue of a uint8 image are
look-up tables, which makes a view cost about a millisecond at 256 x 256. All
randomness comes from the given generator.
"""

import math

import cv2
import numpy as np

_LEVELS = np.arange(256, dtype=np.float32)


def strong_view(
    image: np.ndarray,
    rng: np.random.Generator,
    jitter: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.25),
    jitter_prob: float = 0.8,
    gray_prob: float = 0.2,
    blur_prob: float = 0.5,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
) -> np.ndarray:
    """A randomly recolored and blurred copy of ``image``.

    Args:
        image: uint8 (H, W, 3) RGB; not changed.
        jitter: largest change of brightness, contrast and saturation (factors
            in 1 +- j) and of hue (turns of the color circle, +- j).
        jitter_prob, gray_prob, blur_prob: how often each step happens.
        blur_sigma: range of the blur's standard deviation, pixels.
    """
    if rng.random() < jitter_prob:
        image = color_jitter(image, rng, *jitter)
    if rng.random() < gray_prob:
        image = _gray(image)
    if rng.random() < blur_prob:
        # Size 0: OpenCV picks the kernel from sigma.
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(*blur_sigma))
    return image.copy()


def color_jitter(
    image: np.ndarray,
    rng: np.random.Generator,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, in random order."""
    steps = [
        (adjust_brightness, rng.uniform(max(0, 1 - brightness), 1 + brightness)),
        (adjust_contrast, rng.uniform(max(0, 1 - contrast), 1 + contrast)),
        (adjust_saturation, rng.uniform(max(0, 1 - saturation), 1 + saturation)),
        (adjust_hue, rng.uniform(-hue, hue)),
    ]
    for i in rng.permutation(len(steps)):
        adjust, amount = steps[i]
        image = adjust(image, amount)
    return image


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """factor 0 is black, 1 the image."""
    return cv2.LUT(image, _table(_LEVELS * factor))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """factor 0 is the image's mean gray everywhere, 1 the image."""
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return cv2.LUT(image, _table((_LEVELS - mean) * factor + mean))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """factor 0 is the gray image, 1 the image."""
    return cv2.addWeighted(image, factor, _gray(image), 1 - factor, 0)


def adjust_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Turns the color circle: 0 is the image, 0.5 its complementary colors."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # hue in 0..255
    shift = round(turns * 256)
    hsv[..., 0] = cv2.LUT(hsv[..., 0], np.roll(_LEVELS, -shift).astype(np.uint8))
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def cutmix_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    prob: float = 0.5,
    size: tuple[float, float] = (0.02, 0.4),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> tuple[int, int, int, int] | None:
    """The box that CutMix takes from the partner image.

    Args:
        height, width: of the image, pixels.
        prob: how often there is a box.
        size: range of the box's share of the image.
        ratio: range of its height over its width, drawn log-uniformly so that
            upright and lying boxes are equally likely. What would stick out of
            the image is cut off.

    Returns:
        (y0, x0, y1, x1), pixels, ends exclusive; or None.
    """
    if rng.random() >= prob:
        return None
    area = rng.uniform(*size) * height * width
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    box_h = min(height, max(1, round(math.sqrt(area * aspect))))
    box_w = min(width, max(1, round(math.sqrt(area / aspect))))
    y0 = int(rng.integers(height - box_h + 1))
    x0 = int(rng.integers(width - box_w + 1))
    return y0, x0, y0 + box_h, x0 + box_w


def _gray(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _table(levels: np.ndarray) -> np.ndarray:
    return np.clip(levels + 0.5, 0, 255).astype(np.uint8)
