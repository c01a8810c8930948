"""What language does for a trained network: absent names, many names, other words, wrong words.

    python -m tools.analysis.measure_language --config-file configs/camvid_23_hiervl.yaml \
        --opts MODEL.WEIGHTS output/camvid_23_hiervl/model_final.pth

Enlarges the list of classes by distractors (words for what no image shows: MODEL.TEXT.DISTRACTORS, seen in training,
and --unseen) and measures which names HSQG keeps and what the added words cost; then replaces the classes' names by
other words for the same things (--synonyms), and by each other. No weight changes on the way, which is checked.
Prints tables and writes language.json into --output. Evaluates the whole images of the first set of DATASETS.TEST.
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

OTHER = "other word"  # the class of a pixel that is given to a distractor


@dataclass
class Found:
    """What one evaluation with V words, those of the K classes first, over I images has found.

    Attributes:
        result: the evaluator's, over the K classes and "other word".
        text: (V, Dt), the words' embeddings T'. relevance: (I, V) in [0, 1]. kept: (I, V) bool, words that went on.
        leading: (I, V) bool, words among the KEEP most relevant ones. seconds: per image.
    """

    result: dict
    text: torch.Tensor
    relevance: np.ndarray
    kept: np.ndarray
    leading: np.ndarray
    seconds: float

    @property
    def miou(self) -> float:
        return self.result["metrics"]["mIoU"]

    @property
    def iou(self) -> list:
        """Of the K classes; None for one that occurs nowhere."""
        return self.result["per_class"]["iou"][:-1]

    @property
    def other_share(self) -> float:
        """Share of the labeled pixels that went to a word that is no class, in percent."""
        return 100 * self.result["per_class"]["predicted"][-1] / self.result["pixels"]

    def chance(self) -> float:
        """mIoU of a prediction with these class frequencies that knows nothing of the image."""
        counts = np.array(self.result["confusion_matrix"], dtype=float)
        truth, predicted = counts.sum(1) / counts.sum(), counts.sum(0) / counts.sum()
        there = truth > 0
        hits = truth * predicted
        return 100 * float((hits[there] / (truth + predicted - hits)[there]).mean())


class Measurement:
    """A trained network and the images to measure on.

    Args:
        network: in evaluation mode. class_names: what the label maps mean. samples: list-like of TestMapper's results.
        trained: words beside the classes that training showed as absent: like the classes, they may be cut.
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
    def evaluate(self, words, others=()) -> Found:
        """Segment with `words`, one for each class in its place, and `others`, which are no class."""
        self.network.set_classes([*words, *others])
        evaluator = SegmentationEvaluator([*self.class_names, OTHER], calibration=False)
        shape = len(self.samples), self.network.num_classes
        relevance, kept, leading = np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool)
        started = time.perf_counter()
        for i, sample in enumerate(self.samples):
            said = self.network.predict(sample["image"][None].to(self.network.device, torch.float32))
            relevance[i] = said.relevance[0].cpu()
            kept[i, said.index[0].cpu()] = True
            leading[i, said.relevance[0].topk(min(self.network.query_generator.top_k, shape[1])).indices.cpu()] = True
            scores = fold(said.values[0], said.index[0], len(self.class_names))
            size = sample["height"], sample["width"]
            if scores.shape[1:] != size:
                scores = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]
            evaluator.process([sample], [{"sem_seg": scores}])
        seconds = (time.perf_counter() - started) / len(self.samples)
        evaluator.evaluate()
        self._check_weights()
        return Found(evaluator.result, self.network.text(), relevance, kept, leading, seconds)

    def _check_weights(self):
        now = self.network.state_dict()
        changed = [name for name, value in self._weights.items() if not torch.equal(value, now[name])]
        if changed or len(now) != len(self._weights):
            raise AssertionError(f"the list of classes changed weights: {changed[:3] or 'their number'}")


def fold(maps, index, num_classes) -> torch.Tensor:
    """Maps (K', H, W) of the kept words, which are at `index` (K',) in the list -> (K+1, H, W): those of the classes,
    and the highest of all other words (0 where there is none)."""
    scores = maps.new_zeros(num_classes + 1, *maps.shape[1:])
    for word, found in zip(index.tolist(), maps):
        place = scores[min(word, num_classes)]
        torch.maximum(place, found, out=place)
    return scores


