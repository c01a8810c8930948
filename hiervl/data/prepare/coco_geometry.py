"""Converts the shapes of COCO annotations to run-length encodings, after validation.

pycocotools does not validate its inputs: its C code can crash or exhaust the memory on malformed shapes. Every
function here raises ValueError with the reason if a shape cannot be used.
"""

import re
import reprlib

import numpy as np
from pycocotools import mask as rle

LIMIT = 1e9  # largest coordinate in pixels; float64 represents everything computed from it exactly
# pycocotools needs 80 bytes per pixel of an outline, even outside the image. Larger polygons go to clipped_region.
_MAX_COORDINATE, _MAX_LENGTH = 1e5, 1e6  # pixels
_NUMBER_TYPES = {int, float}  # exact types, because bool is a subclass of int


def is_empty(shape: object) -> bool:
    """Whether a segmentation has no area: null, empty, or only polygons with fewer than three points."""
    if isinstance(shape, list):
        return all(isinstance(polygon, list) and len(polygon) < 6 for polygon in shape)
    return shape is None or shape == {}


def is_box(box: object) -> bool:
    """Whether this is [x, y, width, height] with valid coordinates and a positive area."""
    return (
        isinstance(box, list)
        and len(box) == 4
        and set(map(type, box)) <= _NUMBER_TYPES
        and all(abs(number) <= LIMIT for number in box)
        and box[2] > 0
        and box[3] > 0
    )


def box_region(box: list, size: tuple[int, int]) -> dict:
    """Run-length encoding of the pixels that a box touches, in an image of size (H, W)."""
    x, y, width, height = map(float, box)
    mask = np.zeros(size, np.uint8, order="F")
    top, left = (max(int(np.floor(start)), 0) for start in (y, x))
    bottom, right = (max(int(np.ceil(end)), 0) for end in (y + height, x + width))
    mask[top:bottom, left:right] = 1
    return rle.encode(mask)


def shape_region(shape: object, size: tuple[int, int]) -> dict:
    """Run-length encoding of a segmentation in an image of size (H, W).

    Args:
        shape: a list of polygons, or a run-length encoding, compressed or not.
    """
    if isinstance(shape, list):
        return rle.merge([_polygon_region(points, size) for points in map(_parse_polygon, shape) if len(points) >= 3])
    if not isinstance(shape, dict):
        raise ValueError(f"{reprlib.repr(shape)} is neither a list of polygons nor a run-length encoding")
    return _run_length_region(shape, size)


def _parse_polygon(polygon: object) -> np.ndarray:
    """Converts [x0, y0, x1, y1, ...] to float64 (N, 2)."""
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= _NUMBER_TYPES:
        raise ValueError(f"the polygon {reprlib.repr(polygon)} is not a list of numbers")
    if len(polygon) % 2:
        raise ValueError(f"a polygon has {len(polygon)} coordinates, which is not an even number")
    invalid = next((number for number in polygon if not abs(number) <= LIMIT), None)
    if invalid is not None:
        raise ValueError(f"the coordinate {reprlib.repr(invalid)} is not a number between -{LIMIT:g} and {LIMIT:g}")
    return np.array(polygon, np.float64).reshape(-1, 2)


def _polygon_region(points: np.ndarray, size: tuple[int, int]) -> dict:
    """Run-length encoding of a polygon (N, 2)."""
    length = np.abs(points - np.roll(points, -1, axis=0)).max(axis=1).sum()
    if length <= _MAX_LENGTH and np.abs(points).max() <= _MAX_COORDINATE:
        return rle.frPyObjects([points.ravel().tolist()], *size)[0]
    return clipped_region(points, size)


def clipped_region(points: np.ndarray, size: tuple[int, int]) -> dict:
    """Run-length encoding of a polygon (N, 2) of any extent; memory depends on the image size only.

    Gives the same pixels as pycocotools by following its rule: corners are rounded to fifths of a pixel, and an
    edge enters or leaves the polygon in column x where it steps between the fifths 5x + 2 and 5x + 3.
    """
    corners = np.trunc(5 * points + 0.5)
    toggles = np.zeros(size[0] * size[1] + 1, np.uint8)  # column-major, with one extra element after the last pixel
    for start, end in zip(corners, np.roll(corners, -1, axis=0)):
        np.add.at(toggles, _crossings(start, end, size), 1)
    inside = np.bitwise_xor.accumulate(toggles[:-1] & 1)
    return rle.encode(inside.reshape(size, order="F"))


