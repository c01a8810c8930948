"""The labeled/unlabeled lists of the benchmarks: fetched or made by rule, and checked.

The published lists are not ours to commit; their SHA-256 stand in ``splits.sha256`` (the format of sha256sum, so
that ``sha256sum -c`` reads it too). What follows from a rule is made here:

- ``ade20k``: the sorted names, shuffled with ``random.Random(0)``; the first round(20210 / ratio) are labeled.
- ``camvid``, ``camvid_cross``: the sorted lines of CamVid's train.txt, shuffled with ``random.Random(seed)``; the
  first n are labeled, and both lists are sorted. ``camvid_cross`` first takes out the drive 0006R0, its val list.
- ``voc/train_aug.txt``: labeled and unlabeled images together, sorted.
- ``coco/*/unlabeled.txt``: train2017 without the labeled images, where the dataset's train.txt is there.
"""

import hashlib
import os
import random
import urllib.error
import urllib.request
from pathlib import Path

from ...errors import UserError
from ...ownership import OutputFolder
from ..datasets import data_root, table_of
from .files import read_lines, write_lines, write_whole

HASHES = Path(__file__).with_name("splits.sha256")
# 77cf3bf is the commit of UniMatch whose lists UniMatch V2 and SemiVL also use.
_UNIMATCH = "https://raw.githubusercontent.com/LiheYoung/UniMatch/77cf3bfb5cc5ddf2fbd56a66c5b2b48d2d0ba122/splits"
URLS = {"voc": f"{_UNIMATCH}/pascal", "coco": f"{_UNIMATCH}/coco", "cityscapes": f"{_UNIMATCH}/cityscapes"}
TRAIN_PARTS = {
    "ade20k": "ade20k_train",
    "camvid": "camvid_train",
    "camvid_cross": "camvid_train",
    "coco": "coco_train",
    "cityscapes": "cityscapes_train",
    "voc": "voc_train",
}
_CAMVID = {"camvid": (11, 23, 46, 92), "camvid_cross": (11, 23, 46)}
_CROSS_DRIVE = "0006R0"


def known_hashes() -> dict[str, str]:
    """{path under the split root: SHA-256} of every list of the benchmarks."""
    pairs = (line.split(maxsplit=1) for line in read_lines(str(HASHES)))
    return {path.strip(): digest for digest, path in pairs}


def obtain(out: str, groups: list[str], source: str | None) -> list[str]:
    """Writes the lists of ``groups`` that are missing under ``out`` or differ, from ``source`` or the network.

    Returns:
        the files written. What cannot be made for want of the dataset (CamVid, COCO's unlabeled lists) is left
        to :func:`check` to report.

    Raises:
        UserError: a list cannot be fetched or is not the published one, a file cannot be written, or one that is
            there and would be written over was not made by this tool.
    """
    folder, written = OutputFolder(out, "--out"), []
    wanted = {
        path: digest
        for path, digest in known_hashes().items()
        if path.split("/")[0] in groups and _digest(os.path.join(out, path)) != digest
    }
    _look_first(folder, wanted, groups, source)
    for path, digest in wanted.items():
        content = _content(path, digest, source, out)
        if content is not None:
            folder.add([os.path.join(out, path)])
            write_whole(os.path.join(out, path), content)
            written.append(path)
    for path, lines in _coco_unlabeled(out, groups).items():
        folder.add([path])
        write_lines(path, lines)
        written.append(os.path.relpath(path, out).replace(os.sep, "/"))
    return written


def _look_first(folder: OutputFolder, wanted: dict[str, str], groups: list[str], source: str | None) -> None:
    """Refuse existing lists that this tool did not write, before anything is written."""
    out, targets = folder.folder, list(_coco_unlabeled(folder.folder, groups))
    for path in wanted:
        group, there = path.split("/")[0], os.path.join(out, path)
        if group == "coco" and path.endswith("/labeled.txt") and _own_train_lines("coco"):
            targets.append(os.path.join(os.path.dirname(there), "unlabeled.txt"))
        left_out = group in _CAMVID and source is None and not _own_train_lines(group)
        if os.path.lexists(there) and not left_out and not (_digest(there) and _made_from_own_list(out, path)):
            targets.append(there)
    folder.check(targets, [os.path.join(source, path) for path in wanted] if source else [])


