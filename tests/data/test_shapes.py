import importlib.util
from pathlib import Path

import numpy as np
import pytest

from hiervl.data import shapes
from hiervl.data.datasets import TABLES, check_dataset, count_pixels, table_of
from hiervl.data.images import read_label
from hiervl.data.index import PackedIndex
from hiervl.data.randomness import rng
from hiervl.data.splits import load_split
from hiervl.errors import UserError

CLASSES = table_of("shapes_train").classes
PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    assert shapes.generate(str(root), num_train=120, num_val=10, size=64, labeled=(5, 10), split_seeds=(0, 1))
    return root


def test_same_seed_gives_the_same_files_and_another_does_not(tmp_path):
    roots = [str(tmp_path / name) for name in "abc"]
    for root, seed in zip(roots, (1, 1, 2)):
        shapes.generate(root, num_train=4, num_val=2, size=32, seed=seed, labeled=(2,))
    digests = [shapes.digest(root) for root in roots]
    assert digests[0] == digests[1] != digests[2]


def test_drawing_an_image_again_gives_the_same_result():
    first, again = (shapes.draw_scene(rng(0, 5, 0, "shapes/train"), 64, CLASSES) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again))


def test_image_statistics(dataset_folder):
    index = PackedIndex.from_list_file(str(dataset_folder / "train.txt"), str(dataset_folder), need_mask=True)
    check_dataset(index, len(CLASSES), 255)
    counts = count_pixels(index, len(CLASSES))
    present = (counts[:, 1:] > 0).sum(axis=1)
    assert present.max() <= shapes.MAX_OBJECTS and 2 < present.mean() < 4
    assert (counts > 0).any(axis=0).all()
    assert 0.6 < counts[:, 0].sum() / counts.sum() < 0.9


def test_instances_and_masks_agree(dataset_folder):
    images_with_repeated_class = 0
    for path in sorted((dataset_folder / "masks" / "train").iterdir())[:60]:
        mask, instances = read_label(str(path)), read_label(str(path).replace("masks", "instances"))
        assert ((mask == 0) == (instances == 0)).all() and instances.max() <= shapes.MAX_OBJECTS
        instance_ids = np.unique(instances[instances > 0])
        assert all(len(np.unique(mask[instances == i])) == 1 for i in instance_ids)
        images_with_repeated_class += len(instance_ids) > len(np.unique(mask[mask > 0]))
    assert images_with_repeated_class > 0  # so instances carry more information than the mask


def test_every_shape_occurs_in_every_color_and_has_a_reasonable_area():
    for color in shapes.COLORS:
        assert all(f"{color} {shape}" in CLASSES for shape in shapes.SHAPES)
    step = (np.arange(80) + 0.5) / 40 - 1
    areas = {name: shape(*np.meshgrid(step, step)).mean() for name, shape in shapes.SHAPES.items()}
    assert abs(areas["disc"] - np.pi / 4) < 0.01 and all(0.25 < area < 0.8 for area in areas.values()), areas


def test_splits_are_nested_disjoint_and_differ_by_seed(dataset_folder):
    names = {}
    for seed in (0, 1):
        for n in (5, 10):
            labeled, unlabeled = load_split(str(dataset_folder / f"splits/seed{seed}/{n}"), str(dataset_folder))
            assert (len(labeled), len(unlabeled)) == (n, 120 - n)
            names[seed, n] = {image for image, _ in labeled.all_names()}
    assert names[0, 5] < names[0, 10] and names[0, 10] != names[1, 10]


def test_written_again_only_when_the_parameters_change(tmp_path):
    root = str(tmp_path / "shapes")
    small = dict(num_train=4, num_val=2, size=32, labeled=(2,))
    assert shapes.generate(root, **small) and not shapes.generate(root, **small)
    assert shapes.generate(root, **{**small, "num_train": 3})
    assert len(list((tmp_path / "shapes/images/train").iterdir())) == 3
    # An interrupted run leaves a manifest without a digest; the dataset is then written again.
    shapes._write_manifest(root, shapes.read_manifest(root)["parameters"], checksum="")
    assert shapes.generate(root, **{**small, "num_train": 3})


def test_folder_with_foreign_files_is_not_touched(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/holiday.jpg").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        shapes.generate(str(tmp_path), num_train=4, num_val=2, size=32, labeled=(2,))
    assert (tmp_path / "images/holiday.jpg").read_text() == "precious"
    with pytest.raises(UserError, match="between 1 and 3"):
        shapes.generate(str(tmp_path / "new"), num_train=4, num_val=2, size=32, labeled=(4,))


def test_script_generates_checks_and_reports(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("prepare_shapes", PROJECT / "datasets" / "prepare_shapes.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    root = ["--root", str(tmp_path / "s")]
    assert script.main([*root, "--check"]) == 1
    assert script.main([*root, "--train", "4", "--val", "2", "--size", "32", "--labeled", "2"]) == 0
    assert "4 training and 2 validation" in capsys.readouterr().out
    (tmp_path / "s/masks/val/00001.png").unlink()
    assert script.main([*root, "--check"]) == 1
    assert "was changed" in capsys.readouterr().err


@pytest.mark.parametrize(("file", "min_names"), [("shapes_minilm.npz", 25), ("shapes_distractors_minilm.npz", 100)])
def test_committed_embeddings_match_the_classes(file, min_names):
    table = np.load(TABLES / file)
    names, vectors = table["names"].tolist(), table["embeddings"]
    assert len(names) == len(set(names)) == len(vectors) >= min_names and vectors.dtype == np.float16
    assert np.allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-3)
    if file == "shapes_minilm.npz":
        assert tuple(names) == CLASSES
        # The embeddings reflect meaning: a red cross is closer to another cross than to a green ring.
        similarity = vectors.astype(np.float32) @ vectors.astype(np.float32).T
        red_cross, blue_cross, green_ring = (names.index(n) for n in ("red cross", "blue cross", "green ring"))
        assert similarity[red_cross, blue_cross] > similarity[red_cross, green_ring]
    else:
        assert not set(names) & set(CLASSES)
