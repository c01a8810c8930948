"""Every row of the protocol's table has a config whose numbers follow from the protocol, and which builds."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from detectron2.modeling import build_model

from hiervl.modeling import meta_arch
from hiervl.modeling.backbones import clip_model
from hiervl.config import load_config
from hiervl.data.datasets import table_of
from hiervl.data.prepare.published import known_hashes
from hiervl.modeling.text import ClassText
from hiervl.modeling.text.word_lists import read_definitions
from hiervl.semi.solver import build_lr_scheduler, build_optimizer

from .conftest import shared_file

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# dataset: (epochs, crop, {labeled images: split})
PROTOCOL = {
    "coco": (10, 512, {232: "1_512", 463: "1_256", 925: "1_128", 1849: "1_64", 3697: "1_32"}),
    "voc": (80, 512, {n: str(n) for n in (92, 183, 366, 732, 1464)}),
    "ade20k": (40, 512, {158: "1_128", 316: "1_64", 632: "1_32", 1263: "1_16", 2526: "1_8"}),
    "cityscapes": (240, 801, {100: "1_30", 186: "1_16", 372: "1_8", 744: "1_4", 1488: "1_2"}),
}
ROWS = [(name, count) for name, (_, _, splits) in PROTOCOL.items() for count in splits]
EMBEDDINGS = {"coco": "coco81", "voc": "voc21", "ade20k": "ade150", "cityscapes": "cityscapes19", "camvid": "camvid11"}


@pytest.mark.parametrize("name, labeled", ROWS)
def test_the_protocol(name, labeled):
    cfg = load_config(str(CONFIGS / f"{name}_{labeled}.yaml"), [])
    epochs, crop, splits = PROTOCOL[name]
    unlabeled = table_of(f"{name}_train").parts[f"{name}_train"]["images"] - labeled
    assert cfg.SOLVER.MAX_ITER == epochs * (unlabeled // cfg.SEMI.UNLABELED_PER_BATCH)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SEMI.UNLABELED_PER_BATCH) == (8, 8)
    assert cfg.INPUT.CROP_SIZE == cfg.TEST.WINDOW == (crop, crop)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.POLY_POWER, cfg.SOLVER.WARMUP_ITERS) == (1e-4, 0.9, 1500)
    assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.BACKBONE_MULTIPLIER) == (1e-4, 0, 0.1)
    assert cfg.DATASETS.SPLIT == f"{name}/{splits[labeled]}"
    assert f"{cfg.DATASETS.SPLIT}/labeled.txt" in known_hashes()
    assert cfg.DATASETS.TRAIN == (f"{name}_train",) and cfg.DATASETS.TEST == (f"{name}_val",)
    assert cfg.OUTPUT_DIR.endswith(f"/{name}_{labeled}")


@pytest.mark.parametrize("name", PROTOCOL)
def test_learning_rates_follow_the_protocol(name):
    """The network learns at 1e-4 and its backbone at a tenth of it: 1,500 iterations of warm-up, then power 0.9."""
    cfg = load_config(str(CONFIGS / f"{name}_{min(PROTOCOL[name][2])}.yaml"), [])
    network = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "decoder": torch.nn.Linear(2, 2)})
    optimizer = build_optimizer(cfg, network)
    scheduler = build_lr_scheduler(cfg, optimizer)
    length = cfg.SOLVER.MAX_ITER
    for iteration in (0, 750, 1500, length // 2, length):
        scheduler.last_epoch = iteration
        rates = {p: rate for group, rate in zip(optimizer.param_groups, scheduler.get_lr()) for p in group["params"]}
        decay = (1 - iteration / length) ** 0.9
        for part, peak in (("backbone", 1e-5), ("decoder", 1e-4)):
            rate = rates[network[part].weight]
            if iteration >= 1500:
                assert rate == pytest.approx(peak * decay)
            else:
                assert rate < 0.51 * peak


@pytest.mark.parametrize("labeled", [11, 46, 92])
def test_camvid(labeled):
    cfg = load_config(str(CONFIGS / f"camvid_{labeled}_unimatch.yaml"), [])
    assert cfg.DATASETS.SPLIT == f"camvid/seed0/{labeled}" and f"{cfg.DATASETS.SPLIT}/labeled.txt" in known_hashes()


def test_lists_have_as_many_images_as_their_configs_say():
    for name, (_, _, splits) in PROTOCOL.items():
        for labeled, split in splits.items():
            with open(shared_file(f"splits/{name}/{split}/labeled.txt")) as file:
                assert sum(1 for line in file if line.strip()) == labeled


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_class_names_are_those_of_the_embeddings(name):
    with np.load(shared_file(f"clip_text/{EMBEDDINGS[name]}.npz")) as data:
        assert tuple(str(n).strip() for n in data["names"]) == table_of(f"{name}_train").classes


@pytest.mark.parametrize("name", PROTOCOL)
def test_definitions_belong_to_classes_and_tell_them_apart(name):
    classes = table_of(f"{name}_train").classes
    cfg = load_config(str(CONFIGS / f"{name}_{min(PROTOCOL[name][2])}.yaml"), [])
    definitions = read_definitions(str(CONFIGS.parent / cfg.MODEL.TEXT.DEFINITIONS))
    assert set(definitions) <= set(classes)
    texts = [text.casefold() for k in classes for text in definitions.get(k, [k])]
    assert len(texts) == len(set(texts)) > len(classes)


def text_on_cpu(cfg, names):
    """The class embeddings are read and compared, which the meta device cannot do."""
    with torch.device("cpu"):
        return ClassText(cfg, names)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """``build(config, *overrides)``: the network on the meta device, without weights; names have random embeddings."""
    monkeypatch.setattr(meta_arch, "ClassText", text_on_cpu)
    clip = open_clip.create_model  # a model without weights instead of a download
    monkeypatch.setattr(clip_model, "load_clip", lambda name, pretrained, key: clip(f"{name}-quickgelu", device="meta"))

    def make(config):
        cfg = load_config(str(CONFIGS / f"{config}.yaml"), [])
        classes = table_of(cfg.DATASETS.TRAIN[0]).classes
        np.savez(tmp_path / "e.npz", names=np.array(classes), embeddings=np.eye(len(classes), 512, dtype=np.float32))
        cfg.merge_from_list(
            [
                "MODEL.DEVICE",
                "meta",
                "MODEL.TEXT.EMBEDDINGS",
                str(tmp_path / "e.npz"),
                "MODEL.TEXT.DEFINITIONS",
                "",
                "MODEL.BACKBONE.TIMM.PRETRAINED",
                False,
            ]
        )
        with torch.device("meta"):
            model = build_model(cfg)
        assert model.num_classes == len(classes) and model.protocol.mode == "sliding"
        return model

    return make


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "variant, backbone",
    [
        # ResNet-50's convolutions: its norms are frozen, its classifier is gone.
        ("_r50", 23_454_912),
        ("_dinov2", None),
        ("", None),
    ],
)
def test_the_models_are_built_and_differ_in_their_text_alone(build, variant, backbone):
    """With names as text, no weight grows with the number of classes."""
    models = [build(f"{name}_{min(splits)}{variant}") for name, (_, _, splits) in PROTOCOL.items()]
    assert len({count(m) for m in models}) == 1
    if backbone:
        assert count(models[0].backbone) == backbone
    else:
        assert 80e6 < count(models[0].backbone) < 95e6  # ViT-B has 86 million, the feature pyramid a few


@pytest.mark.parametrize("name, labeled", [(name, min(splits)) for name, (_, _, splits) in PROTOCOL.items()])
def test_variants_differ_in_their_backbone_and_crop(name, labeled):
    plain, r50, dino = (load_config(str(CONFIGS / f"{name}_{labeled}{v}.yaml"), []) for v in ("", "_r50", "_dinov2"))
    assert {cfg.SOLVER.MAX_ITER for cfg in (plain, r50, dino)} == {plain.SOLVER.MAX_ITER}
    assert {cfg.DATASETS.SPLIT for cfg in (plain, r50, dino)} == {plain.DATASETS.SPLIT}
    assert r50.INPUT.CROP_SIZE == plain.INPUT.CROP_SIZE and dino.INPUT.CROP_SIZE[0] % 14 == 0
    assert len({cfg.OUTPUT_DIR for cfg in (plain, r50, dino)}) == 3
    assert plain.MODEL.TEXT.EMBEDDINGS == ""  # the text tower's
