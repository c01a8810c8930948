"""Measure what language does in a trained network: absent names, many names, synonyms, and wrong names.

    python -m tools.analysis.measure_language --config-file configs/camvid_23_hiervl.yaml \
        --opts MODEL.WEIGHTS output/camvid_23_hiervl/model_final.pth

First adds distractors (words that are no class: MODEL.TEXT.DISTRACTORS, seen in training, and --unseen) to the class
list, and measures which names HSQG selects and what the added words cost. Then replaces the class names by synonyms
(--synonyms), and permutes them. No weight changes in the process, which is checked. Prints tables and writes
language.json to --output. Evaluates whole images of the first dataset of DATASETS.TEST.
"""

import random
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from tabulate import tabulate

from hiervl.data.images import read_label
from hiervl.errors import UserError, exit_status
from hiervl.evaluation.evaluator import SegmentationEvaluator
from hiervl.modeling.inference import InferenceProtocol
from hiervl.modeling.text.word_lists import read_lines
from tools.analysis import trained

OTHER = "other word"  # class of a pixel that is assigned to a distractor


@dataclass
class EvaluationResult:
    """One evaluation with V words, the first K of them being the classes, on I images.

    Attributes:
        result: the evaluator's, for the K classes and "other word".
        text: (V, Dt), the embeddings of the words.
        relevance: (I, V) in [0, 1].
        selected: (I, V) bool, words that HSQG passed on to the decoder.
        top_k: (I, V) bool, words among the TOP_K most relevant ones.
        seconds: per image.
    """

    result: dict
    text: torch.Tensor
    relevance: np.ndarray
    selected: np.ndarray
    top_k: np.ndarray
    seconds: float

    @property
    def miou(self) -> float:
        return self.result["metrics"]["mIoU"]

    @property
    def iou(self) -> list:
        """IoU of each of the K classes; None for a class that does not occur."""
        return self.result["per_class"]["iou"][:-1]

    @property
    def other_share(self) -> float:
        """Percentage of the labeled pixels that were assigned to a distractor."""
        return 100 * self.result["per_class"]["predicted"][-1] / self.result["pixels"]

    def chance(self) -> float:
        """mIoU of a prediction with the same class frequencies that is independent of the image."""
        counts = np.array(self.result["confusion_matrix"], dtype=float)
        truth, predicted = counts.sum(1) / counts.sum(), counts.sum(0) / counts.sum()
        present = truth > 0
        intersection = truth * predicted
        return 100 * float((intersection[present] / (truth + predicted - intersection)[present]).mean())


class Measurement:
    """A trained network and the images to measure on.

    Args:
        network: in evaluation mode; its list of classes, `trained_names` and top-k are changed.
        class_names: of the ids in the label maps.
        samples: list of TestMapper's results.
        trained: distractors that were seen in training; like the classes, HSQG may suppress them.
        top_k: MODEL.HSQG.TOP_K in all evaluations.

    Attributes:
        present: (I, K) bool, classes with a pixel in the label map.
    """

    def __init__(self, network, class_names, samples, trained=(), top_k=48):
        self.network, self.class_names, self.samples = network, list(class_names), samples
        network.trained_names = network.trained_names | set(trained)
        network.query_generator.top_k = top_k
        self._weights = {name: value.clone() for name, value in network.state_dict().items()}
        ids = np.arange(len(self.class_names))
        self.present = np.stack([np.isin(ids, read_label(s["sem_seg_file_name"])) for s in samples])

    @property
    def num_weights(self) -> int:
        return len(self._weights)

    @torch.no_grad()
    def evaluate(self, words, distractors=()) -> EvaluationResult:
        """Segment all images with `words`, one name for each class in order, and `distractors`."""
        self.network.set_classes([*words, *distractors])
        evaluator = SegmentationEvaluator([*self.class_names, OTHER], calibration=False)
        shape = len(self.samples), self.network.num_classes
        relevance, selected, top_k = np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool)
        k = min(self.network.query_generator.top_k, shape[1])
        started = time.perf_counter()
        for i, sample in enumerate(self.samples):
            prediction = self.network.predict(sample["image"][None].to(self.network.device, torch.float32))
            relevance[i] = prediction.relevance[0].cpu()
            selected[i, prediction.index[0].cpu()] = True
            top_k[i, prediction.relevance[0].topk(k).indices.cpu()] = True
            probability = merge_distractors(prediction.values[0], prediction.index[0], len(self.class_names))
            size = sample["height"], sample["width"]
            if probability.shape[1:] != size:
                probability = F.interpolate(probability[None], size=size, mode="bilinear", align_corners=False)[0]
            evaluator.process([sample], [{"sem_seg": probability}])
        seconds = (time.perf_counter() - started) / len(self.samples)
        evaluator.evaluate()
        self._check_weights()
        return EvaluationResult(evaluator.result, self.network.text(), relevance, selected, top_k, seconds)

    def _check_weights(self):
        state = self.network.state_dict()
        changed = [name for name, value in self._weights.items() if not torch.equal(value, state[name])]
        if changed or len(state) != len(self._weights):
            raise AssertionError(f"the list of classes changed weights: {changed[:3] or 'their number'}")


