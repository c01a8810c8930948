"""`shapes`: a procedural dataset, generated from a seed in seconds, for the demo and the tests.

Each image shows up to five objects, which may occlude one another, on a background of gradients, noise, strokes and
colored patches. A class is a combination of color and shape ("red cross"), so class names carry meaning; shades are
random and carry none. The background has ragged patches in the colors of the objects, so color or shape alone does not
determine the class. With enough labels, a tiny network learns the task from scratch within a thousand steps.

Image i of a part depends only on (seed, part, i), so a larger dataset starts with the images of a smaller one.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from ..errors import UserError
from .datasets import TABLES, DatasetTable
from .randomness import rng

VERSION = 3  # increment when the same parameters produce different images
MAX_OBJECTS = 5
_SUPERSAMPLING = 2  # objects are drawn at this multiple of the resolution and averaged, for smooth edges
_MANIFEST = "manifest.json"
_FOLDERS = ("images", "masks", "instances", "splits")

# A shape is True inside its outline, within the square |u|, |v| <= 1 (u points right, v up). A texture is the weight
# of its second color, from 0 to 1, at coordinates with a period of 2 * pi.
Plane = Callable[[np.ndarray, np.ndarray], np.ndarray]
SHAPES: dict[str, Plane] = {
    "disc": lambda u, v: u**2 + v**2 < 1,
    "bar": lambda u, v: (abs(u) < 1) & (abs(v) < 0.35),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 1),
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.8) < 0.2,
}
TEXTURES: dict[str, Plane] = {
    "plain": lambda a, b: np.zeros_like(a),
    "dark": lambda a, b: np.ones_like(a),
    "shaded": lambda a, b: (np.sin(a / 4) + 1) / 2,
}

# Hue in degrees, and the maximum deviation of an object's hue from it.
COLORS: dict[str, tuple[float, float]] = {
    "red": (0, 8),
    "yellow": (55, 7),
    "green": (120, 15),
    "cyan": (182, 9),
    "blue": (232, 12),
    "pink": (318, 12),
}


def draw_scene(generator: np.random.Generator, size: int, classes: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Draws one image with its masks.

    Args:
        generator: source of all draws.
        size: height and width, pixels.
        classes: class names; the first is the background, the others are "color shape".

    Returns:
        image uint8 (size, size, 3) RGB; class ids uint8 (size, size); instance ids uint8 (size, size), 0 on the
        background and 1, 2, ... for the objects in drawing order.
    """
    image = _background(generator, size)
    ids = np.zeros((size, size), np.uint8)
    instances = np.zeros((size, size), np.uint8)
    for number in range(1, int(generator.integers(1, MAX_OBJECTS + 1)) + 1):
        class_id = int(generator.integers(1, len(classes)))
        color, shape = classes[class_id].split()
        radius = generator.uniform(0.17, 0.29) * size
        center = _draw_center(generator, radius, instances)
        if center is None:
            continue
        covered = _paint(generator, image, SHAPES[shape], color, radius, center)
        ids[covered], instances[covered] = class_id, number
    noise = generator.normal(0, generator.uniform(3, 9), image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), ids, instances


def _draw_center(generator: np.random.Generator, radius: float, instances: np.ndarray) -> tuple[int, int] | None:
    """Draws a center (y, x) at which an object leaves half of every earlier one visible; None after 10 tries."""
    size, reach = len(instances), round(radius)
    areas = np.bincount(instances.ravel(), minlength=MAX_OBJECTS + 1)
    for _ in range(10):
        y, x = generator.integers(round(0.6 * reach), size - round(0.6 * reach), size=2)
        occluded = instances[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach]
        occluded_areas = np.bincount(occluded.ravel(), minlength=MAX_OBJECTS + 1)
        if (2 * occluded_areas <= areas)[1:].all():
            return int(y), int(x)
    return None


