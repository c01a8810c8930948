"""The labeled and unlabeled lists of the benchmarks: downloaded or generated, and verified.

The published lists are not part of this repository; their SHA-256 hashes are in ``splits.sha256``, which
``sha256sum -c`` reads too. Lists that follow a rule are generated:

- ``ade20k``: the sorted names, shuffled with ``random.Random(0)``; the first round(20210 / ratio) are labeled.
- ``camvid``, ``camvid_cross``: the sorted lines of CamVid's train.txt, shuffled with ``random.Random(seed)``; the
  first n are labeled, and both lists are sorted. ``camvid_cross`` leaves out the drive 0006R0, which is its val list.
- ``voc/train_aug.txt``: labeled and unlabeled images together, sorted.
- ``coco/*/unlabeled.txt``: train2017 without the labeled images; needs the dataset's train.txt.
"""

import hashlib
import os
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from ...ownership import OutputFolder
from ..datasets import data_root, table_of
from .files import read_lines, write_lines, write_whole

HASHES = Path(__file__).with_name("splits.sha256")
# UniMatch V2 and SemiVL use the lists of this UniMatch commit too.
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
    """{path relative to the split root: SHA-256} of all lists of the benchmarks."""
    pairs = (line.split(maxsplit=1) for line in read_lines(str(HASHES)))
    return {path.strip(): digest for digest, path in pairs}


def obtain(out: str, groups: list[str], source: str | None) -> list[str]:
    """Writes the lists that are missing or differ from the published ones.

    Lists that need a dataset which is not prepared (CamVid, COCO's unlabeled lists) are skipped; :func:`check`
    reports them.

    Args:
        out: the split root.
        groups: the folders of lists to write, keys of TRAIN_PARTS.
        source: local copy of the lists; None for the network.

    Returns:
        the files written, relative to ``out``.

    Raises:
        UserError: a list cannot be downloaded or is not the published one, a file cannot be written, or a file that
            was not made by this tool would be overwritten.
    """
    folder, written = OutputFolder(out, "--out"), []
    outdated = {
        path: digest
        for path, digest in known_hashes().items()
        if path.split("/")[0] in groups and _digest(os.path.join(out, path)) != digest
    }
    _refuse_overwriting(folder, outdated, groups, source)
    for path, digest in outdated.items():
        content = _obtain_list(path, digest, source, out)
        if content is not None:
            folder.add([os.path.join(out, path)])
            write_whole(os.path.join(out, path), content)
            written.append(path)
    for path, lines in _coco_unlabeled(out, groups).items():
        folder.add([path])
        write_lines(path, lines)
        written.append(os.path.relpath(path, out).replace(os.sep, "/"))
    return written


def _refuse_overwriting(folder: OutputFolder, outdated: dict[str, str], groups: list[str], source: str | None) -> None:
    """Raises UserError if a file that this tool did not write would be overwritten; to be called before writing."""
    out, targets = folder.folder, list(_coco_unlabeled(folder.folder, groups))
    for path in outdated:
        group, target = path.split("/")[0], os.path.join(out, path)
        if group == "coco" and path.endswith("/labeled.txt") and _local_train_lines("coco"):
            targets.append(os.path.join(os.path.dirname(target), "unlabeled.txt"))
        skipped = group in _CAMVID and source is None and not _local_train_lines(group)
        if os.path.lexists(target) and not skipped and not (_digest(target) and _follows_local_train_list(out, path)):
            targets.append(target)
    folder.check(targets, [os.path.join(source, path) for path in outdated] if source else [])


def check(folder: str, groups: list[str]) -> list[str]:
    """Verifies all lists of ``groups`` under ``folder``; returns one line per problem.

    Every list must have the published SHA-256; CamVid lists with other file names must follow the rule. In every
    split, labeled and unlabeled images must not overlap, must together be the train list, and must not be in val.
    """
    problems = []
    for path, digest in known_hashes().items():
        if path.split("/")[0] in groups:
            actual = _digest(os.path.join(folder, path))
            if actual is None:
                problems.append(f"{os.path.join(folder, path)} is missing; {_advice(path)}")
            elif actual != digest and not _follows_local_train_list(folder, path):
                problems.append(
                    f"{os.path.join(folder, path)} is not the published list (SHA-256 {actual[:12]}..., "
                    f"not {digest[:12]}...); fetch it again"
                )
    for group in groups:
        if os.path.isdir(os.path.join(folder, group)):
            problems += _check_group(folder, group)
    return problems


def rule_made(path: str, train_lines: list[str] | None = None) -> bytes | None:
    """Content of a list that follows a rule; None if it follows none, or if CamVid's ``train_lines`` are missing."""
    group, *rest = path.split("/")
    if group == "ade20k":
        return _ade20k(rest)
    if group in _CAMVID and train_lines:
        return _camvid(group, rest, train_lines)
    return None


def shuffled(lines: list[str], seed: int) -> list[str]:
    """The sorted lines, shuffled; the first n are the labeled ones."""
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


