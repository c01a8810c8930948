"""The predictor: any kind of image in, labels and confidence out, from a run's folder alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from hiervl import Predictor
from hiervl.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a small network whose weights are random."""
    from detectron2.modeling import build_model

    from hiervl.config import load_config
    from tests.test_train_net import TINY

    folder = tmp_path_factory.mktemp("run")
    cfg = load_config("configs/shapes_supervised.yaml", [*TINY, "OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor.from_run(str(run))


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)


def same(first, second):
    assert (first.labels == second.labels).all()
    np.testing.assert_allclose(first.confidence, second.confidence, atol=1e-5)


def test_arrays_pil_images_and_paths_are_the_same(predictor, image, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(image).save(path)
    first = predictor(image)
    assert first.labels.shape == first.confidence.shape == (40, 56) and first.labels.dtype == np.uint8
    for other in (str(path), path, Image.fromarray(image)):
        same(first, predictor(other))


def test_a_list_goes_in_batches_of_one_size_and_comes_back_in_order(predictor, image):
    images = [image, image[:24], np.ascontiguousarray(image[::-1]), image[:24, :, ::-1].copy()]
    sizes = []
    handle = predictor.network.backbone.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    together = predictor(images)
    handle.remove()
    assert sizes == [2, 2]
    for prediction, alone in zip(together, images):
        same(prediction, predictor(alone))


def test_probabilities_only_on_request(predictor, image):
    assert predictor(image).probabilities is None
    prediction = predictor(image, probabilities=True)
    assert prediction.probabilities.shape == (len(predictor.class_names), 40, 56)
    assert (prediction.probabilities.argmax(0) == prediction.labels).all()
    assert (prediction.probabilities.sum(0) < 1).all()


def test_saving_and_unsure_pixels(predictor, image, tmp_path):
    prediction = predictor(image)
    threshold = float(np.median(prediction.confidence))
    overlay, labels = prediction.save(str(tmp_path / "out"), min_confidence=threshold)
    written = np.array(Image.open(labels))
    assert ((written == 255) == (prediction.confidence < threshold)).all()
    assert (written[written < 255] == prediction.labels[written < 255]).all()
    assert min(Image.open(overlay).size) >= 360


def test_other_classes(run, image):
    predictor = Predictor.from_run(str(run), classes=["red disc", "blue ring"])
    prediction = predictor(image)
    assert prediction.class_names == ["red disc", "blue ring"] and prediction.labels.max() < 2
    assert len(set(map(tuple, prediction.colors))) == 2


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4), np.uint8), "must be uint8"),
        (np.zeros((4, 4, 3), np.float32), "must be uint8"),
        ("nowhere.jpg", "nowhere.jpg does not exist"),
    ],
)
def test_images_that_are_none(predictor, image, message):
    with pytest.raises(UserError, match=message):
        predictor(image)


def test_folders_that_are_no_run(tmp_path, run):
    with pytest.raises(UserError, match="has no config.yaml"):
        Predictor.from_run(str(tmp_path))
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(UserError, match="holds no checkpoint"):
        Predictor.from_run(str(tmp_path))
    with pytest.raises(UserError, match="MODEL.WEIGHTS is empty"):
        Predictor(str(tmp_path / "config.yaml"))
