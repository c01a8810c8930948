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
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    assert shapes.generate(str(root), num_train=120, num_val=10, size=64, labeled=(5, 10), split_seeds=(0, 1))
    return root


def test_a_seed_makes_the_same_files_and_another_does_not(tmp_path):
    roots = [str(tmp_path / name) for name in "abc"]
    for root, seed in zip(roots, (1, 1, 2)):
        shapes.generate(root, num_train=4, num_val=2, size=32, seed=seed, labeled=(2,))
    digests = [shapes.digest(root) for root in roots]
    assert digests[0] == digests[1] != digests[2]


def test_an_image_does_not_depend_on_how_many_there_are():
    first, again = (shapes.draw_scene(rng(0, 5, 0, "shapes/train"), 64, CLASSES) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again))


def test_the_statistics_of_the_images(made):
    index = PackedIndex.from_list_file(str(made / "train.txt"), str(made), need_mask=True)
    check_dataset(index, len(CLASSES), 255)
    counts = count_pixels(index, len(CLASSES))
    present = (counts[:, 1:] > 0).sum(axis=1)
    assert present.max() <= shapes.MAX_OBJECTS and 2 < present.mean() < 4
    assert (counts > 0).any(axis=0).all()
    assert 0.6 < counts[:, 0].sum() / counts.sum() < 0.9


def test_instances_and_masks_agree(made):
    hidden = 0
    for path in sorted((made / "masks" / "train").iterdir())[:60]:
        mask, instances = read_label(str(path)), read_label(str(path).replace("masks", "instances"))
        assert ((mask == 0) == (instances == 0)).all() and instances.max() <= shapes.MAX_OBJECTS
        numbers = np.unique(instances[instances > 0])
        assert all(len(np.unique(mask[instances == n])) == 1 for n in numbers)
        hidden += len(numbers) > len(np.unique(mask[mask > 0]))
    assert hidden > 0  # two objects of one class do occur: instances carry more than the mask


def test_every_shape_has_every_color_and_a_fair_area():
    for color in shapes.COLORS:
        assert all(f"{color} {shape}" in CLASSES for shape in shapes.SHAPES)
    step = (np.arange(80) + 0.5) / 40 - 1
    areas = {name: inside(*np.meshgrid(step, step)).mean() for name, inside in shapes.SHAPES.items()}
    assert abs(areas["disc"] - np.pi / 4) < 0.01 and all(0.25 < area < 0.8 for area in areas.values()), areas


def test_splits_are_nested_disjoint_and_differ_by_seed(made):
    names = {}
    for seed in (0, 1):
        for n in (5, 10):
            labeled, unlabeled = load_split(str(made / f"splits/seed{seed}/{n}"), str(made))
            assert (len(labeled), len(unlabeled)) == (n, 120 - n)
            names[seed, n] = {image for image, _ in labeled.all_names()}
    assert names[0, 5] < names[0, 10] and names[0, 10] != names[1, 10]


def test_written_once_and_again_only_when_the_parameters_change(tmp_path):
    root = str(tmp_path / "shapes")
    small = dict(num_train=4, num_val=2, size=32, labeled=(2,))
    assert shapes.generate(root, **small) and not shapes.generate(root, **small)
    assert shapes.generate(root, **{**small, "num_train": 3})
    assert len(list((tmp_path / "shapes/images/train").iterdir())) == 3
    # A run that was cut short left a manifest without a digest: it is made again.
    shapes._write_manifest(root, shapes.read_manifest(root)["parameters"], checksum="")
    assert shapes.generate(root, **{**small, "num_train": 3})


def test_a_folder_of_someone_else_is_not_touched(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/holiday.jpg").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        shapes.generate(str(tmp_path), num_train=4, num_val=2, size=32, labeled=(2,))
    assert (tmp_path / "images/holiday.jpg").read_text() == "precious"
    with pytest.raises(UserError, match="between 1 and 3"):
        shapes.generate(str(tmp_path / "new"), num_train=4, num_val=2, size=32, labeled=(4,))


def test_the_script_makes_checks_and_reports(tmp_path, capsys):
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


@pytest.mark.parametrize(("file", "least"), [("shapes_minilm.npz", 25), ("shapes_distractors_minilm.npz", 100)])
def test_the_committed_embeddings_fit_the_classes(file, least):
    table = np.load(TABLES / file)
    names, vectors = table["names"].tolist(), table["embeddings"]
    assert len(names) == len(set(names)) == len(vectors) >= least and vectors.dtype == np.float16
    assert np.allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-3)
    if file == "shapes_minilm.npz":
        assert tuple(names) == CLASSES
        # The words mean something: a red cross is nearer to another cross than to a green ring.
        near = vectors.astype(np.float32) @ vectors.astype(np.float32).T
        cross, other, ring = (names.index(n) for n in ("red cross", "blue cross", "green ring"))
        assert near[cross, other] > near[cross, ring]
    else:
        assert not set(names) & set(CLASSES)
