"""Every benchmark in miniature: prepare, check, prepare again, register, load, train one iteration, evaluate."""

import numpy as np
import pytest
from detectron2.engine import default_argument_parser
from PIL import Image

import train_net
from hiervl.data.datasets import check_dataset, dataset_index, dataset_root, table_of
from hiervl.data.images import read_label
from hiervl.data.splits import load_split

from . import miniatures


@pytest.fixture
def prepare(run, data_root, tmp_path):
    """``prepare(name, *options)`` runs the script of a dataset on its miniature."""

    def call(name, *options):
        folder = data_root / table_of(f"{name}_train").folder
        extra = {"camvid": ("--source", tmp_path / "CamVid"), "voc": ("--sbd", tmp_path / "SBD")}.get(name, ())
        if not folder.exists() and not (tmp_path / "CamVid").exists():
            other = {"camvid": [tmp_path / "CamVid"], "voc": [folder, tmp_path / "SBD"]}.get(name, [folder])
            getattr(miniatures, name)(*other)
        return run(f"prepare_{name}", "--partial", "--workers", 1, *extra, *options)

    return call


def masks(part):
    return {r["image_id"]: read_label(r["sem_seg_file_name"]) for r in dataset_index(part)}


def test_coco_masks_follow_the_rules_for_overlaps_and_crowds(prepare, data_root):
    result = prepare("coco", "--instances")
    assert result.status == 0, result.err
    made = masks("coco_train")
    people = made["train2017/000000000009.jpg"]
    expected = np.zeros(miniatures.SIZE, np.uint8)
    expected[:, 20:] = 255
    expected[2:18, 2:22] = 1  # on top of the crowd
    expected[6:10, 6:10] = 17  # the smaller object is on top, although it comes first in the file
    assert (people == expected).all()
    assert not made["train2017/000000000025.jpg"].any()
    assert set(np.unique(made["train2017/000000000030.jpg"])) == {0, 42}
    numbers = read_label(str(data_root / "coco/instances/000000000009.png"))
    assert np.unique(numbers[people == 17]).tolist() == [3] and np.unique(numbers[people == 1]).tolist() == [2]
    assert not numbers[(people == 255) | (people == 0)].any()
    assert Image.open(data_root / "coco/masks/000000000009.png").mode == "P"
    assert "coco_train: 3 images, 3 valid masks, 3 of them new, 0 problems" in result.out
    assert "no pixels of 2 bicycle" in result.out


def test_coco_accepts_ready_made_masks(prepare, data_root, tmp_path):
    for i in (9, 25, 30, 139):
        miniatures.indexed(tmp_path / "archive" / f"{i:012d}.png", np.full(miniatures.SIZE, i % 81, np.uint8))
    assert prepare("coco", "--masks", tmp_path / "archive").status == 0
    assert (masks("coco_val")["val2017/000000000139.jpg"] == 58).all()
    (tmp_path / "archive" / "000000000030.png").unlink()
    (data_root / "coco/masks/000000000030.png").unlink()
    assert "000000000030.png does not exist; the archive" in prepare("coco", "--masks", tmp_path / "archive").err


def test_voc_masks_take_precedence_and_val_images_are_left_out(prepare):
    assert prepare("voc").status == 0
    train, val = masks("voc_train"), masks("voc_val")
    assert list(train) == ["JPEGImages/2007_000032.jpg", "JPEGImages/2008_000002.jpg"]
    assert list(val) == ["JPEGImages/2007_000033.jpg"]
    assert set(np.unique(train["JPEGImages/2007_000032.jpg"])) == {15, 255}
    assert (train["JPEGImages/2008_000002.jpg"] == 7).all()


def test_ade20k_ids_are_shifted(prepare):
    assert prepare("ade20k").status == 0
    assert masks("ade20k_train")["images/training/ADE_train_00000002.jpg"][0, ::8].tolist() == [255, 0, 149, 4]


def test_cityscapes_ids_are_mapped_and_instance_maps_found(prepare):
    assert prepare("cityscapes").status == 0
    record = dataset_index("cityscapes_val")[0]
    label, numbers = (read_label(record[key]) for key in ("sem_seg_file_name", "instances_file_name"))
    assert [label[i, 0] for i in (0, 4, 8)] == [255, 13, 0] and numbers[4, ::10].tolist() == [26000, 26001, 26, 26]


def test_camvid_void_is_ignored_and_images_are_renamed(prepare, data_root):
    result = prepare("camvid")
    assert result.status == 0, result.err
    train = masks("camvid_train")
    assert list(train) == sorted(f"images/train/{s}.jpg" for s in ("0001TP_006690", "0016E5_00390", "0006R0_f01020"))
    assert next(iter(train.values()))[0, 10:13].tolist() == [10, 255, 0]
    assert len(dataset_index("camvid_test")) == 1
    assert prepare("camvid", "--check").status == 0
    assert prepare("camvid", "--png").status == 0
    assert dataset_index("camvid_val")[0]["image_id"] == "images/val/0016E5_07959.png"


