"""Sources and files of the user are never overwritten: scripts refuse in one line, before writing anything."""

import hashlib
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from hiervl.data.datasets import dataset_index, table_of
from hiervl.data.images import read_label
from hiervl.ownership import RECORD, OutputFolder

from . import miniatures
from .miniatures import SIZE, indexed, photo


def snapshot(folder):
    """{path: hash, or target of a link} of everything in a folder."""
    return {
        str(path): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


@pytest.fixture
def assert_refused(run, tmp_path):
    """Runs a script and asserts that it exits with 1, prints one line with the given words, and changes no files."""

    def call(expected_words, *argv):
        before = snapshot(tmp_path)
        result = run(*argv)
        assert result.status == 1, result.out
        errors = result.err.strip().splitlines()
        assert len(errors) == 1 and all(word in errors[0] for word in expected_words), result.err
        assert snapshot(tmp_path) == before

    return call


@pytest.fixture
def user_root(data_root):
    """Photos and color masks where a dataset called `my` would be written."""
    colors = np.zeros((64, 64, 3), np.uint8)
    colors[:, :32], colors[:, 32:48], colors[:, 48:] = (255, 0, 0), (0, 0, 10), (0, 0, 20)
    root = data_root / "my"
    for i in range(4):
        photo(root / f"images/train/{i}.jpg", i, (64, 64))
        (root / "masks/train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(colors).save(root / f"masks/train/{i}.png")
    (data_root / "classes.txt").write_text("road\ncar\n")
    (data_root / "palette.txt").write_text("255 0 0 road\n0 0 10 car\n0 0 20 car\n")
    return root


def command(root, *options, masks="masks/train", palette=True):
    data = root.parent
    colors = ("--palette", data / "palette.txt") if palette else ()
    return (
        "prepare_folder",
        "--images",
        root / "images/train",
        "--masks",
        root / masks,
        "--classes",
        data / "classes.txt",
        *colors,
        "--workers",
        1,
        *options,
    )


def test_color_masks_at_the_output_location_are_refused(run, assert_refused, user_root):
    argv = command(user_root)
    assert_refused(("my/masks/train/0.png", "--root or --name"), *argv, "--name", "my")
    masks = snapshot(user_root)
    assert run(*argv, "--name", "other").status == 0
    assert snapshot(user_root) == masks
    assert run(*argv, "--name", "other").status == 0 and run(*argv, "--name", "other", "--check").status == 0


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_to_sources_are_not_overwritten(assert_refused, user_root, link, data_root):
    (data_root / "my2/masks/train").mkdir(parents=True)
    link(user_root / "masks/train/3.png", data_root / "my2/masks/train/3.png")
    assert_refused(("my2/masks/train/3.png is one of the input files", "--name"), *command(user_root), "--name", "my2")


def test_sources_behind_a_linked_folder_are_not_overwritten(assert_refused, user_root, data_root):
    (data_root / "my2").mkdir()
    (data_root / "my2/masks").symlink_to(user_root / "masks")
    assert_refused(("my2/masks/train/0.png is one of the input files",), *command(user_root), "--name", "my2")


@pytest.mark.parametrize(
    "name",
    [
        "train.txt",
        "val.txt",
        "dataset.yaml",
        "splits/all/labeled.txt",
        "splits/all/unlabeled.txt",
        "masks/train/2.png",
        "masks/train/2.png.tmp",
    ],
)
def test_user_files_are_not_overwritten(run, assert_refused, user_root, data_root, name):
    path = data_root / "new" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    assert_refused(
        (f"new/{name} already exists and was not made by this tool", "--name"), *command(user_root), "--name", "new"
    )
    path.unlink()
    assert run(*command(user_root), "--name", "new").status == 0
    assert run(*command(user_root), "--name", "new").status == 0


def test_class_lists_are_sources_too(assert_refused, user_root, data_root, tmp_path):
    root = data_root / "lists"
    root.mkdir()
    (root / "train.txt").write_text("road\ncar\n")
    assert_refused(
        ("lists/train.txt is one of the input files",),
        *command(user_root, "--root", root)[:5],
        "--classes",
        root / "train.txt",
        "--masks",
        user_root / "masks/train",
        "--palette",
        data_root / "palette.txt",
        "--root",
        root,
    )


def test_valid_index_masks_may_stay_in_place(run, assert_refused, user_root):
    for i in range(4):
        indexed(user_root / f"masks/train/{i}.png", np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 2)
    before = snapshot(user_root)
    for _ in range(2):
        result = run(*command(user_root, "--name", "my", palette=False))
        assert result.status == 0 and " 0 of them new" in result.out, result.err
        assert {path: snapshot(user_root)[path] for path in before} == before
    indexed(user_root / "masks/train/2.png", np.full((64, 64), 7, np.uint8))
    assert_refused(
        ("masks/train/2.png is one of the input files", "has the id 7"),
        *command(user_root, "--name", "my", palette=False),
    )


def test_roots_of_earlier_versions_can_be_continued(run, user_root, data_root):
    argv = command(user_root, "--name", "new")
    assert run(*argv).status == 0
    (data_root / "new" / RECORD).unlink()
    (data_root / "new/masks/train/1.png").unlink()
    os.utime(user_root / "masks/train/2.png", (2e9, 2e9))
    result = run(*argv)
    assert result.status == 0, result.err
    assert sum(map(int, re.findall(r"(\d+) of them new", result.out))) == 2
    assert (data_root / "new" / RECORD).exists()


def test_a_user_file_in_place_of_one_that_was_never_made_is_kept(run, assert_refused, user_root, data_root):
    """A mask that a run could not make is removed from the record, so that a user's mask in its place is kept."""
    source = user_root / "masks/train/2.png"
    content = source.read_bytes()
    source.write_bytes(content[:-30])
    assert run(*command(user_root, "--name", "new")).status == 1
    source.write_bytes(content)
    (data_root / "new/masks/train/2.png").write_text("drawn by hand")
    assert_refused(("new/masks/train/2.png already exists",), *command(user_root, "--name", "new"))


def test_images_that_would_share_a_mask_are_refused(assert_refused, tmp_path, data_root):
    miniatures.coco(tmp_path / "coco")
    annotations = tmp_path / "coco/annotations/instances_train2017.json"
    photo(tmp_path / "coco/train2017/000000000009.png")
    text = annotations.read_text()
    annotations.write_text(text.replace("000000000025.jpg", "000000000009.png"))
    (tmp_path / "classes.txt").write_text("dog\nperson\ncup\n")
    assert_refused(
        ("000000000009.jpg", "000000000009.png", "would both have the mask"),
        "prepare_folder",
        "--images",
        tmp_path / "coco/train2017",
        "--coco",
        annotations,
        "--classes",
        tmp_path / "classes.txt",
        "--workers",
        1,
    )


def voc(data_root, tmp_path):
    root, sbd = data_root / table_of("voc_train").folder, tmp_path / "SBD"
    miniatures.voc(root, sbd)
    return root, ("prepare_voc", "--partial", "--workers", 1)


def test_voc_keeps_valid_augmented_masks_in_place(run, assert_refused, data_root, tmp_path):
    root, argv = voc(data_root, tmp_path)
    augmented = root / "SegmentationClassAug"
    for name in ("2007_000032", "2007_000033", "2008_000002"):
        indexed(augmented / f"{name}.png", np.full(SIZE, 3, np.uint8))
    before = snapshot(augmented)
    assert run(*argv, "--aug", augmented).status == 0
    assert snapshot(augmented) == before
    assert len(dataset_index("voc_train")) == 2
    assert run(*argv, "--aug", augmented).status == 0
    indexed(augmented / "2008_000002.png", np.full(SIZE, 99, np.uint8))
    assert_refused(
        ("SegmentationClassAug/2008_000002.png is one of the input files", "--aug"), *argv, "--aug", augmented
    )


def test_user_masks_are_kept_if_valid_and_refused_if_not(run, assert_refused, data_root, tmp_path):
    root = data_root / "coco"
    miniatures.coco(root)
    argv = ("prepare_coco", "--partial", "--workers", 1)
    indexed(root / "masks/000000000009.png", np.full(SIZE, 182, np.uint8))
    assert_refused(("coco/masks/000000000009.png already exists", "has the id 182"), *argv)
    indexed(root / "masks/000000000009.png", np.full(SIZE, 80, np.uint8))
    assert_refused(("coco/masks/000000000009.png already exists", "instances"), *argv, "--instances")
    before = snapshot(root / "masks")
    assert run(*argv).status == 0 and run(*argv, "--masks", root / "masks").status == 0
    assert (
        snapshot(root / "masks")[str(root / "masks/000000000009.png")] == before[str(root / "masks/000000000009.png")]
    )


def test_only_a_check_is_told_to_run_without_check(run, assert_refused, data_root):
    """A user's mask that is older than its source is refused by a run that already is without --check."""
    root = data_root / table_of("ade20k_train").folder
    miniatures.ade20k(root)
    argv = ("prepare_ade20k", "--partial", "--workers", 1)
    source, mask = (
        root / folder / "training/ADE_train_00000001.png" for folder in ("annotations", "annotations_detectron2")
    )
    indexed(mask, np.zeros(SIZE, np.uint8))
    os.utime(mask, (0, 0))
    assert_refused((f"{mask} already exists", f"({mask} is older than {source}); nothing was written"), *argv)
    assert f"{mask} is older than {source}; run without --check to make it" in run(*argv, "--check").err


def test_coco_masks_option_may_name_the_output_folder(assert_refused, data_root):
    root = data_root / "coco"
    miniatures.coco(root)
    for i in (9, 25, 30, 139):
        indexed(root / f"masks/{i:012d}.png", np.full(SIZE, 99 if i == 30 else 1, np.uint8))
    assert_refused(
        ("masks/000000000030.png is one of the input files", "has the id 99", "--masks"),
        "prepare_coco",
        "--partial",
        "--workers",
        1,
        "--masks",
        root / "masks",
    )


@pytest.mark.parametrize("name, folders", [("ade20k", ("annotations", "annotations_detectron2")), ("cityscapes", ())])
def test_masks_that_would_replace_their_sources_are_refused(run, assert_refused, data_root, name, folders):
    root = data_root / table_of(f"{name}_train").folder
    getattr(miniatures, name)(root)
    argv = (f"prepare_{name}", "--partial", "--workers", 1)
    (root / "train.txt").write_text("my own list\n")
    assert_refused((f"{root.name}/train.txt already exists",), *argv)
    (root / "train.txt").unlink()
    if folders:
        (root / folders[1]).symlink_to(root / folders[0])
    else:
        labels = next((root / "gtFine/train").rglob("*_labelIds.png"))
        os.link(labels, str(labels).replace("labelIds", "labelTrainIds"))
    assert_refused(("is one of the input files", "--root"), *argv)


def test_official_masks_of_earlier_versions_are_kept(run, data_root):
    root = data_root / table_of("cityscapes_train").folder
    miniatures.cityscapes(root)
    argv = ("prepare_cityscapes", "--partial", "--workers", 1)
    assert run(*argv).status == 0
    (root / RECORD).unlink()
    next(root.rglob("*_labelTrainIds.png")).unlink()
    result = run(*argv)
    assert result.status == 0 and " 1 of them new" in result.out, result.err


def test_camvid_is_not_prepared_into_its_source(run, assert_refused, data_root, tmp_path):
    source = tmp_path / "CamVid"
    miniatures.camvid(source)
    argv = ("prepare_camvid", "--partial", "--workers", 1, "--source", source)
    assert_refused(("CamVid/train.txt is one of the input files", "--root"), *argv, "--root", source)
    target = data_root / "camvid/masks/train/0016E5_00390.png"
    indexed(target, np.full(SIZE, 99, np.uint8))
    assert_refused(("masks/train/0016E5_00390.png already exists",), *argv)
    target.unlink()
    assert run(*argv).status == 0
    assert read_label(str(target)).max() == 255


def test_sampled_lists_do_not_overwrite_user_lists(run, assert_refused, user_root, tmp_path):
    assert run(*command(user_root, "--name", "new")).status == 0
    argv = ("prepare_splits", "--sample", "new_train", "--labeled", 1, 2, "--out", tmp_path / "splits")
    path = tmp_path / "splits/new_train/uniform/seed0/2/unlabeled.txt"
    path.parent.mkdir(parents=True)
    path.write_text("my choice\n")
    assert_refused(("seed0/2/unlabeled.txt already exists", "--out"), *argv)
    path.unlink()
    assert run(*argv).status == 0
    (tmp_path / "splits/new_train/uniform" / RECORD).unlink()  # earlier versions kept no record
    assert run(*argv).status == 0
    shutil.rmtree(tmp_path / "splits")
    assert run(*argv).status == 0 and run(*argv).status == 0
    path.write_text("ours, to be mended\n")
    assert run(*argv).status == 0 and "mended" not in path.read_text()


def test_published_lists_do_not_overwrite_user_lists(run, assert_refused, tmp_path, data_root):
    path = tmp_path / "splits/ade20k/1_64/labeled.txt"
    path.parent.mkdir(parents=True)
    path.write_text("my choice\n")
    argv = ("prepare_splits", "--only", "ade20k", "--out", tmp_path / "splits")
    assert_refused(("ade20k/1_64/labeled.txt already exists", "--out"), *argv)
    path.unlink()
    assert run(*argv).status == 0
    path.write_text("ours, and damaged\n")
    assert run(*argv).status == 0 and "damaged" not in path.read_text()
    path.write_text("damaged again\n")
    assert_refused(("1_64/labeled.txt is one of the input files",), *argv, "--source", tmp_path / "splits")


def test_shapes_with_added_files_are_not_overwritten(run, assert_refused, tmp_path):
    argv = ("prepare_shapes", "--root", tmp_path / "shapes", "--val", 2, "--size", 32, "--labeled", 2)
    assert run(*argv, "--train", 4).status == 0
    (tmp_path / "shapes/splits/mine").mkdir()
    (tmp_path / "shapes/splits/mine/labeled.txt").write_text("my choice\n")
    assert_refused(("was changed since it was written", "another folder"), *argv, "--train", 5)


def test_the_record_survives_a_killed_run(tmp_path):
    folder = OutputFolder(str(tmp_path), "--root")
    folder.add([f"{tmp_path}/a b.png", f"{tmp_path}/sub/ü.png"])
    with open(tmp_path / RECORD, "a") as file:
        file.write("half a na")
    folder = OutputFolder(str(tmp_path), "--root")
    folder.add([f"{tmp_path}/c.png"])
    for name in ("a b.png", "c.png", "half a name.png"):
        (tmp_path / name).write_text("x")
    folder = OutputFolder(str(tmp_path), "--root")
    assert not folder.foreign(f"{tmp_path}/a b.png") and not folder.foreign(f"{tmp_path}/c.png")
    assert folder.foreign(f"{tmp_path}/half a name.png")
    folder.settle()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/ü.png").write_text("drawn by hand")
    assert OutputFolder(str(tmp_path), "--root").foreign(f"{tmp_path}/sub/ü.png")
