"""Without a network: hubs and the model zoo end in one line within seconds, and CLIP's vectors are in the package."""

import time

import numpy as np
import pytest
import torch
from huggingface_hub import constants as hub

from hiervl import download
from hiervl.checkpoint import AtomicCheckpointer
from hiervl.config import load_config
from hiervl.errors import UserError
from hiervl.modeling.backbones import TimmBackbone
from hiervl.modeling.clip import load_clip
from hiervl.modeling.text import EmbeddingTable
from tests.conftest import shared_file

DATA_SETS = {"camvid": "camvid11", "ade20k": "ade150", "coco": "coco81", "voc": "voc21", "cityscapes": "cityscapes19"}


def refuse(*arguments, **options):
    raise OSError("no network")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Empty caches and no name resolution."""

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(download.urllib.request, "urlopen", refuse)


@pytest.mark.parametrize(
    "load, words",
    [
        (lambda: load_clip("ViT-B-16", "openai", "MODEL.TEXT"), "MODEL.TEXT.PRETRAINED .*MODEL.TEXT.EMBEDDINGS"),
        (lambda: load_clip("ViT-B-16", "openai", "MODEL.BACKBONE.CLIP"), "MODEL.BACKBONE.CLIP.PRETRAINED"),
        (lambda: TimmBackbone(name="vit_base_patch14_dinov2.lvd142m", pretrained=True), "MODEL.BACKBONE.WEIGHTS"),
        (
            lambda: AtomicCheckpointer(torch.nn.Linear(1, 1), "").load("detectron2://ImageNetPretrained/x/R-50.pkl"),
            r"MODEL.WEIGHTS\).*cache/detectron2/ImageNetPretrained/x/R-50.pkl",
        ),
    ],
)
def test_one_line_within_seconds_names_the_key_and_the_way_out(offline, load, words):
    start = time.monotonic()
    with pytest.raises(UserError, match=f"no network.*{words}|{words}.*no network") as error:
        load()
    assert "\n" not in str(error.value) and time.monotonic() - start < 30


def test_a_silent_server_is_given_up_on(monkeypatch):
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *a, **k: time.sleep(1) or refuse())
    with pytest.raises(OSError, match="no answer within 0.1 s"):
        download.check_answers("https://example.invalid", timeout=0.1)


def test_a_cached_hub_model_needs_no_answer(offline, tmp_path):
    folder = tmp_path / "hub" / "models--timm--some" / "snapshots" / "0"
    folder.mkdir(parents=True)
    with pytest.raises(OSError):
        download.check_hub("timm/some")
    (folder / "model.safetensors").touch()
    download.check_hub("timm/some")


def vectors(path, names, extra=()):
    return EmbeddingTable(path, [], extra=extra).embed(names, names)


@pytest.mark.parametrize("name, original", DATA_SETS.items())
def test_the_packages_vectors_are_the_original_ones_bit_by_bit(name, original):
    source = shared_file(f"clip_text/{original}.npz")
    with np.load(source) as data:
        names = [str(n).strip() for n in data["names"]]
    assert torch.equal(vectors(f"hiervl/data/tables/{name}_clip_vit_b16.npz", names), vectors(source, names))


def test_every_word_of_the_camvid_config_is_the_same_bit_by_bit():
    """In the order in which camvid_23_hiervl.yaml named the original files."""
    order = ("camvid11", "ade150", "coco81", "voc21", "voc21_definitions", "cityscapes19", "cityscapes19_definitions")
    first, *rest = (shared_file(f"clip_text/{name}.npz") for name in order)
    words = set()
    for path in (first, *rest):
        with np.load(path) as data:
            words |= {str(w).strip() for key in ("names", "texts") for w in data[key]}
    words, text = sorted(words), load_config("configs/camvid_23_hiervl.yaml", []).MODEL.TEXT
    ours, original = EmbeddingTable(text.EMBEDDINGS, [], text.EXTRA_EMBEDDINGS), EmbeddingTable(first, [], tuple(rest))
    assert torch.equal(ours.embed(words, words), original.embed(words, words)) and len(words) > 297
    assert [ours.words(w) for w in words] == [original.words(w) for w in words]
