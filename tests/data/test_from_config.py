import pytest
import torch

from hiervl.config import load_config
from hiervl.data.loaders import build_test_loader, build_train_loader
from hiervl.data.shapes import generate
from hiervl.errors import UserError

from tests.conftest import shared_file


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    generate(str(root / "shapes"), num_train=12, num_val=4, size=48, labeled=(4,))
    return root


@pytest.fixture
def config(data_root, monkeypatch):
    """Returns a function that makes a config for the small dataset, with additional KEY, VALUE pairs."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_root))
    options = [
        "DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)",
        "DATASETS.SPLIT_ROOT", "", "DATASETS.SPLIT", "shapes/splits/seed0/4",
        "INPUT.CROP_SIZE", "(32, 48)", "SOLVER.IMS_PER_BATCH", 2, "SEMI.UNLABELED_PER_BATCH", 2,
        "SOLVER.MAX_ITER", 5, "DATALOADER.NUM_WORKERS", 0,
    ]  # fmt: skip
    return lambda *overrides: load_config("", options + list(overrides))


def test_loaders_from_the_config(config):
    items = list(
        build_train_loader(config("SEMI.STRONG_VIEWS", 3, "SEMI.LOG_PSEUDO_LABEL_ACCURACY", True), start_iter=2)
    )
    assert len(items) == 3
    assert [len(items[0][key]) for key in ("labeled", "unlabeled")] == [2, 2]
    sample = items[0]["unlabeled"][0]
    assert len(sample["strong"]) == len(sample["cutmix_box"]) == 3
    assert sample["image"].shape == (3, 32, 48) and sample["true_sem_seg"].shape == (32, 48)
    tests = list(build_test_loader(config("INPUT.TEST_SHORT_SIDE", 24), "shapes_val"))
    assert len(tests) == 4 and tests[0][0]["image"].shape == (3, 24, 24) and tests[0][0]["height"] == 48


def test_rare_class_sampling_from_the_config(config):
    plain = next(iter(build_train_loader(config())))
    rare = next(iter(build_train_loader(config("SEMI.RARE_CLASS.ENABLED", True))))
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(plain["labeled"], rare["labeled"]))
    for a, b in zip(plain["unlabeled"], rare["unlabeled"]):
        assert torch.equal(a["image"], b["image"])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("SEED", -1, "SEED is -1"),
        ("DATASETS.SPLIT", "", "DATASETS.SPLIT is empty"),
        ("DATASETS.SPLIT", "shapes/splits/seed9/4", "seed9/4 does not exist.*DATASETS.SPLIT"),
        ("DATASETS.TRAIN", "('shape_train',)", "unknown dataset 'shape_train'; available: .*shapes_train"),
        ("DATASETS.TRAIN", "()", "DATASETS.TRAIN"),
    ],
)
def test_invalid_keys_are_named(config, key, value, words):
    with pytest.raises(UserError, match=words):
        build_train_loader(config(key, value))


def test_camvid_end_to_end(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", shared_file("datasets"))
    cfg = load_config("", ["DATASETS.SPLIT_ROOT", shared_file("splits"), "DATASETS.SPLIT", "camvid/seed0/23",
                           "INPUT.CROP_SIZE", "(256, 256)", "SOLVER.IMS_PER_BATCH", 4, "SEMI.UNLABELED_PER_BATCH", 4,
                           "SOLVER.MAX_ITER", 1, "DATALOADER.NUM_WORKERS", 0])  # fmt: skip
    item = next(iter(build_train_loader(cfg)))
    assert all(s["sem_seg"][s["valid"]].unique().numel() > 1 for s in item["labeled"])
    assert len(item["unlabeled"]) == 4