def _obtain_list(path: str, digest: str, source: str | None, out: str) -> bytes | None:
    """Content of a list: from the local copy, by its rule, or from the network.

    Returns:
        None if the list follows from a dataset that is not prepared.

    Raises:
        UserError: the list cannot be read or downloaded, or is not the published one.
    """
    group = path.split("/")[0]
    if source is None:
        if group in _CAMVID:
            return rule_made(path, _local_train_lines(group))
        if (content := rule_made(path)) is not None:
            return content
        if path == "voc/train_aug.txt":
            split = os.path.join(out, "voc", "92")
            lines = [*read_lines(f"{split}/labeled.txt"), *read_lines(f"{split}/unlabeled.txt")]
            return "".join(f"{line}\n" for line in sorted(lines)).encode()
        location = f"{URLS[group]}/{path.removeprefix(group + '/')}"
        content = _download(location)
    else:
        location = os.path.join(source, path)
        try:
            content = Path(location).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read {location} ({error.strerror}); --source needs a folder with all lists of "
                f"'{group}', or choose other lists with --only"
            ) from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(
            f"{location} is not the published list (its SHA-256 is not the one in {HASHES.name}) and was not used; "
            "get the list elsewhere and name its folder with --source"
        )
    return content


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"cannot fetch {url} ({getattr(error, 'reason', error)}); check the network, or name a local "
            "copy with --source"
        ) from None


def _coco_unlabeled(out: str, groups: list[str]) -> dict[str, list[str]]:
    """{path: lines} of COCO's unlabeled lists that are missing or wrong, for every labeled list that exists."""
    train = _local_train_lines("coco") if "coco" in groups else None
    names = [path for path in sorted(known_hashes()) if path.startswith("coco/") and path.endswith("/labeled.txt")]
    lists = {}
    for labeled in (os.path.join(out, name) for name in names if train):
        if not os.path.exists(labeled):
            continue
        path = os.path.join(os.path.dirname(labeled), "unlabeled.txt")
        labeled_images = set(_images(read_lines(labeled)))
        lines = [line for line in sorted(train) if line.split()[0] not in labeled_images]
        if not os.path.exists(path) or read_lines(path) != lines:
            lists[path] = lines
    return lists


def _check_group(folder: str, group: str) -> list[str]:
    """Checks that the lists of every split are consistent; returns one line per problem."""
    pool, num_images = _pool(folder, group)
    val_file = os.path.join(folder, group, "val.txt")
    val = set(_images(read_lines(val_file))) if os.path.exists(val_file) else set()
    problems = []
    for labeled_file in sorted(Path(folder, group).rglob("labeled.txt")):
        split = labeled_file.parent
        labeled = _images(read_lines(str(labeled_file)))
        unlabeled_file = split / "unlabeled.txt"
        unlabeled = _images(read_lines(str(unlabeled_file))) if unlabeled_file.exists() else None
        problems += [f"{split}: {problem}" for problem in _check_split(labeled, unlabeled, val, pool, num_images)]
    return problems


def _check_split(
    labeled: list[str], unlabeled: list[str] | None, val: set, pool: set | None, num_images: int | None
) -> Iterator[str]:
    """Yields one line per problem of a split.

    Args:
        labeled: names of the labeled images.
        unlabeled: names of the unlabeled images; None if there is no such list.
        val: names of the validation images.
        pool: names of all training images, if known.
        num_images: their official number, if known; used only without ``pool``.
    """
    both = labeled + (unlabeled or [])
    if len(set(both)) != len(both):
        duplicate = next(name for name in both if both.count(name) > 1)
        yield f"'{duplicate}' is listed twice, or is both labeled and unlabeled; remove one of the two lines"
    if val.intersection(both):
        yield f"'{sorted(val.intersection(both))[0]}' is also in val.txt; remove it from the split"
    if pool is not None and not pool.issuperset(both):
        yield f"'{sorted(set(both) - pool)[0]}' is not in the train list; remove it"
    expected = len(pool) if pool is not None else num_images
    if unlabeled is not None and expected is not None and len(set(both)) != expected:
        yield f"{len(set(both))} images are labeled or unlabeled, but the train list has {expected}"


def _pool(folder: str, group: str) -> tuple[set | None, int | None]:
    """(names of all training images, None) if the names are known, else (None, official number of images or None)."""
    if group == "ade20k":
        return set(
            _images(
                rule_made("ade20k/1_128/labeled.txt").decode().splitlines()
                + rule_made("ade20k/1_128/unlabeled.txt").decode().splitlines()
            )
        ), None
    if group == "voc" and os.path.exists(path := os.path.join(folder, "voc", "train_aug.txt")):
        return set(_images(read_lines(path))), None
    if group == "camvid_cross":  # 367 training images of CamVid less the 101 of the drive that is the val list
        return None, 266
    return None, table_of(TRAIN_PARTS[group]).parts[TRAIN_PARTS[group]].get("images")


def _follows_local_train_list(folder: str, path: str) -> bool:
    """Whether a CamVid list follows the rule for the local train.txt, whose file names may differ (PNG, not JPEG)."""
    group = path.split("/")[0]
    content = rule_made(path, _local_train_lines(group)) if group in _CAMVID else None
    return content is not None and content == Path(folder, path).read_bytes()


def _local_train_lines(group: str) -> list[str] | None:
    """Lines of the dataset's train list under the data root; None if it does not exist."""
    table = table_of(TRAIN_PARTS[group])
    path = os.path.join(data_root(), table.folder, table.parts[TRAIN_PARTS[group]]["list"])
    return read_lines(path) if os.path.exists(path) else None


def _advice(path: str) -> str:
    """What to do if a list is missing."""
    group = path.split("/")[0]
    if group in _CAMVID:
        return "prepare CamVid first (prepare_camvid.py), or name a local copy with --source"
    return "run prepare_splits.py without --check"


def _images(lines: list[str]) -> list[str]:
    """The image names in the lines of a list."""
    return [line.split("\t")[0] if "\t" in line else line.split()[0] for line in lines]


def _digest(path: str) -> str | None:
    """SHA-256 of a file; None if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None
