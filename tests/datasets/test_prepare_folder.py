"""A user's own images with each of the three kinds of labels, and everything that can be wrong with them."""

import errno
import json
import os
import signal
import time

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser
from PIL import Image

import train_net
from hiervl.data.datasets import dataset_index, table_of
from hiervl.data.images import read_label
from hiervl.data.prepare import coco_json, files, json_stream
from hiervl.data.prepare.parallel import parallel
from hiervl.errors import UserError

from . import miniatures
from .miniatures import SIZE, indexed, photo
from .test_prepare import TINY

COLORS = {(255, 0, 0): "road", (0, 0, 10): "car", (0, 0, 20): "car", (9, 9, 9): "ignore"}


@pytest.fixture
def user_folder(tmp_path):
    """6 photos with indexed and color-coded masks in a subfolder, 2 without; classes road, car."""
    folder = tmp_path / "my photos"
    for i in range(8):
        photo(folder / "images" / "süd" / f"foto {i}.jpg", i)
        if i < 6:
            ids = np.zeros(SIZE, np.uint8)
            ids[:4], ids[4:8, :i] = 255, 1
            indexed(folder / "masks" / "süd" / f"foto {i}.png", ids)
            colors = np.full((*SIZE, 3), (255, 0, 0), np.uint8)
            colors[:4], colors[4:8, :i] = (9, 9, 9), (0, 0, 10 + 10 * (i % 2))
            (folder / "colors" / "süd").mkdir(parents=True, exist_ok=True)
            Image.fromarray(colors).save(folder / "colors" / "süd" / f"foto {i}.png")
    (folder / "classes.txt").write_text("road\ncar\n")
    (folder / "palette.txt").write_text("".join(f"{r} {g} {b} {name}\n" for (r, g, b), name in COLORS.items()))
    return folder


@pytest.fixture
def prepare(run, data_root, user_folder):
    """``prepare(*options, masks="masks")`` runs prepare_folder on `user_folder` with the given masks."""

    def call(*options, masks="masks"):
        labels = ("--masks", user_folder / masks) if masks else ()
        return run(
            "prepare_folder",
            "--images",
            user_folder / "images",
            "--classes",
            user_folder / "classes.txt",
            *labels,
            "--workers",
            1,
            *options,
        )

    return call


def test_indexed_and_color_coded_masks_give_the_same_result(prepare, data_root, user_folder):
    assert prepare().status == 0
    first = [read_label(r["sem_seg_file_name"]) for r in dataset_index("folder_val")]
    assert prepare("--name", "second", "--palette", user_folder / "palette.txt", masks="colors").status == 0
    second = [read_label(r["sem_seg_file_name"]) for r in dataset_index("second_val")]
    assert len(first) == 1 and (first[0] == second[0]).all() and set(np.unique(first[0])) <= {0, 1, 255}
    assert table_of("second_train").colors == ((255, 0, 0), (0, 0, 10))
    assert MetadataCatalog.get("second_train").stuff_classes == ["road", "car"]


def test_a_changed_mask_is_made_again(prepare, user_folder, data_root):
    assert prepare().status == 0
    assert " 0 of them new" in prepare().out
    changed = user_folder / "masks" / "süd" / "foto 3.png"
    indexed(changed, np.ones(SIZE, np.uint8))
    os.utime(changed, (time.time() + 5, time.time() + 5))
    assert "is older than" in prepare("--check").err
    assert " 1 of them new" in prepare().out
    assert (read_label(str(data_root / "folder/masks/train/süd/foto 3.png")) == 1).all()


def test_unlabeled_and_validation_images_can_be_given(prepare, user_folder, data_root):
    for i in range(3):
        photo(user_folder / "more" / f"{i}.png", 10 + i)
        photo(user_folder / "val" / f"{i}.png", 20 + i)
        indexed(user_folder / "valmasks" / f"{i}.png", np.ones(SIZE, np.uint8))
    result = prepare(
        "--unlabeled",
        user_folder / "more",
        "--val-images",
        user_folder / "val",
        "--val-masks",
        user_folder / "valmasks",
    )
    assert result.status == 0 and "6 labeled and 5 unlabeled images" in result.out
    assert len(dataset_index("folder_train")) == 11 and len(dataset_index("folder_val")) == 3
    result = prepare("--val-images", user_folder / "images", "--val-masks", user_folder / "masks")
    assert result.status == 1 and "is both a training and a validation image" in result.err


def test_built_in_names_are_refused_and_roots_elsewhere_are_allowed(prepare, tmp_path):
    assert "--name coco is the name of a built-in dataset" in prepare("--name", "coco").err
    result = prepare("--root", tmp_path / "elsewhere" / "mine")
    assert result.status == 0 and f"DETECTRON2_DATASETS={tmp_path / 'elsewhere'} and DATASETS.TRAIN" in result.out