def suppression(found: Found, groups: dict, present: np.ndarray, threshold: float) -> list:
    """One row per group of words: how relevant they are, and how many of them go on. Percent of (image, word) pairs.

    Args:
        groups: {title: (I, V) bool, the pairs that are meant}. present: (I, V) bool, words that the image shows.
    """
    rows = []
    for title, pairs in groups.items():
        if not pairs.any():
            continue
        share = {
            "below MIN_RELEVANCE": found.relevance < threshold,
            "not among the top k": ~found.leading,
            "kept": found.kept,
        }
        rows.append(
            {
                "words": title,
                "pairs": int(pairs.sum()),
                "mean relevance": float(found.relevance[pairs].mean()),
                **{name: 100 * float(value[pairs].mean()) for name, value in share.items()},
                "outranked by present": outranked(found.relevance, pairs & ~present, present),
            }
        )
    return rows


def outranked(relevance, pairs, present) -> float | None:
    """Of all (word of `pairs`, word that the same image shows): share in which the latter is more relevant."""
    wins = total = 0
    for values, mine, shown in zip(relevance, pairs, present):
        wins += int((values[shown][:, None] > values[mine]).sum())
        total += int(shown.sum() * mine.sum())
    return 100 * wins / total if total else None


def word_groups(present: np.ndarray, num_seen: int, num_unseen: int) -> tuple:
    """Words in the order classes (I, K), seen, unseen -> ({title: (I, V) bool}, present (I, V))."""
    images, num_classes = present.shape
    kind = np.repeat([0, 1, 2], [num_classes, num_seen, num_unseen])
    shown = np.pad(present, ((0, 0), (0, num_seen + num_unseen)))
    alike = np.ones((images, 1), bool)
    return {
        "classes, present": shown,
        "classes, absent": ~shown & (kind == 0),
        "distractors seen in training": alike & (kind == 1),
        "distractors not seen": alike & (kind == 2),
    }, shown


