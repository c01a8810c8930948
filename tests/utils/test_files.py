"""Files are replaced as a whole or not at all."""

import os

import pytest

from hiervl.utils import files
from hiervl.utils.files import replace_file


@pytest.fixture(params=["new name", "fixed name"])
def temporary(request, tmp_path):
    return str(tmp_path / "file.partial") if request.param == "fixed name" else None


def test_the_file_is_replaced_at_the_end(tmp_path, temporary):
    path = tmp_path / "file"
    path.write_text("old")
    with replace_file(str(path), "w", temporary=temporary) as file:
        file.write("né")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "né" and os.listdir(tmp_path) == ["file"]
    assert temporary or path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path, temporary, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error):
        with replace_file(str(path), temporary=temporary) as file:
            file.write(b"half of the new con")
            raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_without_sync_nothing_is_forced_to_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    with replace_file(str(tmp_path / "file"), sync=False):
        pass
    assert not synced
    with replace_file(str(tmp_path / "file")):
        pass
    assert len(synced) == 2  # the content, and the folder that has the new name


def test_two_processes_may_write_the_same_file(tmp_path):
    path = str(tmp_path / "file")
    with replace_file(path, "w") as first:
        first.write("first")
        with replace_file(path, "w") as second:
            second.write("second")
    assert (tmp_path / "file").read_text() == "first" and os.listdir(tmp_path) == ["file"]
