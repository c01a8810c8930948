"""The published lists are downloaded, generated and verified; own splits are sampled."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hiervl.data.prepare import published
from hiervl.data.prepare.sample_splits import balanced_order, uniform_order
from hiervl.data.splits import load_split

from tests.conftest import shared_file


def test_a_local_copy_is_verified_and_refused_if_a_line_changed(run, tmp_path):
    source = shared_file("splits")
    result = run("prepare_splits", "--source", source, "--check")
    assert result.status == 0 and "all 83 lists" in result.out
    copy = shutil.copytree(source, tmp_path / "copy")
    for name in ("coco/1_512/labeled.txt", "ade20k/1_8/unlabeled.txt", "camvid/seed2/46/labeled.txt"):
        changed = copy / name
        original = changed.read_text()
        lines = original.splitlines(keepends=True)
        changed.write_text("".join([*lines[:3], lines[3].replace("0", "1", 1), *lines[4:]]))
        result = run("prepare_splits", "--source", copy, "--check")
        assert result.status == 1 and f"{name} is not the published list" in result.err
        out = tmp_path / name.replace("/", "_")
        assert run("prepare_splits", "--source", copy, "--out", out).status == 1
        assert not (out / name).exists()
        changed.write_text(original)
    (copy / "voc/val.txt").unlink()
    assert "voc/val.txt is missing" in run("prepare_splits", "--source", copy, "--check").err
    assert run("prepare_splits", "--source", copy, "--check", "--only", "coco").status == 0


def test_rules_reproduce_the_published_lists(run, monkeypatch, tmp_path):
    source = Path(shared_file("splits"))
    monkeypatch.setenv("DETECTRON2_DATASETS", shared_file("datasets"))
    result = run("prepare_splits", "--out", tmp_path, "--only", "ade20k", "camvid", "camvid_cross")
    assert result.status == 0, result.err
    made = {p.relative_to(tmp_path) for p in tmp_path.rglob("*.txt")}
    assert len(made) == 11 + 24 + 19
    for path in made:
        assert (tmp_path / path).read_text().splitlines() == (source / path).read_text().splitlines()


def test_ade20k_lists_need_neither_network_nor_data(run, data_root, tmp_path):
    assert run("prepare_splits", "--out", tmp_path / "s", "--only", "ade20k").status == 0
    assert len((tmp_path / "s/ade20k/1_128/labeled.txt").read_text().splitlines()) == 158
    result = run("prepare_splits", "--out", tmp_path / "s", "--only", "camvid")
    assert result.status == 1 and "prepare CamVid first" in result.err


@pytest.fixture
def list_server(tmp_path, monkeypatch, data_root):
    """Lists of two small datasets behind file:// URLs, with their hashes."""
    names = [f"train2017/{i:03d}.jpg masks/{i:03d}.png" for i in range(6)]
    files = {
        "voc/92/labeled.txt": "J/b.jpg S/b.png",
        "voc/92/unlabeled.txt": "J/c.jpg S/c.png\nJ/a.jpg S/a.png",
        "coco/1_512/labeled.txt": names[4],
        "voc/train_aug.txt": "J/a.jpg S/a.png\nJ/b.jpg S/b.png\nJ/c.jpg S/c.png\n",
    }
    hashes = ""
    for path, text in files.items():
        hashes += f"{hashlib.sha256(text.encode()).hexdigest()}  {path}\n"
        place = tmp_path / "web" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if path != "voc/train_aug.txt":
            place.write_text(text)
    (tmp_path / "hashes").write_text(hashes)
    monkeypatch.setattr(published, "HASHES", tmp_path / "hashes")
    monkeypatch.setattr(published, "URLS", {g: (tmp_path / "web" / g).as_uri() for g in ("voc", "coco")})
    (data_root / "coco").mkdir()
    (data_root / "coco" / "train.txt").write_text("\n".join(names))
    return tmp_path


def test_lists_are_downloaded_verified_and_completed(run, list_server):
    out = list_server / "out"
    result = run("prepare_splits", "--out", out, "--only", "voc", "coco")
    assert (out / "voc/train_aug.txt").read_text().splitlines()[1] == "J/b.jpg S/b.png"
    unlabeled = (out / "coco/1_512/unlabeled.txt").read_text().split()[::2]
    assert unlabeled == [f"train2017/{i:03d}.jpg" for i in (0, 1, 2, 3, 5)]
    # The table has the official number of images, but there are only 6 here.
    assert result.status == 1 and "6 images are labeled or unlabeled, but the train list has 118287" in result.err
    assert run("prepare_splits", "--out", out, "--only", "voc").out.startswith("0 lists written")
    (list_server / "web/voc/92/labeled.txt").write_text("<html>moved</html>")
    (out / "voc/92/labeled.txt").unlink()
    result = run("prepare_splits", "--out", out, "--only", "voc")
    assert result.status == 1 and "is not the published list" in result.err
    assert not list(out.rglob("*.tmp")) and not (out / "voc/92/labeled.txt").exists()
    (list_server / "web/voc/92/labeled.txt").unlink()
    assert "check the network" in run("prepare_splits", "--out", out, "--only", "voc").err