@pytest.mark.parametrize("name", ["coco", "voc", "ade20k", "cityscapes", "camvid"])
def test_check_reports_problems_and_a_rerun_repairs_them(prepare, data_root, name):
    assert prepare(name, "--check").status == 1
    before = sorted(data_root.rglob("*"))
    result = prepare(name, "--check")
    if name != "camvid":  # for CamVid the missing images are reported instead
        assert "is missing; run without --check to make it" in result.err
    assert "train.txt is missing" in result.err or name == "voc" and "train_aug.txt is missing" in result.err
    assert sorted(data_root.rglob("*")) == before
    assert prepare(name).status == 0
    assert prepare(name, "--check").status == 0
    record = dataset_index(f"{name}_train")[0]
    with open(record["sem_seg_file_name"], "r+b") as file:  # like a copy that was killed
        file.truncate(60)
    result = prepare(name, "--check")
    assert result.status == 1 and record["sem_seg_file_name"].rpartition("/")[2] in result.err
    result = prepare(name)
    assert result.status == 0 and f"{name}_train: " in result.out and " 1 of them new" in result.out
    assert prepare(name, "--check").status == 0
    assert not list(data_root.rglob("*.tmp"))


def test_image_counts_must_be_the_official_ones(run, data_root):
    miniatures.ade20k(data_root / "ADEChallengeData2016")
    result = run("prepare_ade20k", "--workers", 1)
    assert result.status == 1 and "ade20k_train: 2 images were found" in result.err and "20210" in result.err


TINY = [
    "MODEL.DEVICE",
    "cpu",
    "MODEL.BACKBONE.NAME",
    "TimmBackbone",
    "MODEL.BACKBONE.TIMM.NAME",
    "lcnet_050",
    "MODEL.PIXEL_DECODER.CONV_DIM",
    "32",
    "MODEL.PIXEL_DECODER.MASK_DIM",
    "32",
    "MODEL.PIXEL_DECODER.ENC_LAYERS",
    "1",
    "MODEL.PIXEL_DECODER.FEEDFORWARD_DIM",
    "32",
    "MODEL.DECODER.HIDDEN_DIM",
    "32",
    "MODEL.DECODER.NUM_QUERIES",
    "8",
    "MODEL.DECODER.NUM_LAYERS",
    "1",
    "MODEL.DECODER.FEEDFORWARD_DIM",
    "32",
    "MODEL.DECODER.CLASSIFIER",
    "linear",
    "MODEL.CRITERION.NUM_POINTS",
    "64",
    "MODEL.HSQG.ENABLED",
    "False",
    "MODEL.CMSAM.ENABLED",
    "False",
    "MODEL.DECODER.SEMANTIC",
    "False",
    "INPUT.CROP_SIZE",
    "(64, 64)",
    "INPUT.TEST_SHORT_SIDE",
    "64",
    "SOLVER.IMS_PER_BATCH",
    "2",
    "SOLVER.MAX_ITER",
    "1",
    "SOLVER.CHECKPOINT_PERIOD",
    "1",
    "DATALOADER.NUM_WORKERS",
    "0",
    "SEMI.UNLABELED_PER_BATCH",
    "2",
]


@pytest.mark.parametrize("name", ["coco", "voc", "ade20k", "cityscapes", "camvid"])
def test_prepared_datasets_train_and_evaluate(prepare, run, data_root, tmp_path, name):
    assert prepare(name).status == 0
    assert run("prepare_splits", "--sample", f"{name}_train", "--labeled", 1, "--out", tmp_path / "splits").status == 0
    results = train_net.main(
        default_argument_parser().parse_args(
            [
                *TINY,
                "DATASETS.TRAIN",
                f"('{name}_train',)",
                "DATASETS.TEST",
                f"('{name}_val',)",
                "DATASETS.SPLIT_ROOT",
                str(tmp_path / "splits"),
                "DATASETS.SPLIT",
                f"{name}_train/uniform/seed0/1",
                "OUTPUT_DIR",
                str(tmp_path / "run"),
            ]
        )
    )
    assert 0 <= results["last"][f"{name}_val"]["teacher"]["mIoU"] <= 100


def test_published_lists_load_with_the_prepared_masks(prepare, tmp_path):
    """The lists name VOC's and ADE20K's original folders; the loader finds the prepared masks."""
    for name, line in [
        ("ade20k", "images/training/ADE_train_00000001.jpg annotations/training/ADE_train_00000001.png"),
        ("voc", "JPEGImages/2008_000002.jpg SegmentationClass/2008_000002.png"),
    ]:
        assert prepare(name).status == 0
        split = tmp_path / "splits" / name
        split.mkdir(parents=True)
        (split / "labeled.txt").write_text(line)
        part, table = f"{name}_train", table_of(f"{name}_train")
        labeled, unlabeled = load_split(str(split), dataset_root(part), dataset_index(part), table.paths)
        assert len(unlabeled) == 1
        check_dataset(labeled, len(table.classes), table.ignore_label)