def _crossings(start: np.ndarray, end: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where an edge crosses the columns of an image.

    Args:
        start, end: the edge's ends (x, y), in fifths of a pixel.
        size: (H, W) of the image.

    Returns:
        int64 (N,): column-major pixel indices, one for each column that is crossed.
    """
    height, width = size
    dx, dy = np.abs(end - start)
    left, right = min(start[0], end[0]), max(start[0], end[0])
    columns = np.arange(max(np.ceil((left - 2) / 5), 0), min(np.floor((right - 3) / 5), width - 1) + 1)
    if not len(columns):
        return columns.astype(np.int64)
    fifths = 5 * columns + 2
    if dx >= dy:
        (x, y), (_, y_end) = (start, end) if start[0] <= end[0] else (end, start)
        slope = (y_end - y) / dx
        rows = np.minimum(*(np.trunc(y + slope * (fifths + step - x) + 0.5) for step in (0, 1)))
    else:
        (x, y), (x_end, _) = (start, end) if start[1] <= end[1] else (end, start)
        rows = y + _last_step(x, (x_end - x) / dy, fifths)
    rows = np.ceil(np.clip((rows + 0.5) / 5 - 0.5, 0, height))
    return (columns * height + rows).astype(np.int64)


def _last_step(x: float, slope: float, fifths: np.ndarray) -> np.ndarray:
    """The last step down a steep edge before it crosses the right border of each fifth.

    Args:
        x: where the edge begins.
        slope: change of x per step.
        fifths: (N,), in fifths of a pixel.

    Returns:
        (N,): numbers of steps.
    """

    def is_before_crossing(steps):
        reached = np.trunc(x + slope * steps + 0.5)
        return reached <= fifths if slope > 0 else reached > fifths

    estimate = np.floor((fifths + 0.5 - x) / slope)  # off by at most one
    steps = estimate - 1
    for step in (estimate, estimate + 1):
        steps = np.where(is_before_crossing(step), step, steps)
    return steps


def _run_length_region(shape: dict, size: tuple[int, int]) -> dict:
    """Validates a run-length encoding, compressed or not, and compresses it."""
    rle_size, counts = shape.get("size"), shape.get("counts")
    if not isinstance(rle_size, list) or set(map(type, rle_size)) != {int} or tuple(rle_size) != size:
        raise ValueError(f"its size is {reprlib.repr(rle_size)}, but that of the image is {list(size)}")
    if isinstance(counts, str):
        counts = unpack_counts(counts)
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        raise ValueError(f"its counts {reprlib.repr(counts)} are neither a list of integers nor a string")
    if min(counts, default=0) < 0:
        raise ValueError(f"its counts contain the negative number {reprlib.repr(min(counts))}")
    pixels = size[0] * size[1]
    if sum(counts) != pixels:
        raise ValueError(f"its counts add up to {reprlib.repr(sum(counts))}, but the image has {pixels} pixels")
    return rle.frPyObjects({"size": rle_size, "counts": counts}, *size)


def unpack_counts(text: str) -> list[int]:
    """Decodes the counts of a compressed string.

    Each character holds 5 bits of a number, lowest bits first, and a sixth bit that is set if more follow. The
    highest bit of a number is its sign. From the fourth number on, it is the difference from the count two before it.
    """
    invalid = re.search("[^0-o]", text)
    if invalid:
        raise ValueError(f"its counts contain the character {invalid[0]!r}, which compressed counts cannot have")
    counts, value, bits = [], 0, 0
    for code in text.encode():
        code -= 48
        value |= (code & 31) << bits
        bits += 5
        if code & 32:
            if bits == 35:
                raise ValueError(f"number {len(counts) + 1} of its counts is too long")
            continue
        if code & 16:
            value -= 1 << bits
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = bits = 0
    if bits:
        raise ValueError("its counts end in the middle of a number")
    return counts
