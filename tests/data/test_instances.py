"""Instance annotations as targets, from the instance maps on disk to the samples."""

import numpy as np
import pytest
import torch
from PIL import Image

from hiervl.config import load_config
from hiervl.data.datasets import check_dataset, dataset_index, table_of
from hiervl.data.index import MaskPaths, PackedIndex
from hiervl.data.loaders import build_train_loader
from hiervl.data.mapper import TrainMapper
from hiervl.data.shapes import generate
from hiervl.errors import UserError


def test_paths_in_published_lists_map_to_the_prepared_files():
    ade, cityscapes = table_of("ade20k_train").paths, table_of("cityscapes_train").paths
    assert ade.mask("annotations/training/a.png") == "annotations_detectron2/training/a.png"
    assert ade.mask("annotations_detectron2/training/a.png") == "annotations_detectron2/training/a.png"
    assert ade.instance_map("annotations/training/a.png") is None
    assert cityscapes.instance_map("gtFine/val/x/x_gtFine_labelTrainIds.png") == "gtFine/val/x/x_gtFine_instanceIds.png"
    assert table_of("voc_val").paths.mask("SegmentationClass/1.png") == "SegmentationClassAug/1.png"
    record = PackedIndex([("a.jpg", "masks/a.png")], "/r", MaskPaths((), ("masks/", "instances/")))[0]
    assert record["instances_file_name"] == "/r/instances/a.png"
    assert record["sem_seg_file_name"] == "/r/masks/a.png"


def test_single_objects_keep_their_ids_and_groups_become_zero(tmp_path):
    """As in Cityscapes: 16 bits, with class ids below 1000 on pixels that belong to no single object."""
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    label = np.full((4, 6), 13, np.uint8)
    Image.fromarray(label).save(tmp_path / "a_mask.png")
    instance_ids = np.full((4, 6), 26, np.uint16)
    instance_ids[:, 2:4], instance_ids[:, 4:] = 26000, 33001
    Image.fromarray(instance_ids).save(tmp_path / "a_inst.png")
    record = {
        key: str(tmp_path / name)
        for key, name in [
            ("file_name", "a.png"),
            ("sem_seg_file_name", "a_mask.png"),
            ("instances_file_name", "a_inst.png"),
        ]
    }
    mapper = TrainMapper((8, 12), (2.0, 2.0), flip_prob=1.0, instances=True, first_instance=1000)
    sample = mapper.labeled(record, np.random.default_rng(0))
    assert sample["instances"].dtype == torch.int64
    assert sample["instances"][3].tolist() == [33001] * 4 + [26000] * 4 + [0] * 4
    padded = TrainMapper((8, 16), (1.0, 1.0), instances=True, first_instance=1000)
    assert padded.labeled(record, np.random.default_rng(0))["instances"][:, 6:].unique().tolist() == [0]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate(str(tmp_path / "shapes"), num_train=8, num_val=2, size=48, labeled=(4,))
    return load_config(
        "",
        [
            "DATASETS.TRAIN",
            "('shapes_train',)",
            "DATASETS.TEST",
            "('shapes_val',)",
            "DATASETS.SPLIT_ROOT",
            "",
            "DATASETS.SPLIT",
            "shapes/splits/seed0/4",
            "INPUT.CROP_SIZE",
            "(48, 48)",
            "SOLVER.IMS_PER_BATCH",
            4,
            "SOLVER.MAX_ITER",
            1,
            "DATALOADER.NUM_WORKERS",
            0,
            "MODEL.CRITERION.SEGMENTS",
            "instances",
        ],
    )


def test_each_instance_has_one_class(config):
    for sample in next(iter(build_train_loader(config)))["labeled"]:
        for instance_id in sample["instances"].unique().tolist():
            classes = sample["sem_seg"][sample["valid"] & (sample["instances"] == instance_id)].unique().tolist()
            assert (0 in classes) == (instance_id == 0) and len(classes) == 1  # 0 is the background of `shapes`


def test_missing_instance_map_and_dataset_without_any_are_reported(config, tmp_path):
    assert "instances_file_name" in dataset_index("shapes_train")[0]
    labeled = (tmp_path / "shapes/splits/seed0/4/labeled.txt").read_text().split()[0]
    (tmp_path / "shapes" / labeled.replace("images/", "instances/")).unlink()
    with pytest.raises(UserError, match="instances/train/.* does not exist"):
        build_train_loader(config)
    record = {"file_name": "a.png", "sem_seg_file_name": "b.png"}
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("L", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="MODEL.CRITERION.SEGMENTS is 'instances'"):
        check_dataset(PackedIndex([tuple(record.values())], str(tmp_path)), 2, 255, instances=True)


def test_labeled_image_that_is_also_used_for_evaluation_is_reported(config, tmp_path):
    config.MODEL.CRITERION.SEGMENTS = "class_regions"
    labeled = (tmp_path / "shapes/splits/seed0/4/labeled.txt").read_text().splitlines()[2]
    with open(tmp_path / "shapes" / "val.txt", "a") as file:
        file.write(labeled + "\n")
    with pytest.raises(UserError, match=f"'{labeled.split()[0]}' is labeled .* also in shapes_val"):
        build_train_loader(config)
    config.DATASETS.TEST = ("shapes_train",)
    build_train_loader(config)