def check(folder: str, groups: list[str]) -> list[str]:
    """Looks at every list of ``groups`` under ``folder``; one line per thing that is wrong.

    Each has to be the published one (SHA-256; lists of a CamVid with other file names: the rule), and in each
    split labeled and unlabeled have to be apart, together the train list, and nothing of it in val.
    """
    problems = []
    for path, digest in known_hashes().items():
        if path.split("/")[0] in groups:
            found = _digest(os.path.join(folder, path))
            if found is None:
                problems.append(f"{os.path.join(folder, path)} is missing; {_way_out(path)}")
            elif found != digest and not _made_from_own_list(folder, path):
                problems.append(
                    f"{os.path.join(folder, path)} is not the published list (SHA-256 {found[:12]}..., "
                    f"not {digest[:12]}...); fetch it again"
                )
    for group in groups:
        if os.path.isdir(os.path.join(folder, group)):
            problems += _check_group(folder, group)
    return problems


def rule_made(path: str, train_lines: list[str] | None = None) -> bytes | None:
    """The content of a list that a rule defines; None where no rule does or CamVid's train lines are needed."""
    group, *rest = path.split("/")
    if group == "ade20k":
        return _ade20k(rest)
    if group in _CAMVID and train_lines:
        return _camvid(group, rest, train_lines)
    return None


def shuffled(lines: list[str], seed: int) -> list[str]:
    """The sorted lines in the order in which they become labeled."""
    lines = sorted(lines)
    random.Random(seed).shuffle(lines)
    return lines


def _ade20k(rest: list[str]) -> bytes:
    def line(part, folder, i):
        return f"images/{folder}/ADE_{part}_{i:08d}.jpg annotations/{folder}/ADE_{part}_{i:08d}.png"

    if rest == ["val.txt"]:
        lines = [line("val", "validation", i) for i in range(1, 2001)]
    else:
        lines = shuffled([line("train", "training", i) for i in range(1, 20211)], seed=0)
        count = round(len(lines) / int(rest[0].removeprefix("1_")))
        lines = lines[:count] if rest[1] == "labeled.txt" else lines[count:]
    return "\n".join(lines).encode()  # the published files have no newline at the end


def _camvid(group: str, rest: list[str], train_lines: list[str]) -> bytes:
    drive = sorted(line for line in train_lines if f"/{_CROSS_DRIVE}_" in line)
    if rest == ["val.txt"]:
        lines = drive
    else:
        pool = [line for line in train_lines if group == "camvid" or line not in drive]
        seed, count = int(rest[0].removeprefix("seed")), int(rest[1])
        lines = shuffled(pool, seed)
        lines = sorted(lines[:count] if rest[2] == "labeled.txt" else lines[count:])
    return "".join(f"{line}\n" for line in lines).encode()


def _content(path: str, digest: str, source: str | None, out: str) -> bytes | None:
    """The list from the local copy, by its rule, or from the network; None if the dataset it follows is absent."""
    group = path.split("/")[0]
    if source is None:
        if group in _CAMVID:
            return rule_made(path, _own_train_lines(group))
        if (made := rule_made(path)) is not None:
            return made
        if path == "voc/train_aug.txt":
            split = os.path.join(out, "voc", "92")
            lines = [*read_lines(f"{split}/labeled.txt"), *read_lines(f"{split}/unlabeled.txt")]
            return "".join(f"{line}\n" for line in sorted(lines)).encode()
        place = f"{URLS[group]}/{path.removeprefix(group + '/')}"
        content = _download(place)
    else:
        place = os.path.join(source, path)
        try:
            content = Path(place).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read {place} ({error.strerror}); --source needs a folder with all lists of "
                f"'{group}', or leave it out with --only"
            ) from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(
            f"{place} is not the published list (its SHA-256 is not that of {HASHES.name}); nothing of it is written"
        )
    return content


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"cannot fetch {url} ({getattr(error, 'reason', error)}); check the network, or name a local "
            "copy with --source"
        ) from None


