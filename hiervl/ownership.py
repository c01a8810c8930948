"""Which files a tool may write: never one that it reads, and never one that it did not create.

A folder that a tool writes into has a list of what the tools made there, ``.hiervl-made``, one relative path a line.
Tools look first and write then: what they refuse, they refuse before anything is written or computed.
"""

import os
from collections.abc import Iterable

from .errors import UserError

RECORD = ".hiervl-made"
_PARTIAL = ".tmp"  # what a file is called while it is written


def identities(paths: Iterable[str]) -> set[tuple[int, int]]:
    """Device and inode of the files among ``paths`` that exist: the same by any name, link or spelling."""
    return {found for path in paths if (found := identity(path))}


def identity(path: str) -> tuple[int, int] | None:
    """Device and inode; None if nothing is there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


class OutputFolder:
    """A folder to write into.

    Args:
        folder: need not exist.
        option: what leads to another place, for errors, such as "--output".
        ours: all that is there under our names counts as made by us (a folder from before there were records).
    """

    def __init__(self, folder: str, option: str, ours: bool = False) -> None:
        self.folder, self.option, self.ours = folder, option, ours
        self._path = os.path.join(folder, RECORD)
        self._made = set(self._read())

    def check(self, paths: Iterable[str], sources: Iterable[str] = ()) -> None:
        """Looks at files that are to be written.

        Args:
            paths: of them, inside the folder.
            sources: files that are read.

        Raises:
            UserError: one of them is a source, or is there already and not ours.
        """
        read = identities(sources)
        for path in paths:
            if identity(path) in read:
                self.refuse_source(path)
            if there := path if os.path.islink(path) else self.foreign(path):  # we make no links
                self.refuse_foreign(there)

    def foreign(self, path: str) -> str:
        """``path``, or what it is called while it is written, if that is there and not ours; else ""."""
        if self.ours or self._name(path) in self._made:
            return ""
        return next((there for there in (path, path + _PARTIAL) if os.path.lexists(there)), "")

    def refuse_source(self, path: str, why: str = "") -> None:
        raise UserError(
            f"{path} is one of the files to read and would be overwritten{why and f' ({why})'}; nothing "
            f"was written. Pick another place with {self.option}."
        )

    def refuse_foreign(self, path: str, why: str = "") -> None:
        raise UserError(
            f"{path} is already there and was not made by this tool{why and f' ({why})'}; nothing was "
            f"written. Move it away, or pick another place with {self.option}."
        )

    def add(self, paths: Iterable[str]) -> None:
        """Records files as ours; to be called before they are written, so that a killed run can go on.

        Raises:
            UserError: no space, no permission.
        """
        new = [name for name in dict.fromkeys(map(self._name, paths)) if name not in self._made]
        if new:
            self._write("a", new)
            self._made.update(new)

    def settle(self) -> None:
        """Forgets what was recorded and never made: a file that comes to be there is another's."""
        left = [name for name in sorted(self._made) if os.path.lexists(os.path.join(self.folder, name))]
        if len(left) < len(self._made):
            self._write("w", left)
            self._made = set(left)

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.folder).replace(os.sep, "/")

    def _read(self) -> list[str]:
        try:
            with open(self._path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                names = file.read().split("\n")[:-1]  # after the last newline: nothing, or half a name
                return [name for name in names if name]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {self._path} ({error.strerror})") from None

    def _write(self, mode: str, names: list[str]) -> None:
        try:
            os.makedirs(self.folder, exist_ok=True)
            # A newline first: a killed run may have left half a name.
            text = ("\n" if mode == "a" and os.path.exists(self._path) else "") + "".join(f"{n}\n" for n in names)
            with open(self._path, mode, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                file.write(text)
        except OSError as error:
            raise UserError(
                f"cannot write {self._path} ({error.strerror or error}); make room, or pick another "
                f"place with {self.option}"
            ) from None
