"""Our metrics against Detectron2's SemSegEvaluator, an independent implementation."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from hiervl.evaluation import SegmentationEvaluator

NAME = "dataset for comparing evaluators"


@pytest.fixture
def register_dataset():
    """Returns a function that registers records with K classes, for one test."""

    def register(records, k, ignore):
        DatasetCatalog.register(NAME, lambda: records)
        MetadataCatalog.get(NAME).set(stuff_classes=[f"class {i}" for i in range(k)], ignore_label=ignore)

    yield register
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


@pytest.mark.parametrize("k, ignore", [(2, 255), (19, 255), (150, 255), (256, 65535), (300, 65535)])
def test_equals_an_independent_evaluator(register_dataset, tmp_path, k, ignore):
    """Covers ignored pixels, absent classes, and classes that are only predicted."""
    rng = np.random.default_rng(k)
    records, outputs = [], []
    for i, shape in enumerate([(40, 61), (33, 20)]):
        label = rng.integers(0, max(1, k - 3), shape)  # the last three classes do not occur
        prediction = np.where(rng.random(shape) < 0.6, label, rng.integers(0, max(1, k - 1), shape))
        label[rng.random(shape) < 0.2] = ignore
        path = str(tmp_path / f"{i}.png")
        Image.fromarray(label.astype(np.uint8 if ignore == 255 else np.uint16)).save(path)
        records.append({"file_name": f"{i}.jpg", "sem_seg_file_name": path})
        scores = torch.nn.functional.one_hot(torch.from_numpy(prediction), k).permute(2, 0, 1).float()
        outputs.append({"sem_seg": scores})
    register_dataset(records, k, ignore)
    # Detectron2's default mask reader does not work with NumPy 2.
    theirs = SemSegEvaluator(
        NAME, distributed=False, sem_seg_loading_fn=lambda path, dtype: np.asarray(Image.open(path)).astype(dtype)
    )
    ours = SegmentationEvaluator(NAME, ignore_label=ignore)
    for evaluator in (theirs, ours):
        evaluator.reset()
        evaluator.process(records, outputs)
    their, our = theirs.evaluate()["sem_seg"], ours.evaluate()["sem_seg"]
    for key in ("mIoU", "fwIoU", "pACC", *(f"IoU-class {i}" for i in range(k))):
        if not np.isnan(their[key]):  # for a class that is only predicted, theirs is NaN and ours is 0
            assert our[key] == pytest.approx(their[key]), key
    assert np.isnan(our[f"IoU-class {k - 1}"])
