"""Shapes of COCO annotations, checked before pycocotools sees them: its C code trusts whatever it is given.

Every function raises ValueError with the reason when a shape cannot be used.
"""

import re
import reprlib

import numpy as np
from pycocotools import mask as rle

LIMIT = 1e9  # of a coordinate, in pixels; float64 is exact for all that follows from it
# pycocotools takes 80 bytes per pixel of an outline, inside the image or not; what goes beyond is painted here.
_REACH, _LENGTH = 1e5, 1e6  # pixels
_NUMBERS = {int, float}  # exact types: a boolean is no number


def is_empty(shape: object) -> bool:
    """Whether a segmentation encloses nothing: null, empty, or polygons of fewer than three points."""
    if isinstance(shape, list):
        return all(isinstance(polygon, list) and len(polygon) < 6 for polygon in shape)
    return shape is None or shape == {}


def is_box(box: object) -> bool:
    """Whether this is [x, y, width, height] in finite numbers, with an area."""
    return (
        isinstance(box, list)
        and len(box) == 4
        and set(map(type, box)) <= _NUMBERS
        and all(abs(number) <= LIMIT for number in box)
        and box[2] > 0
        and box[3] > 0
    )


def box_region(box: list, size: tuple[int, int]) -> dict:
    """Run lengths of the pixels (H, W) that a box touches."""
    x, y, width, height = map(float, box)
    mask = np.zeros(size, np.uint8, order="F")
    top, left = (max(int(np.floor(start)), 0) for start in (y, x))
    bottom, right = (max(int(np.ceil(end)), 0) for end in (y + height, x + width))
    mask[top:bottom, left:right] = 1
    return rle.encode(mask)


def shape_region(shape: object, size: tuple[int, int]) -> dict:
    """Run lengths, in an image of ``size`` (H, W), of a segmentation: polygons, or run lengths of either form."""
    if isinstance(shape, list):
        return rle.merge([_polygon_region(points, size) for points in map(_points, shape) if len(points) >= 3])
    if not isinstance(shape, dict):
        raise ValueError(f"{reprlib.repr(shape)} is neither polygons nor run lengths")
    return _run_length_region(shape, size)


def _points(polygon: object) -> np.ndarray:
    """float64 (N, 2) of [x0, y0, x1, y1, ...]."""
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= _NUMBERS:
        raise ValueError(f"the polygon {reprlib.repr(polygon)} is not a list of numbers")
    if len(polygon) % 2:
        raise ValueError(f"a polygon has {len(polygon)} coordinates, which is not an even number")
    wrong = next((number for number in polygon if not abs(number) <= LIMIT), None)
    if wrong is not None:
        raise ValueError(f"the coordinate {reprlib.repr(wrong)} is not a number between -{LIMIT:g} and {LIMIT:g}")
    return np.array(polygon, np.float64).reshape(-1, 2)


def _polygon_region(points: np.ndarray, size: tuple[int, int]) -> dict:
    """Run lengths of a polygon (N, 2)."""
    length = np.abs(points - np.roll(points, -1, axis=0)).max(axis=1).sum()
    if length <= _LENGTH and np.abs(points).max() <= _REACH:
        return rle.frPyObjects([points.ravel().tolist()], *size)[0]
    return clipped_region(points, size)


def clipped_region(points: np.ndarray, size: tuple[int, int]) -> dict:
    """Run lengths of a polygon (N, 2) of any extent, in memory for the image alone.

    The rule is that of pycocotools, so that the pixels are too: corners are rounded to fifths of a pixel, and an
    edge begins or ends the inside of column x where it steps between the fifths 5x + 2 and 5x + 3.
    """
    corners = np.trunc(5 * points + 0.5)
    toggles = np.zeros(size[0] * size[1] + 1, np.uint8)  # down the columns; the last one is behind the image
    for start, end in zip(corners, np.roll(corners, -1, axis=0)):
        np.add.at(toggles, _crossings(start, end, size), 1)
    inside = np.bitwise_xor.accumulate(toggles[:-1] & 1)
    return rle.encode(inside.reshape(size, order="F"))


def _crossings(start: np.ndarray, end: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where an edge between two points (x, y), in fifths of a pixel, crosses the columns of an image (H, W).

    Returns:
        int64 (N,): places down the columns, one per column that is crossed.
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
    """Steps (N,) down a steep edge that begins at x, the last before it goes over from a fifth (N,) or to it."""

    def before(steps):
        reached = np.trunc(x + slope * steps + 0.5)
        return reached <= fifths if slope > 0 else reached > fifths

    guess = np.floor((fifths + 0.5 - x) / slope)  # by one at most wrong
    steps = guess - 1
    for step in (guess, guess + 1):
        steps = np.where(before(step), step, steps)
    return steps


def _run_length_region(shape: dict, size: tuple[int, int]) -> dict:
    said, counts = shape.get("size"), shape.get("counts")
    if not isinstance(said, list) or set(map(type, said)) != {int} or tuple(said) != size:
        raise ValueError(f"its size is {reprlib.repr(said)}, that of the image {list(size)}")
    if isinstance(counts, str):
        counts = unpack_counts(counts)
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        raise ValueError(f"its counts {reprlib.repr(counts)} are neither a list of integers nor a string")
    if min(counts, default=0) < 0:
        raise ValueError(f"its counts have the negative number {reprlib.repr(min(counts))}")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(f"its counts add up to {reprlib.repr(sum(counts))}, the image has {size[0] * size[1]} pixels")
    return rle.frPyObjects({"size": said, "counts": counts}, *size)


def unpack_counts(text: str) -> list[int]:
    """The counts of a compressed string.

    A character holds 5 bits of a number, the lowest first, and a sixth that says whether more follow; the last bit
    is the sign. From the fourth on, a number is the difference from the count two before it.
    """
    strange = re.search("[^0-o]", text)
    if strange:
        raise ValueError(f"its counts have the character {strange[0]!r}, which compressed counts never have")
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
        raise ValueError("its counts end within a number")
    return counts
