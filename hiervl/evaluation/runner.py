"""Evaluates student and teacher on every test set and keeps what matters of it: last and best."""

import json
import logging
import math
import os
from collections import OrderedDict

import detectron2.utils.comm as comm
from detectron2.evaluation import inference_on_dataset

from ..checkpoint import atomic_write
from ..data.datasets import dataset_index
from ..data.loaders import build_test_loader
from .evaluator import RESULT_FILE, SegmentationEvaluator
from .report import load_result
from .report_files import write_report_files

logger = logging.getLogger(__name__)
FOLDER = "inference"


class Evaluation:
    """
    Args:
        cfg: reads DATASETS.TEST, TEST and OUTPUT_DIR.
        models: {"student": network, "teacher": network}, each with its `protocol`; results are reported for each.

    Attributes:
        results: {"last": {...}, "best": {...}}, each {"iteration", data set: {model: metrics}}; also in
            OUTPUT_DIR/results.json. "Best" is chosen by the better of the models on the first test set, and is the
            better for that choice: compare runs by "last".
    """

    def __init__(self, cfg, models: dict):
        self.cfg = cfg
        self.models = models
        self.path = os.path.join(cfg.OUTPUT_DIR, "results.json")
        self.results = {}
        self._previous = {
            (name, kind): _previous_result(cfg.TEST.COMPARE, name, kind)
            for name in cfg.DATASETS.TEST
            for kind in models
        }

    def load(self):
        """Take up the results of the run that is resumed."""
        if os.path.isfile(self.path):
            with open(self.path) as file:
                self.results = json.load(file)

    def run(self, iteration: int):
        """Evaluate a run now, and record it. Returns (metrics {"data set/model": {...}}, whether this is the best so
        far)."""
        entry = self.measure(iteration)
        flat = OrderedDict(
            (f"{name}/{kind}", metrics) for name in self.cfg.DATASETS.TEST for kind, metrics in entry[name].items()
        )
        return flat, self._record(entry) if comm.is_main_process() else False

    def measure(self, iteration: int, folder: str = FOLDER) -> dict:
        """Evaluate now, write reports into that folder of OUTPUT_DIR, and leave results.json as it is. Returns
        {"iteration", data set: {model: metrics}}; no metrics but on the main process."""
        entry = {"iteration": iteration}
        for name in self.cfg.DATASETS.TEST:
            entry[name] = {}
            for kind, model in self.models.items():
                metrics = self._evaluate(model, name, kind, folder)
                if metrics:  # the main process only
                    entry[name][kind] = metrics
                    logger.info(
                        "%s, %s, iteration %d, %s: mIoU %.2f (mean over the classes in the ground truth), ECE %.2f",
                        name,
                        kind,
                        iteration,
                        model.protocol,
                        metrics["mIoU"],
                        metrics["ECE"],
                    )
        return entry

    def _evaluate(self, model, name, kind, folder):
        """One model on one test set: its metrics on the main process, None elsewhere; writes the report."""
        output_dir = result_folder(self.cfg.OUTPUT_DIR, name, kind, folder)
        loader = build_test_loader(self.cfg, name)
        images = len(dataset_index(name, self.cfg.DATASETS.SPLIT_ROOT))
        evaluator = SegmentationEvaluator(
            name, output_dir, boundary=self.cfg.TEST.BOUNDARY_IOU, num_images=images, protocol=str(model.protocol)
        )
        results = inference_on_dataset(model, loader, evaluator)
        if evaluator.result is not None:
            previous = self._previous[name, kind]
            if previous and previous.get("protocol") != evaluator.result["protocol"]:
                logger.warning(
                    "%s: compared with a result of another protocol (%s instead of %s)",
                    name,
                    previous.get("protocol"),
                    evaluator.result["protocol"],
                )
            write_report_files(evaluator.result, output_dir, previous)
        # A class that does not occur has no IoU; JSON knows no NaN.
        return {k: v for k, v in results["sem_seg"].items() if math.isfinite(v)} if results else None

    def _record(self, entry):
        is_best = "best" not in self.results or self._score(entry) > self._score(self.results["best"])
        self.results["last"] = entry
        if is_best:
            self.results["best"] = entry
        with atomic_write(self.path, "w") as file:
            json.dump(self.results, file, indent=1)
        return is_best

    def _score(self, entry):
        return max(metrics["mIoU"] for metrics in entry[self.cfg.DATASETS.TEST[0]].values())


def result_folder(output_dir: str, name: str, kind: str, folder: str = FOLDER) -> str:
    """Where a run keeps the result of a model ("student", "teacher") on a test set."""
    return os.path.join(output_dir, folder, name, kind)


def _previous_result(path, name, kind):
    """The result to compare with: a result file itself, or that of the same model and set in another run's folder.

    Read before training, so that a wrong path is told at once and the run may write into the same folder.
    """
    if not path:
        return None
    return load_result(os.path.join(result_folder(path, name, kind), RESULT_FILE) if os.path.isdir(path) else path)
