"""Decides which files a tool may write: never one that it reads, and never one that it did not create.

A folder that a tool writes to has a record, ``.hiervl-made``, of the files that the tools made there: one relative
path per line. Tools check all files first, so that they refuse before anything is written or computed.
"""

import os
from collections.abc import Iterable

from .errors import UserError

RECORD = ".hiervl-made"
_PARTIAL = ".tmp"  # suffix of a file that is being written


def identities(paths: Iterable[str]) -> set[tuple[int, int]]:
    """(device, inode) of all ``paths`` that exist. Two names or links of the same file have the same identity."""
    return {file_id for path in paths if (file_id := identity(path))}


def identity(path: str) -> tuple[int, int] | None:
    """(device, inode) of a file or folder; None if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


class OutputFolder:
    """A folder to write to, with the record of the files that the tools made in it.

    Args:
        folder: path; need not exist.
        option: the option by which the user can choose another folder, such as "--output", for error messages.
        ours: treat all existing files as made by the tools (for folders from before there were records).

    Raises:
        UserError: the record cannot be read.
    """

    def __init__(self, folder: str, option: str, ours: bool = False) -> None:
        self.folder, self.option, self.ours = folder, option, ours
        self._path = os.path.join(folder, RECORD)
        self._made = set(self._read())

    def check(self, paths: Iterable[str], sources: Iterable[str] = ()) -> None:
        """Checks that files may be written.

        Args:
            paths: files to write, inside the folder.
            sources: files that are read.

        Raises:
            UserError: a file is a source, or exists and was not made by the tools.
        """
        source_ids = identities(sources)
        for path in paths:
            if identity(path) in source_ids:
                self.refuse_source(path)
            existing = path if os.path.islink(path) else self.foreign(path)  # the tools make no links
            if existing:
                self.refuse_foreign(existing)

    def foreign(self, path: str) -> str:
        """``path``, or its temporary name during writing, if that exists and was not made by the tools; else ""."""
        if self.ours or self._name(path) in self._made:
            return ""
        return next((name for name in (path, path + _PARTIAL) if os.path.lexists(name)), "")

    def refuse_source(self, path: str, why: str = "") -> None:
        """Raises UserError because a file to write is a source; ``why`` is a further reason for the message."""
        raise UserError(
            f"{path} is one of the input files and would be overwritten{why and f' ({why})'}; nothing "
            f"was written. Choose another location with {self.option}."
        )

    def refuse_foreign(self, path: str, why: str = "") -> None:
        """Raises UserError because a file to write is the user's; ``why`` is a further reason for the message."""
        raise UserError(
            f"{path} already exists and was not made by this tool{why and f' ({why})'}; nothing was "
            f"written. Move it away, or choose another location with {self.option}."
        )

    def add(self, paths: Iterable[str]) -> None:
        """Records files as made by the tools. Call it before they are written, so that a killed run can be continued.

        Raises:
            UserError: the record cannot be written.
        """
        new = [name for name in dict.fromkeys(map(self._name, paths)) if name not in self._made]
        if new:
            self._write("a", new)
            self._made.update(new)

    def settle(self) -> None:
        """Removes files from the record that were never made: if such a file appears later, it is the user's."""
        existing = [name for name in sorted(self._made) if os.path.lexists(os.path.join(self.folder, name))]
        if len(existing) < len(self._made):
            self._write("w", existing)
            self._made = set(existing)

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.folder).replace(os.sep, "/")

    def _read(self) -> list[str]:
        try:
            with open(self._path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                names = file.read().split("\n")[:-1]  # the last element is empty, or a name cut off by a killed run
                return [name for name in names if name]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {self._path} ({error.strerror})") from None

    def _write(self, mode: str, names: list[str]) -> None:
        try:
            os.makedirs(self.folder, exist_ok=True)
            # Start with a newline, because a killed run may have left an incomplete line.
            start = "\n" if mode == "a" and os.path.exists(self._path) else ""
            text = start + "".join(f"{name}\n" for name in names)
            with open(self._path, mode, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                file.write(text)
        except OSError as error:
            raise UserError(
                f"cannot write {self._path} ({error.strerror or error}); free some space, or choose "
                f"another location with {self.option}"
            ) from None
