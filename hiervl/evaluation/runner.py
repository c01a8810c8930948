"""Evaluates student and teacher on all test sets and records the last and the best evaluation."""

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
    """Evaluates the models of a training run and keeps its results.

    Args:
        cfg: config; DATASETS.TEST, TEST and OUTPUT_DIR are used.
        models: {"student": network, "teacher": network}, each with a `protocol`. Results are reported for each model.

    Attributes:
        results: {"last": entry, "best": entry}, where an entry is {"iteration": i, dataset: {model: metrics}}. Also
            stored in OUTPUT_DIR/results.json. "best" is selected by the highest mIoU of any model on the first test
            set and is therefore biased upward; compare runs by "last".
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
        """Load the results of the run that is being resumed, if there are any."""
        if os.path.isfile(self.path):
            with open(self.path) as file:
                self.results = json.load(file)

    def run(self, iteration: int, save_best) -> dict:
        """Evaluate all models and record the results.

        Args:
            save_best: called on the main process if this is the best evaluation so far, before it is recorded: a kill
                in between must not leave the record of a model that was never saved.

        Returns:
            metrics {"dataset/model": {...}}.
        """
        entry = self.measure(iteration)
        flat = OrderedDict(
            (f"{name}/{kind}", metrics) for name in self.cfg.DATASETS.TEST for kind, metrics in entry[name].items()
        )
        if comm.is_main_process():
            self._record(entry, save_best)
        return flat

    def measure(self, iteration: int, folder: str = FOLDER) -> dict:
        """Evaluate all models and write reports, without changing results.json.

        Args:
            iteration: training iteration to report.
            folder: folder in OUTPUT_DIR for the reports.

        Returns:
            {"iteration": i, dataset: {model: metrics}}, with metrics only on the main process.
        """
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
        """Evaluate one model on one test set and write its report. Returns metrics on the main process, else None."""
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
                    "%s: the result to compare with used a different protocol (%s instead of %s)",
                    name,
                    previous.get("protocol"),
                    evaluator.result["protocol"],
                )
            write_report_files(evaluator.result, output_dir, previous)
        # Classes that do not occur have IoU NaN, which JSON does not support.
        return {k: v for k, v in results["sem_seg"].items() if math.isfinite(v)} if results else None

    def _record(self, entry, save_best):
        """Store an entry in results.json."""
        is_best = "best" not in self.results or self._score(entry) > self._score(self.results["best"])
        if is_best:
            save_best()
        self.results["last"] = entry
        if is_best:
            self.results["best"] = entry
        with atomic_write(self.path, "w") as file:
            json.dump(self.results, file, indent=1)

    def _score(self, entry):
        """The value that selects the best entry: the highest mIoU of any model on the first test set."""
        return max(metrics["mIoU"] for metrics in entry[self.cfg.DATASETS.TEST[0]].values())


def result_folder(output_dir: str, name: str, kind: str, folder: str = FOLDER) -> str:
    """Folder with the result of a model ("student", "teacher") on test set `name`."""
    return os.path.join(output_dir, folder, name, kind)


def _previous_result(path, name, kind):
    """Load the result to compare with, or None if `path` is empty.

    `path` is either a result file or the output folder of a run, which provides the result of the same model and test
    set. It is read before training, so that a wrong path is reported immediately and so that the run may overwrite it.
    """
    if not path:
        return None
    if os.path.isdir(path):
        path = os.path.join(result_folder(path, name, kind), RESULT_FILE)
    return load_result(path)
