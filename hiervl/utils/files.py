"""Writes files atomically: a file is replaced as a whole, or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def replace_file(path: str, mode: str = "wb", *, temporary: str | None = None, sync: bool = True) -> Iterator[IO]:
    """Opens a temporary file that replaces `path` when the block ends; an error in the block leaves `path` as it was.

    Args:
        path: the file to replace or create; its folder must exist.
        mode: "wb", or "w" for UTF-8 text.
        temporary: name of the temporary file, in the same folder. None: a new name, so that several processes can
            write the same file.
        sync: force content and renaming to disk, so that a power failure cannot leave an empty file.

    Raises:
        OSError: the file cannot be written. The temporary file is removed.
    """
    folder = os.path.dirname(os.path.abspath(path))
    encoding = None if "b" in mode else "utf-8"
    is_new_name = temporary is None
    if is_new_name:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=os.path.basename(path) + ".", suffix=".tmp")
    try:
        with open(handle if is_new_name else temporary, mode, encoding=encoding) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if is_new_name:
            os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    if sync:
        _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