def test_coco_annotations_give_masks_and_instance_maps(run, data_root, tmp_path):
    miniatures.coco(tmp_path / "coco")
    classes = tmp_path / "classes.txt"
    classes.write_text("background\ndog\nperson\ncup\n")
    argv = (
        "prepare_folder",
        "--images",
        tmp_path / "coco/train2017",
        "--classes",
        classes,
        "--workers",
        1,
        "--coco",
        tmp_path / "coco/annotations/instances_train2017.json",
        "--val-share",
        0.3,
    )
    assert run(*argv).status == 0
    records = [*dataset_index("folder_train"), *dataset_index("folder_val")]
    record = next(r for r in records if r["image_id"].endswith("009.jpg"))
    assert set(np.unique(read_label(record["sem_seg_file_name"]))) == {0, 1, 2, 255}
    assert np.unique(read_label(record["instances_file_name"])).tolist() == [0, 2, 3]
    assert table_of("folder_val").things == ("dog", "person", "cup")
    classes.write_text("dog\nperson\ncup\n")  # without "background", pixels outside objects are ignored
    assert run(*argv, "--name", "other").status == 0
    record = next(r for p in ("train", "val") for r in dataset_index(f"other_{p}") if r["image_id"].endswith("009.jpg"))
    assert set(np.unique(read_label(record["sem_seg_file_name"]))) == {0, 1, 255}
    classes.write_text("dog\nperson\n")
    assert "has the category 'cup', which is not in the class list" in run(*argv).err


def damage(user_folder, defect):
    """Introduces a defect into photo or mask 2."""
    image, mask = (
        user_folder / kind / "süd" / name for kind, name in [("images", "foto 2.jpg"), ("masks", "foto 2.png")]
    )
    ids = np.zeros(SIZE, np.uint8)
    if defect == "truncated jpeg":
        image.write_bytes(image.read_bytes()[:-300])
    elif defect == "truncated png":
        mask.write_bytes(mask.read_bytes()[:-30])
    elif defect == "16 bits":
        indexed(mask, ids.astype(np.uint16))
    elif defect == "rgba":
        Image.fromarray(ids).convert("RGBA").save(mask)
    elif defect == "size":
        indexed(mask, ids[:-2])
    elif defect == "id":
        indexed(mask, ids + 7)
    elif defect == "exif":
        exif = Image.open(image).getexif()
        exif[0x0112] = 6
        Image.open(image).copy().save(image, exif=exif)
    elif defect == "orphan":
        indexed(mask.with_name("foto 99.png"), ids)
    elif defect == "not an image":
        image.write_text("hello")


@pytest.mark.parametrize(
    "defect, expected_words",
    [
        ("truncated jpeg", ("foto 2.jpg", "truncated")),
        ("truncated png", ("cannot decode", "foto 2.png")),
        ("16 bits", ("foto 2.png", "more than 8 bits")),
        ("rgba", ("foto 2.png", "color image (mode RGBA)")),
        ("size", ("foto 2.png is 32x22", "foto 2.jpg is 32x24")),
        ("id", ("foto 2.png has the id 7", "2 classes")),
        ("exif", ("foto 2.png is 32x24", "foto 2.jpg is 24x32")),
        ("orphan", ("foto 99.png belongs to no image",)),
        ("not an image", ("cannot decode", "foto 2.jpg")),
    ],
)
def test_defective_files_are_named_and_left_out(prepare, user_folder, data_root, defect, expected_words):
    damage(user_folder, defect)
    result = prepare("--val-share", 0.4, "--seed", 1)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.status == 1 and len(errors) == 1 and all(word in errors[0] for word in expected_words), result.err
    listed = {r["image_id"].rpartition("/")[2] for p in ("train", "val") for r in dataset_index(f"folder_{p}")}
    assert listed == {f"foto {i}.jpg" for i in range(8) if i != 2 or defect == "orphan"}
    assert not list(data_root.rglob("*.tmp"))


def test_color_masks_that_do_not_match_the_palette_are_named(prepare, user_folder):
    colors = user_folder / "colors" / "süd"
    with Image.open(colors / "foto 4.png") as image:
        image.putpixel((3, 20), (1, 2, 3))
        image.save(colors / "foto 4.png")
        image.convert("RGBA").save(colors / "foto 5.png")
    err = prepare("--palette", user_folder / "palette.txt", masks="colors").err
    assert "foto 4.png has the color (1, 2, 3) (1 pixels" in err
    assert "foto 5.png is not a color image (mode RGBA)" in err


@pytest.mark.parametrize(
    "file, text, expected_words",
    [
        ("palette.txt", "1 2 road", "palette.txt, line 1: expected 'R G B class name'"),
        ("palette.txt", "1 2 3 road\n1 2 3 car", "line 2: the color (1, 2, 3) appears twice"),
        ("palette.txt", "1 2 3 sky", "'sky' is not in the class list"),
        ("classes.txt", "road\nroad\n", "the class 'road' appears twice"),
        ("classes.txt", "\n", "classes.txt has 0 class names"),
    ],
)
def test_wrong_class_lists_and_palettes_are_refused(prepare, user_folder, file, text, expected_words):
    (user_folder / file).write_text(text)
    result = prepare("--palette", user_folder / "palette.txt", masks="colors")
    assert result.status == 1 and expected_words in result.err


