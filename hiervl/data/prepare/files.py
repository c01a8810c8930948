"""Files that are whole or absent: masks, lists, downloads."""

import contextlib
import io
import os
from collections.abc import Iterable

import numpy as np
from PIL import Image

from ...errors import UserError

PARTIAL = ".tmp"


class WriteError(UserError):
    """A file cannot be written: no use in going on with the next one."""


def write_whole(path: str, content: bytes) -> None:
    """Writes a file such that it is there as a whole or not at all; makes its folder.

    No fsync, unlike checkpoints: a rerun decodes every mask anyway, and 10^5 of them would take hours.

    Raises:
        WriteError: no space, no permission. Nothing is left behind.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path + PARTIAL, "wb") as file:
            file.write(content)
        os.replace(path + PARTIAL, path)
    except OSError as error:
        remove_partial(path)
        raise WriteError(
            f"cannot write {path} ({error.strerror or error}); make room, or choose another folder, and run again: "
            "it goes on with what is missing"
        ) from None


def remove_partial(path: str) -> None:
    """Removes what a killed process was writing."""
    with contextlib.suppress(OSError):
        os.remove(path + PARTIAL)


def write_label(path: str, label: np.ndarray, palette: bytes | None = None) -> None:
    """Writes (H, W) ids as PNG: uint8 with the colors of ``palette``, uint16 (instance maps) in gray."""
    image = Image.fromarray(label)
    if palette is not None:
        image = image.convert("P") if image.mode != "L" else _indexed(label)
        image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())


def palette_of(colors: Iterable[tuple[int, int, int]], ignore_label: int) -> bytes:
    """256 x (R, G, B) of an indexed PNG; ids without a class are white where ignored, else black."""
    palette = np.zeros((256, 3), np.uint8)
    colors = list(colors)[:256]
    palette[: len(colors)] = colors
    if len(colors) <= ignore_label < 256:
        palette[ignore_label] = 255
    return palette.tobytes()


def list_line(image: str, mask: str = "") -> str:
    """A line of a list; names with spaces are separated by a tab."""
    if any(c.isspace() for c in image + mask):
        return f"{image}\t{mask}"
    return f"{image} {mask}" if mask else image


def write_lines(path: str, lines: Iterable[str]) -> None:
    """Writes a text file whose every line ends in a newline."""
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def read_lines(path: str) -> list[str]:
    """The lines of a text file, without empty ones.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.rstrip("\r\n") for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def _indexed(label: np.ndarray) -> Image.Image:
    """An indexed image whose indices are ``label`` itself (convert("P") would quantize)."""
    return Image.frombytes("P", (label.shape[1], label.shape[0]), np.ascontiguousarray(label).tobytes())