def _coco_unlabeled(out: str, groups: list[str]) -> dict[str, list[str]]:
    """{path: lines} of the unlabeled lists that are missing or differ, beside the labeled ones that are there."""
    train = _own_train_lines("coco") if "coco" in groups else None
    names = [path for path in sorted(known_hashes()) if path.startswith("coco/") and path.endswith("/labeled.txt")]
    lists = {}
    for labeled in (os.path.join(out, name) for name in names if train):
        if not os.path.exists(labeled):
            continue
        path = os.path.join(os.path.dirname(labeled), "unlabeled.txt")
        taken = set(_images(read_lines(labeled)))
        lines = [line for line in sorted(train) if line.split()[0] not in taken]
        if not os.path.exists(path) or read_lines(path) != lines:
            lists[path] = lines
    return lists


def _check_group(folder: str, group: str) -> list[str]:
    """Labeled and unlabeled of every split apart, together the train list, and apart from val."""
    pool, known = _pool(folder, group)
    val_file = os.path.join(folder, group, "val.txt")
    val = set(_images(read_lines(val_file))) if os.path.exists(val_file) else set()
    problems = []
    for labeled_file in sorted(Path(folder, group).rglob("labeled.txt")):
        split = labeled_file.parent
        labeled = _images(read_lines(str(labeled_file)))
        unlabeled_file = split / "unlabeled.txt"
        unlabeled = _images(read_lines(str(unlabeled_file))) if unlabeled_file.exists() else None
        problems += [f"{split}: {what}" for what in _check_split(labeled, unlabeled, val, pool, known)]
    return problems


def _check_split(labeled: list[str], unlabeled: list[str] | None, val: set, pool: set | None, known: int | None):
    both = labeled + (unlabeled or [])
    if len(set(both)) != len(both):
        twice = next(name for name in both if both.count(name) > 1)
        yield f"'{twice}' is listed twice, or is labeled and unlabeled; remove one of the two lines"
    if val.intersection(both):
        yield f"'{sorted(val.intersection(both))[0]}' is also in val.txt; remove it from the split"
    if pool is not None and not pool.issuperset(both):
        yield f"'{sorted(set(both) - pool)[0]}' is not in the train list; remove it"
    wanted = len(pool) if pool is not None else known
    if unlabeled is not None and wanted is not None and len(set(both)) != wanted:
        yield f"{len(set(both))} images are labeled or unlabeled, the train list has {wanted}"


def _pool(folder: str, group: str) -> tuple[set | None, int | None]:
    """(names of all training images if known, else None; their official number)."""
    if group == "ade20k":
        return set(
            _images(
                rule_made("ade20k/1_128/labeled.txt").decode().splitlines()
                + rule_made("ade20k/1_128/unlabeled.txt").decode().splitlines()
            )
        ), None
    if group == "voc" and os.path.exists(path := os.path.join(folder, "voc", "train_aug.txt")):
        return set(_images(read_lines(path))), None
    if group == "camvid_cross":  # without the drive that is its val list
        return None, 266
    return None, table_of(TRAIN_PARTS[group]).parts[TRAIN_PARTS[group]].get("images")


def _made_from_own_list(folder: str, path: str) -> bool:
    """Whether a CamVid list follows by rule from the train.txt of the data root (prepared as PNG, not JPEG)."""
    made = rule_made(path, _own_train_lines(path.split("/")[0])) if path.split("/")[0] in _CAMVID else None
    return made is not None and made == Path(folder, path).read_bytes()


def _own_train_lines(group: str) -> list[str] | None:
    """The lines of the dataset's own train list under the data root, if it is there."""
    table = table_of(TRAIN_PARTS[group])
    path = os.path.join(data_root(), table.folder, table.parts[TRAIN_PARTS[group]]["list"])
    return read_lines(path) if os.path.exists(path) else None


def _way_out(path: str) -> str:
    group = path.split("/")[0]
    if group in _CAMVID:
        return "prepare CamVid first (prepare_camvid.py), from which it follows, or name a --source"
    return "run prepare_splits.py without --check"


def _images(lines: list[str]) -> list[str]:
    return [line.split("\t")[0] if "\t" in line else line.split()[0] for line in lines]


def _digest(path: str) -> str | None:
    """SHA-256 of a file, None if there is none."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None
