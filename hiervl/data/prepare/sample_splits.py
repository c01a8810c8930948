"""Samples which images of a dataset are labeled: by seed, nested, uniformly or balanced over the classes."""

import functools
import os
import random
from collections.abc import Sequence

import numpy as np

from ...errors import UserError
from ...ownership import OutputFolder
from ..datasets import dataset_index, table_of
from ..images import read_label
from ..index import PackedIndex
from .files import list_line, read_lines, write_lines
from .parallel import parallel


def sample_splits(
    part: str, counts: Sequence[int], seeds: Sequence[int], out: str, *, balanced: bool = False, workers: int = 1
) -> list[str]:
    """Writes ``<out>/seed{s}/{n}/labeled.txt`` and ``unlabeled.txt`` for every seed and count.

    With the same seed, the labeled images of a smaller count are a subset of those of a larger one. Uniform sampling
    follows the rule of the CamVid splits: the list is sorted and shuffled with ``random.Random(seed)``, and the first
    n are labeled.

    Args:
        part: a registered part whose list has masks, such as ``camvid_train``.
        counts: numbers of labeled images.
        seeds: random seeds.
        out: folder to write.
        balanced: always sample next from the images of the class with the fewest labeled images so far.
        workers: number of processes that read the masks for balanced sampling.

    Returns:
        the folders of the splits.

    Raises:
        UserError: the part is unknown, a count leaves no image labeled or unlabeled, an image has no mask, or a
            different list that this tool did not write exists.
    """
    index = dataset_index(part)
    entries = sorted((list_line(*pair), i) for i, pair in enumerate(index.all_names()))
    for count in counts:
        if not 0 < count < len(entries):
            raise UserError(
                f"--labeled {count}: {part} has {len(entries)} images; choose a number from 1 to {len(entries) - 1}"
            )
    if any(not mask for _, mask in index.all_names()):
        raise UserError(f"{part}: its list has images without a mask, which cannot be labeled; choose another part")
    lines = [line for line, _ in entries]
    presence = _class_presence(index, [i for _, i in entries], part, workers) if balanced else None
    lists: dict[str, list[str]] = {}
    for seed in seeds:
        order = uniform_order(len(lines), seed) if presence is None else balanced_order(presence, seed, max(counts))
        for count in counts:
            folder = os.path.join(out, f"seed{seed}", str(count))
            lists[os.path.join(folder, "labeled.txt")] = sorted(lines[i] for i in order[:count])
            lists[os.path.join(folder, "unlabeled.txt")] = sorted(lines[i] for i in order[count:])
    _write_lists(lists, out)
    return list(dict.fromkeys(os.path.dirname(path) for path in lists))


def _write_lists(lists: dict[str, list[str]], out: str) -> None:
    """Writes the lists that are missing or differ; none of them if one would overwrite a file of the user."""
    outdated = {
        path: lines for path, lines in lists.items() if not (os.path.exists(path) and read_lines(path) == lines)
    }
    folder = OutputFolder(out, "--out")
    folder.check(outdated)
    folder.add(outdated)
    for path, lines in outdated.items():
        write_lines(path, lines)


def uniform_order(count: int, seed: int) -> list[int]:
    """Positions 0 to count - 1 of a sorted list, in the order in which they become labeled."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def balanced_order(presence: np.ndarray, seed: int, num_balanced: int) -> list[int]:
    """Like :func:`uniform_order`, but the first ``num_balanced`` images are balanced over the classes.

    The next image is always one of the class with the fewest labeled images so far.

    Args:
        presence: bool (images, classes), whether an image contains a class.
        seed: of the order in which the images of a class are taken.
        num_balanced: number of images sampled in this way; the rest follow in the uniform order of the seed.
    """
    order = np.array(uniform_order(len(presence), seed))
    num_classes = presence.shape[1]
    candidates = [iter(order[presence[order, k]]) for k in range(num_classes)]
    open_classes = set(range(num_classes))  # classes that may still have images that are not sampled
    labeled_counts = np.zeros(num_classes, int)
    sampled: dict[int, None] = {}  # used as an ordered set
    while len(sampled) < num_balanced and open_classes:
        rarest = min(open_classes, key=lambda k: (labeled_counts[k], k))
        image = next((int(i) for i in candidates[rarest] if i not in sampled), None)
        if image is None:
            open_classes.remove(rarest)
        else:
            sampled[image] = None
            labeled_counts += presence[image]
    return [*sampled, *(int(i) for i in order if i not in sampled)]


def _class_presence(index: PackedIndex, order: Sequence[int], part: str, workers: int) -> np.ndarray:
    """bool (images, classes): whether the mask of an image contains a class."""
    files = [index[i]["sem_seg_file_name"] for i in order]
    work = functools.partial(_classes_in_mask, num_classes=len(table_of(part).classes))
    return np.stack(list(parallel(work, files, workers, f"classes of {part}")))


def _classes_in_mask(mask: str, num_classes: int) -> np.ndarray:
    """bool (classes,)."""
    label = read_label(mask)
    return np.bincount(label[(label >= 0) & (label < num_classes)], minlength=num_classes) > 0
