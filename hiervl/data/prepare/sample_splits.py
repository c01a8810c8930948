"""Draws which images of a dataset are labeled: uniform or balanced over classes, by seed, nested."""

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

    Within a seed the labeled images of a smaller count are among those of a larger one. Uniform draws follow the
    rule of the CamVid splits: the sorted list, shuffled with ``random.Random(seed)``, the first n.

    Args:
        part: a registered part whose list names masks, such as ``camvid_train``.
        counts: numbers of labeled images.
        balanced: next is always an image that shows the class with the fewest labeled images so far.
        workers: processes that read the masks for that.

    Returns:
        the folders written.

    Raises:
        UserError: an unknown part, a count that leaves nothing labeled or unlabeled, an image without a mask, a
            list that is there, says something else and was not drawn by this tool.
    """
    index = dataset_index(part)
    entries = sorted((list_line(*pair), i) for i, pair in enumerate(index.all_names()))
    for count in counts:
        if not 0 < count < len(entries):
            raise UserError(f"{part} has {len(entries)} images; {count} labeled ones leave nothing to draw")
    if any(not mask for _, mask in index.all_names()):
        raise UserError(f"{part}: images without a mask are in its list, which cannot be drawn to be labeled")
    lines = [line for line, _ in entries]
    shown = _classes_shown(index, [i for _, i in entries], part, workers) if balanced else None
    lists: dict[str, list[str]] = {}
    for seed in seeds:
        order = uniform_order(len(lines), seed) if shown is None else balanced_order(shown, seed, max(counts))
        for count in counts:
            folder = os.path.join(out, f"seed{seed}", str(count))
            lists[os.path.join(folder, "labeled.txt")] = sorted(lines[i] for i in order[:count])
            lists[os.path.join(folder, "unlabeled.txt")] = sorted(lines[i] for i in order[count:])
    _write(lists, out)
    return list(dict.fromkeys(os.path.dirname(path) for path in lists))


def _write(lists: dict[str, list[str]], out: str) -> None:
    """Writes what is not there as it should be, all of it or, where a list is another's, none."""
    new = {path: lines for path, lines in lists.items() if not (os.path.exists(path) and read_lines(path) == lines)}
    folder = OutputFolder(out, "--out")
    folder.check(new)
    folder.add(new)
    for path, lines in new.items():
        write_lines(path, lines)


def uniform_order(count: int, seed: int) -> list[int]:
    """Positions of a sorted list in the order in which they become labeled."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def balanced_order(shown: np.ndarray, seed: int, wanted: int) -> list[int]:
    """As :func:`uniform_order`, but the first ``wanted`` ones take turns at the classes.

    Args:
        shown: bool (images, classes), which classes an image shows.
        seed: of the order in which the images of a class are taken.
        wanted: how many are drawn in this way; the rest follow in the order of the seed.
    """
    order = np.array(uniform_order(len(shown), seed))
    waiting = [iter(order[shown[order, k]]) for k in range(shown.shape[1])]
    open_classes, labeled = set(range(shown.shape[1])), np.zeros(shown.shape[1], int)
    taken: dict[int, None] = {}  # a set that keeps its order
    while len(taken) < wanted and open_classes:
        scarce = min(open_classes, key=lambda k: (labeled[k], k))
        image = next((int(i) for i in waiting[scarce] if i not in taken), None)
        if image is None:
            open_classes.remove(scarce)  # every image that shows it is taken
        else:
            taken[image] = None
            labeled += shown[image]
    return [*taken, *(int(i) for i in order if i not in taken)]


def _classes_shown(index: PackedIndex, order: Sequence[int], part: str, workers: int) -> np.ndarray:
    files = [index[i]["sem_seg_file_name"] for i in order]
    work = functools.partial(_ids, num_classes=len(table_of(part).classes))
    return np.stack(list(parallel(work, files, workers, f"classes of {part}")))


def _ids(mask: str, num_classes: int) -> np.ndarray:
    label = read_label(mask)
    return np.bincount(label[(label >= 0) & (label < num_classes)], minlength=num_classes) > 0
