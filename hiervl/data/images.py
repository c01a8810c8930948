"""Reads image and label files. Every error message names the file."""

from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError

_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 swap width and height


def read_image(path: str) -> np.ndarray:
    """Decodes an image to RGB, upright (EXIF orientation applied).

    Uses PIL because it raises on a truncated file, where OpenCV returns an image
    whose lower part is gray.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UserError: the file is missing, truncated, not an image, or has more than
            8 bits per channel.
    """
    with _opened(path) as image:
        if image.mode[0] in "IF":
            raise UserError(f"image {path} has more than 8 bits per channel; convert it to 8 bits")
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> np.ndarray:
    """Converts a PIL image to uint8 (H, W, 3) RGB, rotated according to its EXIF orientation."""
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def read_label(path: str) -> np.ndarray:
    """Decodes a label map, whose single channel holds class ids.

    Returns:
        uint8 (H, W), or int32 if the file has 16 or 32 bits.

    Raises:
        UserError: the file is missing, truncated, not an image, or a color image.
    """
    with _opened(path) as image:
        if image.mode not in ("P", "L", "1") and image.mode[0] != "I":
            raise UserError(
                f"mask {path} is a color image (mode {image.mode}); save the class ids as an indexed or grayscale PNG"
            )
        label = np.array(ImageOps.exif_transpose(image))
    return label.astype(np.uint8 if label.dtype in (np.uint8, np.bool_) else np.int32)


def image_size(path: str) -> tuple[int, int]:
    """Returns (H, W) of the upright image, reading only the file's header."""
    with _opened(path) as image:
        width, height = image.size
        swapped = image.getexif().get(_ORIENTATION, 1) >= 5
    return (width, height) if swapped else (height, width)


def inspect_image(path: str) -> tuple[tuple[int, int], str]:
    """Checks that an image can be read, faster than read_image.

    Returns:
        (H, W) of the upright image, and a note on anything unusual about it ("" if nothing).

    Raises:
        UserError: in the same cases as read_image.
    """
    with _opened(path) as image:
        if image.mode[0] in "IF":
            raise UserError(f"image {path} has more than 8 bits per channel; convert it to 8 bits")
        width, height = image.size
        notes = [f"mode {image.mode}, used as RGB"] if image.mode not in ("RGB", "P") else []
        swapped = image.getexif().get(_ORIENTATION, 1) >= 5
        if image.getexif().get(_ORIENTATION, 1) != 1:
            notes.append("EXIF-rotated, used upright")
        # JPEGs are decoded at an eighth of the size; the whole file is still read, so truncation is detected.
        image.draft(image.mode, (width // 8, height // 8))
        image.load()
    return ((width, height) if swapped else (height, width)), "; ".join(notes)


@contextmanager
def _opened(path: str):
    """Opens ``path`` with PIL and turns any error inside the block into a UserError."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check DETECTRON2_DATASETS and the list that names it") from None
    # Depending on the format, PIL's readers raise any of these on broken files.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot decode {path} ({error}); replace or re-download it") from None