@pytest.mark.parametrize(
    "labeled, unlabeled, expected_words",
    [
        ("J/a.jpg S/a.png\nJ/a.jpg S/a.png", "J/c.jpg S/c.png", "'J/a.jpg' is listed twice"),
        ("J/a.jpg S/a.png", "J/a.jpg S/a.png\nJ/c.jpg S/c.png", "'J/a.jpg' is listed twice"),
        ("J/v.jpg S/v.png", "J/c.jpg S/c.png", "'J/v.jpg' is also in val.txt"),
        ("J/x.jpg S/x.png", "J/c.jpg S/c.png", "'J/x.jpg' is not in the train list"),
        ("J/a.jpg S/a.png", "J/c.jpg S/c.png", "2 images are labeled or unlabeled, but the train list has 3"),
    ],
)
def test_inconsistent_splits_are_reported(list_server, labeled, unlabeled, expected_words):
    folder = list_server / "lists"
    (folder / "voc/92").mkdir(parents=True)
    (folder / "voc/train_aug.txt").write_text("J/a.jpg S/a.png\nJ/b.jpg S/b.png\nJ/c.jpg S/c.png\n")
    (folder / "voc/val.txt").write_text("J/v.jpg S/v.png\n")
    (folder / "voc/92/labeled.txt").write_text(labeled)
    (folder / "voc/92/unlabeled.txt").write_text(unlabeled)
    assert any(expected_words in problem for problem in published.check(str(folder), ["voc"]))


@pytest.fixture
def camvid_root(data_root):
    """A CamVid of 20 images: all contain class 0; only the last three contain class 1, 2 and 3."""
    folder = data_root / "camvid"
    folder.mkdir()
    lines = []
    for i in range(20):
        mask = np.zeros((4, 4), np.uint8)
        mask[0] = max(0, i - 16)
        Image.fromarray(mask).save(folder / f"{i:02d} m.png")
        lines.append(f"{i:02d}.jpg\t{i:02d} m.png\n")
    (folder / "train.txt").write_text("".join(lines))
    return folder


def test_sampled_lists_are_nested_and_complete(run, camvid_root, tmp_path):
    argv = ["prepare_splits", "--sample", "camvid_train", "--labeled", 3, 6, "--seeds", 0, 1, "--out", tmp_path]
    assert run(*argv).status == run(*argv, "--balanced").status == 0
    for kind in ("uniform", "balanced"):
        labeled_images = {}
        for seed in (0, 1):
            for count in (3, 6):
                split = tmp_path / "camvid_train" / kind / f"seed{seed}" / str(count)
                labeled, unlabeled = load_split(str(split), str(camvid_root))
                labeled_images[seed, count] = {image for image, _ in labeled.all_names()}
                assert (len(labeled), len(unlabeled)) == (count, 20 - count)
            assert labeled_images[seed, 3] < labeled_images[seed, 6]
        assert labeled_images[0, 6] != labeled_images[1, 6]
        rare = {"17.jpg", "18.jpg", "19.jpg"}
        assert (labeled_images[0, 6] >= rare) == (kind == "balanced")
    assert run("prepare_splits", "--sample", "camvid_train", "--labeled", 20, "--out", tmp_path).status == 1
    result = run("prepare_splits", "--sample", "camwid", "--labeled", 2, "--out", tmp_path)
    assert "unknown dataset 'camwid'" in result.err


def test_the_former_option_draw_is_refused_with_its_new_name(run, capsys):
    for argv in (["--draw"], ["--draw", "camvid_train", "--labeled", "3"]):
        with pytest.raises(SystemExit):
            run("prepare_splits", *argv)
        assert "error: --draw has been renamed; use --sample" in capsys.readouterr().err.splitlines()[-1]


def test_balanced_order_covers_rare_classes_better_than_uniform_order():
    rng = np.random.default_rng(0)
    presence = rng.random((400, 5)) < [0.9, 0.5, 0.2, 0.05, 0.01]
    first = balanced_order(presence, seed=3, num_balanced=20)
    assert sorted(first) == list(range(400)) and first == balanced_order(presence, seed=3, num_balanced=20)
    assert (
        presence[first[:20]].sum(0).min()
        >= min(3, presence.sum(0).min())
        > presence[uniform_order(400, 3)[:20]].sum(0).min()
    )
    assert balanced_order(presence, 3, 8)[:8] == first[:8]
