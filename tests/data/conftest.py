"""Small datasets on disk, and their indexes."""

import numpy as np
import pytest
from PIL import Image

from hiervl.data.index import PackedIndex
from hiervl.data.mapper import TrainMapper


def coded_image(height: int, width: int) -> np.ndarray:
    """An image (H, W, 3) that encodes pixel positions: red increases to the right, green downward."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 2, y * 2, np.full_like(x, 255)], axis=2).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """12 images of 60x80, masks with 4 vertical bands of ids 0 to 3, and train.txt, labeled.txt and unlabeled.txt."""
    generator = np.random.default_rng(0)
    mask = np.repeat(np.arange(4, dtype=np.uint8), 20)[None].repeat(60, axis=0)
    lines = []
    for i in range(12):
        noise = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / f"{i}_mask.png")
        lines.append(f"{i}.png {i}_mask.png\n")
    (tmp_path / "train.txt").write_text("".join(lines))
    (tmp_path / "labeled.txt").write_text("".join(lines[:4]))
    (tmp_path / "unlabeled.txt").write_text("".join(lines[4:]))
    return tmp_path


@pytest.fixture
def labeled(folder):
    return PackedIndex.from_list_file(str(folder / "labeled.txt"), str(folder))


@pytest.fixture
def unlabeled(folder):
    return PackedIndex.from_list_file(str(folder / "unlabeled.txt"), str(folder))


@pytest.fixture
def mapper():
    return TrainMapper((48, 64))
