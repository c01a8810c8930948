"""Strong augmentation: changes of color and sharpness that do not move any pixel, and the boxes of CutMix.

Color jitter, grayscale and blur have UniMatch's parameters. Images are uint8 (H, W, 3) RGB. Brightness, contrast and
hue are changed with lookup tables, so that a view takes about a millisecond at 256 x 256. All randomness comes from the
generator that is passed in.
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
    """Returns a randomly color-jittered and blurred copy of ``image``.

    Args:
        image: uint8 (H, W, 3) RGB; not modified.
        rng: source of all draws.
        jitter: largest change of brightness, contrast and saturation (a factor from 1 - j to 1 + j) and of hue (up to
            j turns of the color wheel in either direction).
        jitter_prob, gray_prob, blur_prob: probabilities of the three steps.
        blur_sigma: range of the blur's standard deviation, pixels.
    """
    if rng.random() < jitter_prob:
        image = color_jitter(image, rng, *jitter)
    if rng.random() < gray_prob:
        image = _gray(image)
    if rng.random() < blur_prob:
        # With size (0, 0), OpenCV derives the kernel size from sigma.
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
    """Changes brightness, contrast, saturation and hue in random order. The amounts are strong_view's ``jitter``."""
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
    """Scales brightness: factor 0 gives black, 1 the unchanged image."""
    return cv2.LUT(image, _lookup_table(_LEVELS * factor))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales contrast: factor 0 gives the image's mean gray everywhere, 1 the unchanged image."""
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return cv2.LUT(image, _lookup_table((_LEVELS - mean) * factor + mean))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales saturation: factor 0 gives the grayscale image, 1 the unchanged image."""
    return cv2.addWeighted(image, factor, _gray(image), 1 - factor, 0)


def adjust_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Rotates the color wheel: 0 turns change nothing, 0.5 gives the complementary colors."""
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
    """Draws the box that CutMix copies from the partner image.

    Args:
        rng: source of all draws.
        height, width: size of the image, pixels.
        prob: probability of drawing a box at all.
        size: range of the box's area as a fraction of the image's.
        ratio: range of its height / width, drawn log-uniformly so that tall and wide boxes are equally likely. Sides
            longer than the image's are cut.

    Returns:
        (y0, x0, y1, x1) in pixels, y1 and x1 exclusive; or None for no box.
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


def _lookup_table(levels: np.ndarray) -> np.ndarray:
    """Rounds and clips (256,) float levels to a uint8 lookup table."""
    return np.clip(levels + 0.5, 0, 255).astype(np.uint8)
