"""Reads and writes the files of a prepared dataset: masks, lists, downloads."""

import contextlib
import io
import os
from collections.abc import Iterable

import numpy as np
from PIL import Image

from ...errors import UserError
from ...utils.files import replace_file

PARTIAL = ".tmp"  # fixed, so that the files that a killed process leaves behind can be found and removed


class WriteError(UserError):
    """A file cannot be written. This ends the run, because the next file would most likely fail, too."""


def write_whole(path: str, content: bytes) -> None:
    """Writes a file as a whole or not at all; creates its folder.

    Unlike a checkpoint, the file is not synced to disk: for 10^5 masks that would take hours, and a rerun validates
    every mask anyway.

    Raises:
        WriteError: the file cannot be written (no space, no permission). No partial file is left.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with replace_file(path, temporary=path + PARTIAL, sync=False) as file:
            file.write(content)
    except OSError as error:
        raise WriteError(
            f"cannot write {path} ({error.strerror or error}); free some space or choose another folder, and run "
            "again (finished files are kept)"
        ) from None


def remove_partial(path: str) -> None:
    """Removes the partial file that a killed process left behind."""
    with contextlib.suppress(OSError):
        os.remove(path + PARTIAL)


def write_label(path: str, label: np.ndarray, palette: bytes | None = None) -> None:
    """Writes ids (H, W) as a PNG: uint8 with the colors of ``palette``, uint16 (instance maps) as grayscale."""
    image = Image.fromarray(label)
    if palette is not None:
        image = image.convert("P") if image.mode != "L" else _indexed(label)
        image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())


def palette_of(colors: Iterable[tuple[int, int, int]], ignore_label: int) -> bytes:
    """The palette of an indexed PNG, 256 x (R, G, B); ignored pixels are white, ids without a class black."""
    palette = np.zeros((256, 3), np.uint8)
    colors = list(colors)[:256]
    palette[: len(colors)] = colors
    if len(colors) <= ignore_label < 256:
        palette[ignore_label] = 255
    return palette.tobytes()


def list_line(image: str, mask: str = "") -> str:
    """A line of a list: names separated by a space, or by a tab if one of them contains spaces."""
    if any(c.isspace() for c in image + mask):
        return f"{image}\t{mask}"
    return f"{image} {mask}" if mask else image


def write_lines(path: str, lines: Iterable[str]) -> None:
    """Writes a text file; each line ends with a newline."""
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def read_lines(path: str) -> list[str]:
    """The non-empty lines of a UTF-8 text file.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.rstrip("\r\n") for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def _indexed(label: np.ndarray) -> Image.Image:
    """An indexed image whose indices are the ids (H, W); ``convert("P")`` would change them."""
    return Image.frombytes("P", (label.shape[1], label.shape[0]), np.ascontiguousarray(label).tobytes())