def merge_distractors(maps, index, num_classes) -> torch.Tensor:
    """Merge the maps of all distractors into one.

    Args:
        maps: (K', H, W), of the selected words. index: (K',), their positions in the list of names.

    Returns:
        (K+1, H, W): the maps of the K classes, and the maximum over all distractors; 0 for words not selected.
    """
    merged = maps.new_zeros(num_classes + 1, *maps.shape[1:])
    for word, word_map in zip(index.tolist(), maps):
        target = merged[min(word, num_classes)]
        torch.maximum(target, word_map, out=target)
    return merged


def suppression(evaluation: EvaluationResult, groups: dict, present: np.ndarray, threshold: float) -> list:
    """One row per group of words: their relevance, and how many are selected, in percent of (image, word) pairs.

    Args:
        groups: {title: (I, V) bool, the pairs of the group}.
        present: (I, V) bool, words that are visible in the image.
    """
    rows = []
    for title, pairs in groups.items():
        if not pairs.any():
            continue
        share = {
            "below MIN_RELEVANCE": evaluation.relevance < threshold,
            "not among the top k": ~evaluation.top_k,
            "kept": evaluation.selected,
        }
        rows.append(
            {
                "words": title,
                "pairs": int(pairs.sum()),
                "mean relevance": float(evaluation.relevance[pairs].mean()),
                **{name: 100 * float(value[pairs].mean()) for name, value in share.items()},
                "outranked by present": outranked(evaluation.relevance, pairs & ~present, present),
            }
        )
    return rows


def outranked(relevance, pairs, present) -> float | None:
    """How often a word of `pairs` is less relevant than a word present in the same image: percent of all such pairs.

    All arguments are (I, V). None if there is nothing to compare.
    """
    wins = total = 0
    for values, group, visible in zip(relevance, pairs, present):
        wins += int((values[visible][:, None] > values[group]).sum())
        total += int(visible.sum() * group.sum())
    return 100 * wins / total if total else None


def word_groups(present: np.ndarray, num_seen: int, num_unseen: int) -> tuple:
    """Group the (image, word) pairs, with the words in the order classes, seen distractors, unseen distractors.

    Args:
        present: (I, K) bool, classes that are visible in the image.

    Returns:
        {title: (I, V) bool}, and `present` extended to all words (I, V).
    """
    num_images, num_classes = present.shape
    kind = np.repeat([0, 1, 2], [num_classes, num_seen, num_unseen])  # (V,)
    present = np.pad(present, ((0, 0), (0, num_seen + num_unseen)))
    every_image = np.ones((num_images, 1), bool)
    return {
        "classes, present": present,
        "classes, absent": ~present & (kind == 0),
        "distractors seen in training": every_image & (kind == 1),
        "distractors not seen": every_image & (kind == 2),
    }, present


