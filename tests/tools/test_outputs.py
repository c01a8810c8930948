"""The tools write onto no image that they read, and onto no file that they did not make."""

import hashlib
import json
import os

import cv2
import numpy as np
import pytest
import torch

from hiervl import Prediction
from hiervl.errors import UserError
from tools import convert_mask2former, demo
from tools.analysis import trained
from tools.setup import run_demo

CONFIG = "configs/shapes_supervised.yaml"


def tree(folder):
    return {str(path): path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*")}


def photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    return str(path)


class Gray:
    """In the place of demo.Predictor: every overlay is gray."""

    def __init__(self, *arguments, **options):
        pass

    def __call__(self, path):
        image = cv2.imread(path)
        colors = np.full((1, 3), 99, np.uint8)
        return Prediction(image, np.zeros((16, 16), np.uint8), np.ones((16, 16), np.float32), ["gray"], colors)


@pytest.fixture
def show(monkeypatch, capsys):
    """``show(output, *inputs)`` -> status and errors of the demo, with Gray as its network."""
    monkeypatch.setattr(demo, "Predictor", Gray)

    def call(output, *inputs):
        status = demo.main(["--config-file", CONFIG, "--input", *map(str, inputs), "--output", str(output)])
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def refused(show, tmp_path, monkeypatch):
    """The demo must end with 2 and one line that has these words, without a network and with every file as it was."""

    def call(words, output, *inputs):
        before = tree(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(demo, "Predictor", lambda *args, **options: pytest.fail("computed before it was refused"))
            status, err = show(output, *inputs)
        assert status == 2 and len(err.strip().splitlines()) == 1 and all(word in err for word in words), err
        assert tree(tmp_path) == before

    return call


def test_overlays_onto_photos(show, refused, tmp_path):
    images = tmp_path / "images"
    for i in range(3):
        photo(images / f"{i}.jpg")
    refused(("images/0.jpg is one of the input files", "--output"), images, images / "*.jpg")
    (tmp_path / "link").symlink_to(images)
    refused(("link/0.jpg is one of the input files", "--output"), tmp_path / "link", images / "*.jpg")
    (tmp_path / "out").mkdir()
    os.link(images / "1.jpg", tmp_path / "out/1.jpg")
    refused(("out/1.jpg is one of the input files",), tmp_path / "out", images / "*.jpg")
    (tmp_path / "out/1.jpg").unlink()
    before = tree(images)
    for _ in range(2):
        assert show(tmp_path / "out", images / "*.jpg")[0] == 0
    assert tree(images) == before and len(list((tmp_path / "out").glob("*.[jp]*g"))) == 6
    refused(("out/0.jpg is one of the input files",), tmp_path / "out", tmp_path / "out/0.jpg")
    (tmp_path / "out/2.jpg").unlink()
    (tmp_path / "out/2.jpg").symlink_to(photo(tmp_path / "album/9.jpg"))  # no input, and no less someone's photo
    refused(("out/2.jpg already exists",), tmp_path / "out", images / "*.jpg")


@pytest.mark.parametrize("name", ["1.jpg", "1_labels.png"])
def test_a_file_of_another_hand_in_the_output(refused, show, tmp_path, name):
    photo(tmp_path / "images/1.jpg")
    photo(tmp_path / "out" / name)
    refused((f"out/{name} already exists", "--output"), tmp_path / "out", tmp_path / "images/1.jpg")
    (tmp_path / "out" / name).unlink()
    assert show(tmp_path / "out", tmp_path / "images/1.jpg")[0] == 0


def test_a_run_that_fails_claims_nothing(refused, show, tmp_path, monkeypatch):
    image = photo(tmp_path / "images/1.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(Gray, "__init__", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            show(tmp_path / "out", image)
    photo(tmp_path / "out/1.jpg")
    refused(("out/1.jpg already exists",), tmp_path / "out", image)


@pytest.mark.parametrize(
    "files, stems",
    [
        (["x.jpg", "y.png"], ["x", "y"]),
        (["x.jpg", "x.png", "y.png"], ["x_jpg", "x_png", "y"]),
        (["a/x.jpg", "b/x.jpg"], ["a_x_jpg", "b_x_jpg"]),
        (["a/x.jpg", "b/x.png"], ["x_jpg", "x_png"]),
        (["c/a/x.jpg", "d/a/x.jpg"], ["a_x_jpg", "a_x_jpg_2"]),
        (["x.jpg", "./x.jpg"], ["x"]),
        (["a/x.jpg", "b/X.jpg"], ["a_x_jpg", "b_X_jpg"]),
        (["a/x.jpg", "b/x.png", "b/x_png.jpg"], ["x_jpg", "b_x_png", "b_x_png_2"]),
    ],
)
def test_every_image_has_overlays_of_its_own(files, stems):
    made = list(demo.targets(files, "out").values())
    assert made == [f"out/{stem}" for stem in stems]
    assert len({name.casefold() for name in made}) == len(made)


def test_make_demo_leaves_other_runs_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_demo.shapes, "generate", lambda root: pytest.fail("began before it was refused"))
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/results.json").write_text("of my own training")
    before = tree(tmp_path)
    assert run_demo.main(["--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "shapes already exists" in err and "--output" in err and tree(tmp_path) == before
    (tmp_path / "shapes/console.log").write_text("of an earlier version of this tool")
    run_demo.claim(str(tmp_path))
    (tmp_path / "shapes/console.log").unlink()
    run_demo.claim(str(tmp_path))


def test_make_demo_removes_only_its_own_results(tmp_path, monkeypatch):
    monkeypatch.setattr(run_demo.subprocess, "Popen", lambda *arguments, **options: None)
    for name in ("metrics.json", "results.json", "notes.json"):
        (tmp_path / name).write_text("{}")
    run_demo.Run("title", CONFIG, str(tmp_path), 1, []).log.close()
    assert {path.name for path in tmp_path.iterdir()} == {"notes.json", "console.log"}


def test_a_checkpoint_converted_onto_another(tmp_path, capsys):
    source, other = tmp_path / "official.pth", tmp_path / "mine.pth"
    weights = {
        name.replace("decoder.", "sem_seg_head.predictor.", 1)
        if name.startswith("decoder.")
        else f"sem_seg_head.{name}": torch.zeros(1)
        for name in convert_mask2former.LANDMARKS
    }
    torch.save({"model": weights}, source)
    torch.save({"model": {}}, other)
    (tmp_path / "link.pth").symlink_to(source)
    before = tree(tmp_path)
    for target, words in (
        (source, "one of the input files"),
        (tmp_path / "link.pth", "one of the input files"),
        (other, "already exists"),
    ):
        assert convert_mask2former.main([str(source), str(target)]) == 2
        err = capsys.readouterr().err
        assert target.name in err and words in err and "OUTPUT" in err and len(err.strip().splitlines()) == 1
    assert tree(tmp_path) == before
    for _ in range(2):
        assert convert_mask2former.main([str(source), str(tmp_path / "new.pth")]) == 0


def test_results_of_another_hand(tmp_path):
    args = demo.parse_args(["--config-file", CONFIG, "--input", "x", "--output", str(tmp_path)])
    cfg, path = trained.read_config(CONFIG, []), tmp_path / "queries.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="queries.json already exists .* --output"):
        trained.output_folder(args, cfg, "queries.json")
    path.write_text(json.dumps(dict.fromkeys(("config", "weights", "model", "data set", "images"))))
    trained.output_folder(args, cfg, "queries.json")  # of an earlier version