def test_gray_and_cmyk_photos_are_used_and_noted(prepare, user_folder, data_root):
    for name, mode in (("foto 0.jpg", "L"), ("foto 1.jpg", "CMYK")):
        Image.open(user_folder / "images" / "süd" / name).convert(mode).save(user_folder / "images" / "süd" / name)
    result = prepare()
    assert result.status == 0 and "foto 0.jpg: mode L" in result.out and "foto 1.jpg: mode CMYK" in result.out


def test_a_full_disk_stops_the_run_and_a_rerun_continues(prepare, data_root, monkeypatch):
    real, written = os.replace, []

    def replace(source, target):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(target)
        return real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    result = prepare()
    assert result.status == 1 and "No space left on device" in result.err and "run again" in result.err
    assert len(list(data_root.rglob("*.png"))) == 3 and not list(data_root.rglob("*.tmp"))
    monkeypatch.setattr(files.os, "replace", real)
    result = prepare()
    assert result.status == 0 and "folder_train: 7 images, 5 valid masks, 2 of them new" in result.out


def test_symlinked_roots_and_images_work(run, user_folder, tmp_path, monkeypatch):
    (tmp_path / "disc").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disc")
    (tmp_path / "linked images").symlink_to(user_folder / "images")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "link"))
    argv = (
        "prepare_folder",
        "--images",
        tmp_path / "linked images",
        "--masks",
        user_folder / "masks",
        "--classes",
        user_folder / "classes.txt",
        "--workers",
        1,
    )
    assert run(*argv).status == 0 and run(*argv, "--check").status == 0
    assert len(dataset_index("folder_train")) == 7


def test_an_invalid_dataset_yaml_is_reported(prepare, run, data_root, tmp_path):
    assert prepare().status == 0
    (data_root / "folder" / "dataset.yaml").write_text("name: [")
    assert "dataset.yaml is not a table" in run("prepare_splits", "--sample", "folder_train", "--labeled", 1).err


def test_a_prepared_folder_trains_and_evaluates(prepare, user_folder, data_root, tmp_path):
    assert prepare().status == 0
    results = train_net.main(
        default_argument_parser().parse_args(
            [
                *TINY,
                "DATASETS.TRAIN",
                "('folder_train',)",
                "DATASETS.TEST",
                "('folder_val',)",
                "DATASETS.SPLIT_ROOT",
                "",
                "DATASETS.SPLIT",
                "folder/splits/all",
                "OUTPUT_DIR",
                str(tmp_path / "run"),
            ]
        )
    )
    assert set(results["last"]["folder_val"]["student"]) >= {"mIoU", "IoU-road"}


def square(x):
    return x * x


def kill_at_five(x):
    if x == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def test_parallel_keeps_the_order_and_reports_a_killed_worker():
    assert list(parallel(square, range(50), 2, "")) == [x * x for x in range(50)]
    with pytest.raises(UserError, match="a worker process was killed"):
        list(parallel(kill_at_five, range(50), 2, ""))


def test_several_workers_make_the_same_masks_as_one(prepare, data_root, run, user_folder):
    assert prepare().status == 0
    one = {p.name: p.read_bytes() for p in (data_root / "folder" / "masks").rglob("*.png")}
    damage(user_folder, "truncated png")
    result = prepare("--name", "two", "--workers", 2)
    assert result.status == 1 and result.err.count("error: ") == 1
    two = {p.name: p.read_bytes() for p in (data_root / "two" / "masks").rglob("*.png")}
    assert two == {name: content for name, content in one.items() if name != "foto 2.png"}


def test_json_is_read_in_pieces_of_any_size(tmp_path, monkeypatch):
    """The index does not depend on the size of the pieces; names are UTF-8; broken files are named."""
    annotations = [{"id": i, "image_id": i % 3, "category_id": 1, "note": 'ü{["' * (i % 5)} for i in range(30)]
    text = json.dumps(
        {
            "info": {"a": [1, {"b": "}"}]},
            "annotations": annotations,
            "images": [{"id": i, "file_name": f"fü {i}.jpg", "height": 4, "width": 1234567} for i in range(3)],
            "categories": [{"id": 1, "name": "tür"}],
            "more": 12,
        },
        ensure_ascii=False,
        indent=1,
    )
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    for size in (1, 7, 1 << 20):
        monkeypatch.setattr(json_stream, "_READ_SIZE", size)
        index = coco_json.CocoFile(str(path))
        assert index.images[2] == ("fü 2.jpg", 4, 1234567) and index.categories == {1: "tür"}
        assert index.annotations(1) == [a for a in annotations if a["image_id"] == 1] and index.annotations(7) == []
    for content in (text[:-30], text[:400], "[]", "{}", text.replace('"file_name"', '"name"')):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="a.json"):
            coco_json.CocoFile(str(path))