def read_synonyms(path: str, class_names: list) -> dict:
    """Read lists of synonyms: {title: one word per class}. Classes missing from a list keep their names.

    Raises:
        UserError: the file is missing, has a different structure, or names an unknown class.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot read --synonyms ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict) or not all(isinstance(words, dict) for words in content.values()):
        raise UserError(f"{path}: --synonyms needs lists of the form `title: {{class: word, ...}}`.")
    for title, words in content.items():
        unknown = [name for name in words if name not in class_names]
        if unknown:
            raise UserError(
                f"{path}: {unknown[0]!r} in list {title!r} is not a class of this dataset; its classes are "
                f"{', '.join(class_names)}."
            )
    return {str(title): [str(words.get(name, name)) for name in class_names] for title, words in content.items()}


def vocabulary_sizes(measurement, distractors, sizes, original) -> tuple:
    """mIoU vs. number of words. Returns (rows, the evaluation with all distractors).

    Args:
        sizes: numbers of distractors to measure with, besides all of them.
        original: the evaluation without distractors.
    """
    shuffled = random.Random(0).sample(distractors, len(distractors))
    rows, evaluation = [_vocabulary_row(measurement, original, 0)], original
    for size in sorted({min(size, len(distractors)) for size in (*sizes, len(distractors))} - {0}):
        # All of them in the given order, which `word_groups` relies on; otherwise a random subset.
        subset = shuffled[:size] if size < len(distractors) else distractors
        evaluation = measurement.evaluate(measurement.class_names, subset)
        rows.append(_vocabulary_row(measurement, evaluation, size))
        print(tabulate(rows[-1:], headers="keys", floatfmt=".2f"), flush=True)
    return rows, evaluation


def _vocabulary_row(measurement, evaluation, num_distractors):
    num_classes = len(measurement.class_names)
    return {
        "words": num_classes + num_distractors,
        "mIoU": evaluation.miou,
        "% given to other words": evaluation.other_share,
        "present classes kept": 100 * float(evaluation.selected[:, :num_classes][measurement.present].mean()),
        "kept words": float(evaluation.selected.sum(1).mean()),
        "s per image": evaluation.seconds,
    }


def renamed_classes(measurement, lists, original) -> tuple:
    """mIoU with other names for the classes. Returns (one row per list, one row per word that is not the class name).

    Args:
        lists: {title: one word per class}. original: the evaluation with the classes' own names.
    """
    rows, word_rows = [], []
    for title, words in lists.items():
        evaluation = measurement.evaluate(words)
        changed = [k for k, word in enumerate(words) if word != measurement.class_names[k]]
        rows.append(
            {
                "names": title,
                "changed": len(changed),
                "mIoU": evaluation.miou,
                "% of the original": 100 * evaluation.miou / original.miou if original.miou else None,
                "chance": evaluation.chance(),
            }
        )
        word_rows += [_word_row(measurement, evaluation, original, k, title, words[k]) for k in changed]
        print(tabulate(rows[-1:], headers="keys", floatfmt=".2f"), flush=True)
    return rows, word_rows


def _word_row(measurement, evaluation, original, k, title, word):
    """Class k under another name: cosine to the class name, relevance where the class is present, and IoU."""
    relevance = evaluation.relevance[measurement.present[:, k], k]
    return {
        "names": title,
        "class": measurement.class_names[k],
        "word": word,
        "cosine": float(evaluation.text[k] @ original.text[k]),
        "relevance where present": float(relevance.mean()) if len(relevance) else None,
        "IoU": evaluation.iou[k],
        "IoU of the original": original.iou[k],
    }


def measure(measurement, seen, unseen, lists, sizes, threshold) -> dict:
    """All tables, {title: rows}.

    Args:
        seen, unseen: distractors that training showed, and that it did not.
        lists: see `renamed_classes`. sizes: see `vocabulary_sizes`. threshold: MIN_RELEVANCE.
    """
    names = measurement.class_names
    original = measurement.evaluate(names)
    vocabulary, evaluation = vocabulary_sizes(measurement, [*seen, *unseen], sizes, original)
    groups, present = word_groups(measurement.present, len(seen), len(unseen))
    # Each class gets the name of the next one: a network that follows the names gets everything wrong.
    other_words, word_by_word = renamed_classes(measurement, lists | {"permuted": [*names[1:], names[0]]}, original)
    selection = suppression(evaluation, groups, present, threshold)
    num_words = len(names) + len(seen) + len(unseen)
    return {
        f"Selected names, of {num_words} (percent of image-word pairs)": selection,
        "Number of words": vocabulary,
        "Other words for the classes": other_words,
        "Word by word": word_by_word,
    }


def build(args) -> tuple:
    """Config, measurement and words: (cfg, Measurement, seen distractors, unseen distractors, {title: names})."""
    cfg = trained.read_config(args.config_file, args.opts)
    if not cfg.MODEL.HSQG.ENABLED:
        raise UserError(
            "MODEL.HSQG.ENABLED is False, so no names are selected or suppressed; use a config that enables it, such "
            "as configs/camvid_23_hiervl.yaml."
        )
    protocol = str(InferenceProtocol(cfg))
    if protocol != "whole image":
        raise UserError(
            f"TEST is configured as: {protocol}; this tool measures name selection on whole images, one view of each: "
            "set TEST.MODE to whole, TEST.SCALES to (1.0,), TEST.FLIP to False, INPUT.TEST_SHORT_SIDE to 0."
        )
    trained.output_folder(args, cfg, "language.json")
    network = trained.load(cfg, args.model)
    seen, unseen = network.text.distractors()[0], []
    if args.unseen:
        known = {word.casefold() for word in (*seen, *network.class_names)}
        unseen = [word for word in read_lines(args.unseen, "--unseen") if word.casefold() not in known]
    lists = read_synonyms(args.synonyms, network.class_names) if args.synonyms else {}
    samples = list(trained.samples(cfg, args.images)[0])
    return cfg, Measurement(network, network.class_names, samples, seen, args.keep), seen, unseen, lists


def run(args):
    cfg, measurement, seen, unseen, lists = build(args)
    tables = measure(measurement, seen, unseen, lists, args.words, cfg.MODEL.HSQG.MIN_RELEVANCE)
    facts = {
        "images": len(measurement.samples),
        "KEEP": args.keep,
        "MIN_RELEVANCE": cfg.MODEL.HSQG.MIN_RELEVANCE,
        "seen": seen,
        "unseen": unseen,
        "unchanged weights": measurement.num_weights,
    }
    for title, rows in tables.items():
        print(f"\n{title}\n\n{tabulate(rows, headers='keys', floatfmt='.2f', missingval='-', tablefmt='github')}")
    sizes = ", ".join(str(row["words"]) for row in tables["Number of words"])
    print(f"\nAll {measurement.num_weights} weights and buffers are bit-equal before and after K = {sizes}.")
    trained.save(args, cfg, "language.json", facts | {"tables": tables})


def parse_args(argv=None):
    parser = trained.parser(__doc__)
    parser.add_argument(
        "--images", type=int, default=0, help="number of images to evaluate, evenly spaced; 0: all (%(default)s)"
    )
    parser.add_argument("--keep", type=int, default=48, help="MODEL.HSQG.TOP_K while measuring (%(default)s)")
    parser.add_argument(
        "--words",
        type=int,
        nargs="*",
        default=[30, 80],
        help="numbers of distractors to measure with, in addition to none and all (30 80)",
    )
    parser.add_argument(
        "--unseen",
        default="datasets/distractors_camvid_unseen.txt",
        help="file with distractors not seen in training; empty: none (%(default)s)",
    )
    parser.add_argument(
        "--synonyms",
        default="datasets/synonyms_camvid.yaml",
        help="YAML file with lists of synonyms for the classes; empty: none (%(default)s)",
    )
    parser.add_argument("--output", default="output/language", help="folder for language.json (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
