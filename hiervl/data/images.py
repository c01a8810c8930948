"""Reading image and label files; every failure names the file."""

from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError

_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 swap width and height


def read_image(path: str) -> np.ndarray:
    """Decodes an image to RGB, upright (EXIF orientation applied).

    PIL, not OpenCV: for a truncated file OpenCV returns a picture with a gray
    lower part, PIL raises.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UserError: missing, truncated, not an image, or more than 8 bits deep.
    """
    with _opened(path) as image:
        if image.mode[0] in "IF":
            raise UserError(f"image {path} has more than 8 bits per channel; convert it to 8 bits")
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3), RGB, of a PIL image, turned as its EXIF orientation says."""
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def read_label(path: str) -> np.ndarray:
    """Decodes a label map: one channel whose values are class ids.

    Returns:
        uint8 (H, W), or int32 where the file has 16 or 32 bits.

    Raises:
        UserError: missing, truncated, not an image, or a color image.
    """
    with _opened(path) as image:
        if image.mode not in ("P", "L", "1") and image.mode[0] != "I":
            raise UserError(
                f"mask {path} is a color image (mode {image.mode}); class ids are expected, "
                "as an indexed or grayscale PNG"
            )
        label = np.array(ImageOps.exif_transpose(image))
    return label.astype(np.uint8 if label.dtype in (np.uint8, np.bool_) else np.int32)


def image_size(path: str) -> tuple[int, int]:
    """(H, W) of the upright image, from the file's header alone."""
    with _opened(path) as image:
        width, height = image.size
        swapped = image.getexif().get(_ORIENTATION, 1) >= 5
    return (width, height) if swapped else (height, width)


def inspect_image(path: str) -> tuple[tuple[int, int], str]:
    """Finds what would stop a run at this image, faster than read_image.

    Returns:
        (H, W) of the upright image; what is unusual, though it can be read ("" for nothing).

    Raises:
        UserError: as read_image.
    """
    with _opened(path) as image:
        if image.mode[0] in "IF":
            raise UserError(f"image {path} has more than 8 bits per channel; convert it to 8 bits")
        width, height = image.size
        notes = [f"mode {image.mode}, used as RGB"] if image.mode not in ("RGB", "P") else []
        swapped = image.getexif().get(_ORIENTATION, 1) >= 5
        if image.getexif().get(_ORIENTATION, 1) != 1:
            notes.append("EXIF-rotated, used upright")
        # JPEG only: decoded at an eighth of the size. All of the file is read nevertheless, so a cut one is noticed.
        image.draft(image.mode, (width // 8, height // 8))
        image.load()
    return ((width, height) if swapped else (height, width)), "; ".join(notes)


@contextmanager
def _opened(path: str):
    """PIL image of ``path``; whatever goes wrong inside becomes a UserError."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check DETECTRON2_DATASETS and the list that names it") from None
    # PIL's readers raise all of these on broken files, depending on the format.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot decode {path} ({error}); replace or re-download it") from None