def _paint(
    generator: np.random.Generator,
    image: np.ndarray,
    shape: Plane,
    color: str,
    radius: float,
    center: tuple[int, int],
) -> np.ndarray:
    """Draws one object into ``image`` (float32 (H, W, 3), modified) and returns the mask of its pixels, (H, W) bool."""
    reach = int(np.ceil(radius)) + 1
    side = 2 * reach
    steps = (np.arange(side * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING - reach
    y, x = np.meshgrid(steps, steps, indexing="ij")  # offset from the center, pixels
    u, v = _rotate(x / radius, -y / radius, generator.uniform(-0.4, 0.4))
    # The texture is rotated independently, so that its direction carries no information about the shape.
    a, b = _rotate(x, y, generator.uniform(0, np.pi))
    period = radius * generator.uniform(0.4, 0.6)
    a, b = (2 * np.pi / period * t + generator.uniform(0, 2 * np.pi) for t in (a, b))
    texture = _choose(generator, TEXTURES)
    first, second = _two_shades(generator, color)
    colors = first + texture(a, b)[..., None].astype(np.float32) * (second - first)
    alpha = cv2.resize(shape(u, v).astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    colors = cv2.resize(colors, (side, side), interpolation=cv2.INTER_AREA)
    return _blend(image, colors, alpha, center, reach)


def _blend(image: np.ndarray, colors: np.ndarray, alpha: np.ndarray, center: tuple[int, int], reach: int) -> np.ndarray:
    """Alpha-blends a patch centered at ``center`` into ``image`` (H, W, 3), clipped at the border.

    Args:
        image: float32 (H, W, 3), modified.
        colors: (2*reach, 2*reach, 3).
        alpha: (2*reach, 2*reach), from 0 to 1.
        center: (y, x), pixels.
        reach: half the side of the patch, pixels.

    Returns:
        Mask of the pixels with alpha > 0.5, (H, W) bool.
    """
    height, width = image.shape[:2]
    top, left = center[0] - reach, center[1] - reach
    rows = slice(max(0, top), min(height, top + 2 * reach))
    cols = slice(max(0, left), min(width, left + 2 * reach))
    inner = slice(rows.start - top, rows.stop - top), slice(cols.start - left, cols.stop - left)
    weight = alpha[inner][..., None]  # (h, w, 1)
    image[rows, cols] += weight * (colors[inner] - image[rows, cols])
    covered = np.zeros((height, width), bool)
    covered[rows, cols] = alpha[inner] > 0.5
    return covered


def _background(generator: np.random.Generator, size: int) -> np.ndarray:
    """Draws gradients, blotches, colored patches and strokes that belong to no class: float32 (size, size, 3)."""
    corners = generator.uniform(60, 195, (2, 2, 1)) + generator.uniform(-30, 30, (2, 2, 3))
    blotches = generator.normal(0, 15, (size // 8 + 1, size // 8 + 1, 3)).astype(np.float32)
    image = cv2.resize(corners.astype(np.float32), (size, size))
    image += cv2.resize(blotches, (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(generator.integers(0, 4)):
        # A patch has the texture and color of an object but a ragged outline, so color alone does not reveal the class.
        center = generator.uniform(0, size, 2)
        bearings = np.sort(generator.uniform(0, 2 * np.pi, 7))
        lengths = generator.uniform(0.03, 0.16, 7) * size
        outline = center + lengths[:, None] * np.stack([np.cos(bearings), np.sin(bearings)], axis=1)
        mask = np.zeros((size, size), np.uint8)
        cv2.fillPoly(mask, [outline.astype(np.int32)], 1)
        y, x = np.meshgrid(*[np.arange(size, dtype=np.float32)] * 2, indexing="ij")
        a, b = (2 * np.pi / (size * generator.uniform(0.05, 0.13)) * t for t in _rotate(x, y, generator.uniform(0, 3)))
        texture = _choose(generator, TEXTURES)(a, b)
        first, second = _two_shades(generator, list(COLORS)[generator.integers(len(COLORS))])
        image[mask > 0] = (first + texture[..., None] * (second - first))[mask > 0]
    for _ in range(generator.integers(2, 6)):
        ends = generator.integers(0, size, (2, 2)).tolist()
        color = generator.uniform(0, 255, 3).tolist()
        cv2.line(image, *ends, color, int(generator.integers(1, 4)), cv2.LINE_AA)
    return image


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in axes rotated by ``angle``, radians."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _choose(generator: np.random.Generator, table: dict[str, Plane]) -> Plane:
    return list(table.values())[generator.integers(len(table))]


def _two_shades(generator: np.random.Generator, color: str) -> tuple[np.ndarray, np.ndarray]:
    """Draws a light and a dark shade of a color, each float32 (3,) RGB."""
    center, spread = COLORS[color]
    hue = (center + generator.uniform(-spread, spread)) % 360
    saturation = generator.uniform(0.65, 1)
    values = generator.uniform(0.75, 1), generator.uniform(0.35, 0.55)
    hsv = np.array([[[hue, saturation, value] for value in values]], np.float32)
    light, dark = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]
    return light, dark


def generate(
    root: str,
    num_train: int = 1000,
    num_val: int = 200,
    size: int = 64,
    seed: int = 0,
    labeled: Sequence[int] = (25, 50, 100, 200),
    split_seeds: Sequence[int] = (0,),
) -> bool:
    """Writes the dataset to ``root``, unless it already exists there with the same parameters.

    Layout: ``{images,masks,instances}/{train,val}/00000.png``, ``train.txt``, ``val.txt``,
    ``splits/seed{s}/{n}/{labeled,unlabeled}.txt`` and ``manifest.json``.

    Args:
        root: output folder; only an earlier output of this function is ever overwritten.
        num_train, num_val: number of images.
        size: height and width of an image, pixels.
        seed: seed of the images.
        labeled: numbers of labeled images, one split for each; the splits of one split seed are nested.
        split_seeds: one selection of labeled images is drawn for each.

    Returns:
        True if the dataset was written, False if it already existed.

    Raises:
        UserError: ``root`` contains anything else; a split would label all images or none.
    """
    parameters = {
        "version": VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "size": size,
        "seed": seed,
        "labeled": sorted(labeled),
        "split_seeds": list(split_seeds),
    }
    if any(not 0 < n < num_train for n in labeled):
        raise UserError(f"shapes: labeled counts {list(labeled)} must be between 1 and {num_train - 1}")
    manifest = read_manifest(root)
    if manifest and manifest["parameters"] == parameters and manifest["digest"]:
        return False
    _clear(root, manifest)
    # An empty digest marks a dataset that this function started but has not finished.
    _write_manifest(root, parameters, checksum="")
    classes = DatasetTable.from_file(TABLES / "shapes.yaml").classes
    train = [_write_image(root, "train", i, seed, size, classes) for i in range(num_train)]
    val = [_write_image(root, "val", i, seed, size, classes) for i in range(num_val)]
    _write_list(os.path.join(root, "train.txt"), train)
    _write_list(os.path.join(root, "val.txt"), val)
    _write_splits(root, train, labeled, split_seeds)
    _write_manifest(root, parameters, digest(root))
    return True


def read_manifest(root: str) -> dict | None:
    """Reads ``{"parameters", "digest"}`` of an existing dataset; the digest is "" if it is unfinished.

    Returns:
        None if there is no manifest.

    Raises:
        UserError: the manifest is not one of this generator.
    """
    path = os.path.join(root, _MANIFEST)
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        return {key: manifest[key] for key in ("parameters", "digest")}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a manifest of shapes; choose another folder") from None


def digest(root: str) -> str:
    """SHA-256 over the names and contents of all files of the dataset, except the manifest."""
    result = hashlib.sha256()
    for folder in ("", *_FOLDERS):
        for base, folders, files in os.walk(os.path.join(root, folder)):
            folders[:] = sorted(folders) if folder else []
            for name in sorted(files):
                path = os.path.join(base, name)
                if name != _MANIFEST:
                    result.update(os.path.relpath(path, root).replace(os.sep, "/").encode())
                    with open(path, "rb") as file:
                        result.update(file.read())
    return result.hexdigest()


def _clear(root: str, manifest: dict | None) -> None:
    """Removes an existing dataset. Raises UserError if the folder has anything that the generator did not write."""
    if manifest is None and os.path.isdir(root) and os.listdir(root):
        raise UserError(f"{root} is not empty and has no {_MANIFEST} of shapes; choose another folder")
    if manifest and manifest["digest"] and digest(root) != manifest["digest"]:
        raise UserError(
            f"{root} was changed since it was written, and would be overwritten; move your own files out and "
            "delete it, or choose another folder"
        )
    for name in _FOLDERS:
        shutil.rmtree(os.path.join(root, name), ignore_errors=True)


def _write_image(root: str, part: str, i: int, seed: int, size: int, classes: Sequence[str]) -> tuple[str, str]:
    """Draws and writes one image with its masks; returns the names of image and mask for the lists."""
    image, ids, instances = draw_scene(rng(seed, i, 0, f"shapes/{part}"), size, classes)
    for folder, array in (("images", image[..., ::-1]), ("masks", ids), ("instances", instances)):
        path = os.path.join(root, folder, part, f"{i:05d}.png")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not cv2.imwrite(path, array, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
            raise UserError(f"cannot write {path}; is the disk full?")
    return f"images/{part}/{i:05d}.png", f"masks/{part}/{i:05d}.png"


def _write_splits(root: str, train: list[tuple[str, str]], labeled: Sequence[int], split_seeds: Sequence[int]) -> None:
    """Writes the lists of every split seed and every number of labeled images."""
    for split_seed in split_seeds:
        shuffled = list(train)
        random.Random(split_seed).shuffle(shuffled)
        for n in labeled:
            folder = os.path.join(root, "splits", f"seed{split_seed}", str(n))
            _write_list(os.path.join(folder, "labeled.txt"), sorted(shuffled[:n]))
            _write_list(os.path.join(folder, "unlabeled.txt"), sorted(shuffled[n:]))


def _write_list(path: str, pairs: list[tuple[str, str]]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{image} {mask}\n" for image, mask in pairs)


def _write_manifest(root: str, parameters: dict, checksum: str) -> None:
    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, _MANIFEST), "w", encoding="utf-8") as file:
        json.dump({"parameters": parameters, "digest": checksum}, file, indent=2)