def read_synonyms(path: str, class_names: list) -> dict:
    """{title of a list: a word for every class}; a class that a list leaves out keeps its name.

    Raises:
        UserError: no such file, another structure, a name that is no class.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}; --synonyms).") from None
    if not isinstance(content, dict) or not all(isinstance(words, dict) for words in content.values()):
        raise UserError(f"{path}: --synonyms needs lists of the form `title: {{class: word, ...}}`.")
    for title, words in content.items():
        unknown = [name for name in words if name not in class_names]
        if unknown:
            raise UserError(
                f"{path}: {unknown[0]!r} in the list {title!r} is not a class of this data set; its "
                f"classes are {', '.join(class_names)}."
            )
    return {str(title): [str(words.get(name, name)) for name in class_names] for title, words in content.items()}


def enlarged(measurement, distractors, sizes, original) -> tuple:
    """mIoU against the number of words. Returns (rows, what was found with all words)."""
    shuffled = random.Random(0).sample(distractors, len(distractors))
    rows, found = [_vocabulary_row(measurement, original, 0)], original
    for size in sorted({min(size, len(distractors)) for size in (*sizes, len(distractors))} - {0}):
        # All of them in their own order: it tells seen words from unseen ones.
        others = shuffled[:size] if size < len(distractors) else distractors
        found = measurement.evaluate(measurement.class_names, others)
        rows.append(_vocabulary_row(measurement, found, size))
        print(tabulate(rows[-1:], headers="keys", floatfmt=".2f"), flush=True)
    return rows, found


def _vocabulary_row(measurement, found, distractors):
    num_classes = len(measurement.class_names)
    return {
        "words": num_classes + distractors,
        "mIoU": found.miou,
        "% given to other words": found.other_share,
        "present classes kept": 100 * float(found.kept[:, :num_classes][measurement.present].mean()),
        "kept words": float(found.kept.sum(1).mean()),
        "s per image": found.seconds,
    }


def renamed(measurement, lists, original) -> tuple:
    """mIoU with other words for the classes. Returns (rows of lists, rows of words)."""
    rows, details = [], []
    for title, words in lists.items():
        found = measurement.evaluate(words)
        changed = sum(word != name for word, name in zip(words, measurement.class_names))
        rows.append(
            {
                "names": title,
                "changed": changed,
                "mIoU": found.miou,
                "% of the original": 100 * found.miou / original.miou if original.miou else None,
                "chance": found.chance(),
            }
        )
        details += [
            _word_row(measurement, found, original, k) | {"names": title, "word": word}
            for k, word in enumerate(words)
            if word != measurement.class_names[k]
        ]
        print(tabulate(rows[-1:], headers="keys", floatfmt=".2f"), flush=True)
    return rows, details


def _word_row(measurement, found, original, k):
    """Class k by another word: how near the word is, how relevant where the class is, and how well it does."""
    relevance = found.relevance[measurement.present[:, k], k]
    return {
        "names": "",
        "class": measurement.class_names[k],
        "word": "",
        "cosine": float(found.text[k] @ original.text[k]),
        "relevance where present": float(relevance.mean()) if len(relevance) else None,
        "IoU": found.iou[k],
        "IoU of the original": original.iou[k],
    }


def measure(measurement, seen, unseen, lists, sizes, threshold) -> dict:
    """All tables, {title: rows}."""
    names = measurement.class_names
    original = measurement.evaluate(names)
    vocabulary, found = enlarged(measurement, [*seen, *unseen], sizes, original)
    groups, shown = word_groups(measurement.present, len(seen), len(unseen))
    # Every class has the name of the next one: the network is to follow the names, so that nothing is right.
    other_words, details = renamed(measurement, lists | {"permuted": [*names[1:], names[0]]}, original)
    return {
        f"Names that go on, of {len(names) + len(seen) + len(unseen)} (percent of image-word pairs)": suppression(
            found, groups, shown, threshold
        ),
        "Number of words": vocabulary,
        "Other words for the classes": other_words,
        "Word by word": details,
    }


def build(args) -> tuple:
    """Config, the measurement, and the words: (cfg, Measurement, seen, unseen, {title: names})."""
    cfg = trained.read_config(args.config_file, args.opts)
    if not cfg.MODEL.HSQG.ENABLED:
        raise UserError(
            "MODEL.HSQG.ENABLED is False: without it no name is kept or suppressed; choose a config with "
            "it, such as configs/camvid_23_hiervl.yaml."
        )
    protocol = str(InferenceProtocol(cfg))
    if protocol != "whole image":
        raise UserError(
            f"TEST says: {protocol}; which names are kept is a question to whole images, one view of each: "
            "set TEST.MODE to whole, TEST.SCALES to (1.0,), TEST.FLIP to False, INPUT.TEST_SHORT_SIDE 0."
        )
    trained.output_folder(args, cfg, "language.json")
    network = trained.load(cfg, args.model)
    seen = network.text.distractors()[0]
    taken = {word.casefold() for word in (*seen, *network.class_names)}
    unseen = (
        [word for word in read_lines(args.unseen, "--unseen") if word.casefold() not in taken] if args.unseen else []
    )
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
    parser.add_argument("--images", type=int, default=0, help="evaluate so many images, evenly spaced; 0: all")
    parser.add_argument("--keep", type=int, default=48, help="MODEL.HSQG.TOP_K while measuring (%(default)s)")
    parser.add_argument(
        "--words",
        type=int,
        nargs="*",
        default=[30, 80],
        help="numbers of distractors to measure with, besides none and all (30 80)",
    )
    parser.add_argument(
        "--unseen",
        default="datasets/distractors_camvid_unseen.txt",
        help="file with distractors that training did not show; empty: none (%(default)s)",
    )
    parser.add_argument(
        "--synonyms",
        default="datasets/synonyms_camvid.yaml",
        help="YAML file with lists of other words for the classes; empty: none (%(default)s)",
    )
    parser.add_argument("--output", default="output/language", help="folder for language.json (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
