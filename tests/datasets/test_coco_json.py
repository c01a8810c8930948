"""Every mistake in a COCO annotation file raises an error that names it; none crashes the process."""

import copy
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle

from hiervl.data.images import read_label
from hiervl.data.prepare import coco_json
from hiervl.data.prepare.coco_geometry import clipped_region, shape_region, unpack_counts
from hiervl.data.prepare.coco_json import CocoFile, CocoMasks
from hiervl.data.prepare.masks import Job
from hiervl.errors import UserError

from . import miniatures
from .miniatures import SIZE, box

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = ("background", "person", "dog")
PIXELS = SIZE[0] * SIZE[1]
MISSING = object()


def content():
    """Two images; polygons, run lengths of both forms, a crowd, and a box without a segmentation."""
    disc = np.zeros(SIZE, np.uint8, order="F")
    disc[3:9, 4:20] = 1
    shapes = {
        1: [box(2, 2, 18, 22), box(0, 0, 3, 3)],
        2: {"size": list(SIZE), "counts": [100, 50, PIXELS - 150]},
        3: {"size": list(SIZE), "counts": rle.encode(disc)["counts"].decode()},
        4: [],
    }
    return {
        "info": {"year": 2017},
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in (7, 8)],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {
                "id": i,
                "image_id": 7,
                "category_id": 18,
                "iscrowd": int(i == 2),
                "bbox": [20, 10, 8, 9.5],
                "segmentation": shape,
            }
            for i, shape in shapes.items()
        ],
    }


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return str(path)


def paint(path, instances=""):
    """{image id: (ids, instance numbers)} of all images of a file; raises the error of the first wrong one."""
    file = CocoFile(str(path))
    make = CocoMasks([file], CLASSES, 255)
    return {i: make(Job(f"{i}.jpg", key=(0, i), instances=instances), SIZE) for i in file.images}


def assert_refused(path, data, *expected_words):
    with pytest.raises(UserError) as error:
        paint(write(path, data))
    message = str(error.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in (path.name, *expected_words)), message
    assert len(message) < 500 and any(way in message for way in ("correct", "export", "add it", "use the"))


def with_field(key, number, field, value):
    data = content()
    if value is MISSING:
        del data[key][number][field]
    else:
        data[key][number][field] = value
    return data


def test_valid_annotations_are_painted(tmp_path):
    label, numbers = paint(write(tmp_path / "a.json", content()), "instances")[7]
    assert set(np.unique(label)) == {0, 2, 255} and set(np.unique(numbers)) == {0, 3, 4}
    assert not paint(tmp_path / "a.json")[8][0].any()


@pytest.mark.parametrize(
    "key, field, values",
    [
        ("images", "id", (MISSING, "7", 7.0, None, True, [7], 2**63, -(2**63) - 1)),
        ("images", "file_name", (MISSING, 7, None, "", ["a"], "a\nb", "a\0b", "\ud800")),
        ("images", "height", (MISSING, "24", 24.0, None, True, 0, -24, 2**31, [24])),
        ("images", "width", (MISSING, "32", None, False, 0, -32, 2**40, {})),
        ("categories", "id", (MISSING, "1", None, True, 2**63)),
        ("categories", "name", (MISSING, 1, None, [], "per\nson")),
        ("annotations", "image_id", (MISSING, "7", 7.0, None, True, [7], {}, 2**63)),
        ("annotations", "id", (MISSING, "1", None, True, [1], 2**64)),
        ("annotations", "category_id", (MISSING, "18", 18.0, None, True, [18], {}, 2**70)),
        ("annotations", "iscrowd", (None, True, "0", 2, -1, [0])),
    ],
)
def test_wrong_and_missing_fields_are_refused(tmp_path, key, field, values):
    place = {"images": "image 7", "categories": "category 1", "annotations": "annotation 1"}[key]
    for value in values:
        if field == "id":  # without a valid id, the message describes the item in another way
            place = {"annotations": "of image 7"}.get(key, f"'{key}' at byte" if value is MISSING else key[:5])
        assert_refused(tmp_path / "a.json", with_field(key, 0, field, value), f"'{field}'", place)


@pytest.mark.parametrize(
    "key, field, value, expected_words",
    [
        ("images", "id", 8, "image 8: another image has the same id"),
        ("images", "file_name", "8.jpg", "the file name '8.jpg'"),
        ("images", "height", 25, "a.json says 32x25"),
        ("images", "height", 10**9, "32x1000000000 pixels are too many"),
        ("categories", "id", 18, "category 18: another category has the same id"),
        ("categories", "name", "cup", "category 'cup'"),
        ("annotations", "category_id", 3, "annotation 1 of image 7 cannot be used (it has the category 3"),
    ],
)
def test_inconsistent_fields_are_refused(tmp_path, key, field, value, expected_words):
    assert_refused(tmp_path / "a.json", with_field(key, 0, field, value), expected_words)


@pytest.mark.parametrize(
    "shape, expected_words",
    [
        (MISSING, "no 'segmentation'"),
        (None, "no 'segmentation'"),
        ([], "no 'segmentation'"),
        ({}, "no 'segmentation'"),
        ([[]], "no 'segmentation'"),
        ([[1, 2, 3, 4]], "no 'segmentation'"),
        ("x", "neither a list of polygons nor"),
        (5, "neither a list of polygons nor"),
        (True, "neither a list of polygons nor"),
        ([1, 2, 3, 4, 5, 6], "polygon 1 is not a list"),
        ([[1, 2, 3, 4, 5, "6"]], "not a list of numbers"),
        ([[1, 2, 3, 4, 5, True]], "not a list of numbers"),
        ([[1, 2, 3, 4, 5, None]], "not a list of numbers"),
        ([[1, 2, 3, 4, 5, [6]]], "not a list of numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "7 coordinates"),
        ([[1, 2, 3, 4, 5, 1e10]], "coordinate 10000000000.0"),
        ([[1, 2, 3, 4, 5, -(10**400)]], "coordinate -1000"),
        ([None], "polygon None"),
    ],
)
def test_invalid_polygons_are_refused(tmp_path, shape, expected_words):
    data = with_field("annotations", 0, "segmentation", shape)
    del data["annotations"][0]["bbox"]
    assert_refused(tmp_path / "a.json", data, "annotation 1 of image 7", expected_words)


@pytest.mark.parametrize(
    "counts, expected_words",
    [
        (MISSING, "counts None"),
        (None, "counts None"),
        ({}, "counts {}"),
        (7, "counts 7"),
        ([], "add up to 0"),
        ([PIXELS - 1], "add up to 767"),
        ([PIXELS, 1], "add up to 769"),
        ([2**32, PIXELS], "add up to"),
        ([-1, PIXELS + 1], "negative number -1"),
        ([1.0, PIXELS - 1], "neither a list of integers"),
        (["1", PIXELS - 1], "neither a list of integers"),
        ([True, PIXELS - 1], "neither a list of integers"),
        ([[1], PIXELS - 1], "neither a list of integers"),
        ([10**300], "add up to"),
        ("", "add up to 0"),
        ("\u00fc", "the character"),
        ("p", "the character"),
        ("/", "the character"),
        ("0\0", "the character"),
        ("o", "end in the middle"),
        ("o" * 7, "too long"),
        ("o" * 100000, "too long"),
        ("O", "negative number -1"),
        ("PPPPPP0" * 3, "add up to 0"),
        ("nnnnnn7" * 2, "add up to"),
        ("`h0" * 4, "add up to"),
    ],
)
def test_invalid_run_length_counts_are_refused(tmp_path, counts, expected_words):
    shape = {"size": list(SIZE)} if counts is MISSING else {"size": list(SIZE), "counts": counts}
    assert_refused(
        tmp_path / "a.json",
        with_field("annotations", 1, "segmentation", shape),
        "annotation 2 of image 7",
        expected_words,
    )


@pytest.mark.parametrize(
    "size", [None, [], [24], [32, 24], ["24", 32], [24.0, 32], [24, 32, 1], {}, [2**40, 2**40], [-24, -32], [True, 768]]
)
def test_invalid_run_length_sizes_are_refused(tmp_path, size):
    shape = {"size": size, "counts": [PIXELS]}
    data = with_field("annotations", 1, "segmentation", shape)
    assert_refused(tmp_path / "a.json", data, "annotation 2 of image 7", "[24, 32]")


TEXT = json.dumps(content())


@pytest.mark.parametrize(
    "text, expected_words",
    [
        ("", "unexpected end"),
        ("[]", "expected '{'"),
        ("7", "expected '{'"),
        ('"a"', "expected '{'"),
        ("\0", "'\\x00'"),
        ("{}", "no 'images'"),
        (TEXT[:-1], "unexpected end"),
        (TEXT + "x", "end of the file"),
        (TEXT * 2, "end of the file"),
        (TEXT[:-1] + ', "images": []}', "'images' appears twice"),
        (TEXT[:-1] + ",}", "comma"),
        (TEXT[:-1] + ", 1: 2}", "expected a key"),
        (TEXT.replace('"annotations"', '"notes"'), "no 'annotations'"),
        (TEXT.replace('"annotations": [', '"annotations": [7, '), "7 is not an object"),
        (TEXT.replace('"images": [', '"images": [null, '), "None is not an object"),
        (TEXT.replace('"images": [', '"images": [[], '), "[] is not an object"),
        (re.sub('"annotations": .*', '"annotations": {}}', TEXT), "'annotations' is not a list"),
        (re.sub('"annotations": .*', '"annotations": null}', TEXT), "'annotations' is not a list"),
        (TEXT.replace('{"id": 8', '{"id": 7'), "image 7: another image has the same id"),
        (TEXT.replace('"bbox": [20', '"bbox": [NaN'), "annotation 1: NaN"),
        (TEXT.replace('"height": 24', '"height": Infinity'), "image 7: Infinity"),
        (TEXT.replace("2017", "-Infinity"), "'info': -Infinity"),
        (TEXT.replace("2017", "9" * 5000), "4300 digits"),
        (TEXT.replace("2017", "[" * 100000), "nested too deeply"),
        (TEXT.replace('"segmentation": []', '"segmentation": ' + '{"a":' * 100000), "nested too deeply"),
        (TEXT.replace("2017", "[" * 100000 + "]" * 100000), "nested too deeply"),
        (TEXT.replace("7.jpg", "\xff.jpg").encode("latin-1"), "not UTF-8"),
        (TEXT.encode("utf-16"), "expected '{'"),
        (TEXT.replace('"7.jpg"', '"7.jpg'), "a.json"),
        (TEXT.replace("18,", "1 8,"), "',' delimiter at byte"),
    ],
)
def test_invalid_json_structure_is_refused(tmp_path, text, expected_words):
    assert_refused(tmp_path / "a.json", text if isinstance(text, bytes) else text.encode(), expected_words)


def test_missing_and_changed_files_are_reported(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="cannot read"):
            CocoFile(str(path))
    file = CocoFile(write(tmp_path / "a.json", content()))
    write(tmp_path / "a.json", TEXT.replace("segmentation", "sgmnttn").encode())
    with pytest.raises(UserError, match="changed while it was in use"):
        file.annotations(7)
    os.remove(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot read"):
        file.annotations(7)


def test_too_many_objects_for_an_instance_map_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_json, "_MAX_INSTANCES", 3)
    assert paint(write(tmp_path / "a.json", content()))
    with pytest.raises(UserError, match="a.json: image 7 has 4 annotations, but an instance map can hold only 3"):
        paint(tmp_path / "a.json", "instances")


@pytest.mark.parametrize("reach", [0, 40, 400, 3000])
def test_clipped_polygons_equal_those_of_pycocotools(reach):
    rng = np.random.default_rng(reach)
    for i in range(400):
        size = tuple(map(int, rng.integers(1, 60, 2)))
        points = rng.uniform(-reach, 60 + reach, (int(rng.integers(3, 12)), 2)).round((0, 1, 15)[i % 3])
        if i % 4 == 0:  # edges along the axes
            points[1::2, 0], points[::2, 1] = points[::2, 0][: len(points) // 2], points[0, 1]
        expected = rle.frPyObjects([points.ravel().tolist()], *size)[0]
        assert clipped_region(points, size) == expected == shape_region([points.ravel().tolist()], size)


@pytest.mark.parametrize("distance", [2e5, 3e7, 1e9])
def test_coordinates_far_outside_the_image_give_the_correct_mask(distance):
    """Covers diagonals through a corner of the image, a band, the whole image, and nothing."""

    def pixels(*polygon):
        return rle.decode(shape_region([list(polygon)], (64, 64)))

    assert (pixels(0, 0, distance, 0, distance, distance) == pixels(0, 0, 500, 0, 500, 500)).all()
    assert (pixels(0, 0, distance, distance, 0, distance) == pixels(0, 0, 500, 500, 0, 500)).all()
    assert (
        pixels(-distance, 10, distance, 10, distance, 20, -distance, 20) == pixels(0, 10, 64, 10, 64, 20, 0, 20)
    ).all()
    assert pixels(-distance, -distance, distance, -distance, distance, distance, -distance, distance).all()
    assert not pixels(-distance, -distance, -distance, distance, -1, distance, -1, -distance).any()


def test_compressed_counts_are_decoded_like_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(100):
        mask = rng.random(rng.integers(1, 400, 2)) < rng.choice([0.001, 0.5, 0.999])
        packed = rle.encode(np.asfortranarray(mask, np.uint8))
        flat = mask.ravel(order="F")
        ends = np.flatnonzero(np.diff(np.concatenate([[False], flat]))).tolist()
        expected = np.diff([0, *ends, flat.size]).tolist()
        assert unpack_counts(packed["counts"].decode()) == expected
        region = shape_region({"size": list(mask.shape), "counts": packed["counts"].decode()}, mask.shape)
        assert region["counts"] == packed["counts"]


@pytest.mark.parametrize("shape", [MISSING, None, [], {}, [[]], [[1, 2, 3, 4]]])
def test_boxes_without_a_segmentation_get_the_ignore_label(tmp_path, shape):
    data = with_field("annotations", 3, "segmentation", shape)
    data["annotations"] = [{**data["annotations"][3], "bbox": [15.5, 1, 100, 3]}, data["annotations"][0]]
    label, numbers = paint(write(tmp_path / "a.json", data), "instances")[7]
    expected = np.zeros(SIZE, np.uint8)
    expected[1:4, 15:] = 255
    expected[2:18, 2:22], expected[:3, :3] = 2, 2
    assert (label == expected).all() and ((numbers > 0) == (expected == 2)).all()
    file = CocoFile(str(tmp_path / "a.json"))
    assert not file.problems and "1 annotations have a box but no segmentation (annotation ids 4)" in file.notes[0]


@pytest.mark.parametrize(
    "bbox",
    [
        MISSING,
        None,
        [],
        [1, 2, 3],
        [1, 2, 3, "4"],
        [1, 2, 0, 4],
        [1, 2, 3, -4],
        7,
        {},
        [True, 2, 3, 4],
        [1, 2, 3, 10**400],
        [1, 2, 1e300, 4],
    ],
)
def test_annotations_with_neither_segmentation_nor_box_are_refused(tmp_path, bbox):
    assert_refused(tmp_path / "a.json", with_field("annotations", 3, "bbox", bbox), "annotation 4 of image 7", "'bbox'")
    assert not CocoFile(str(tmp_path / "a.json")).notes


def test_the_report_counts_boxes_and_stray_annotations(run, data_root, tmp_path):
    miniatures.coco(tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_train2017.json"
    data = json.loads(path.read_text())
    extra = {"category_id": 1, "iscrowd": 0, "bbox": [24, 0, 8, 4], "segmentation": []}
    data["annotations"] += [{**extra, "id": 50 + i, "image_id": i} for i in (25, 1000, 1001, 1001)]
    path.write_text(json.dumps(data))
    (tmp_path / "classes.txt").write_text("background\ndog\nperson\ncup\n")
    folder_argv = (
        "prepare_folder",
        "--images",
        tmp_path / "coco/train2017",
        "--classes",
        tmp_path / "classes.txt",
        "--coco",
        path,
    )
    for argv in (folder_argv, ("prepare_coco", "--root", tmp_path / "coco", "--partial")):
        result = run(*argv, "--workers", 1)
        assert result.status == 1 and "1 annotations have a box but no segmentation (annotation ids 75)" in result.out
        assert "3 annotations refer to images that the file does not list (image ids 1000, 1001)" in result.err
        assert result.err.count("error: ") == 1
    label = read_label(str(tmp_path / "coco/masks/000000000025.png"))
    assert (label[:4, 24:] == 255).all() and (label == 255).sum() == 32


def test_a_wrong_annotation_excludes_only_its_image(run, data_root, tmp_path):
    miniatures.coco(tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_train2017.json"
    path.write_text(path.read_text().replace("[480, 288]", "[480, 289]"))
    result = run("prepare_coco", "--root", tmp_path / "coco", "--partial", "--workers", 1)
    assert result.status == 1 and result.err.count("error: ") == 1 and "annotation 3 of image 9" in result.err
    assert "coco_train: 3 images, 2 valid masks" in result.out


JUNK = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    24,
    32,
    0.5,
    -0.0,
    3e7,
    -3e7,
    1e9,
    1e10,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**32,
    2**63,
    -(2**63),
    2**64,
    10**400,
    "",
    "7",
    "a",
    "\0",
    "\ud800",
    "\u00fc",
    "person",
    "o" * 50,
    "0",
    [],
    {},
    [[]],
    [{}],
    [0],
    [PIXELS],
    [24, 32],
    [1, 2, 3, 4],
    [[3e7, 0, 0, 3e7, -3e7, 0]],
    [[1, 2, 3, 4, 5, 6]],
    {"size": [24, 32], "counts": [PIXELS]},
    {"size": [24, 32], "counts": "0"},
    {"counts": [1]},
    {"size": None},
)
BYTES = (b"", b"[", b"]", b"{", b"}", b'"', b",", b"\xff", b"9", b"\\", b"NaN")


def tree_positions(tree):
    """(container, key) of every value in a tree of lists and dicts."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from tree_positions(value)


def mutate(rng, text):
    """The JSON text as bytes, with one to three random mutations."""
    tree = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(list(tree_positions(tree)) or [({}, "")])
        what = rng.random()
        if what < 0.6:
            holder[key] = copy.deepcopy(rng.choice(JUNK))
        elif what < 0.75 and holder:
            del holder[key]
        elif what < 0.85 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[rng.randrange(len(holder))]))
        elif holder and isinstance(holder[key], str):
            holder[key] = "".join(rng.choices([chr(c) for c in range(40, 120)], k=rng.randint(0, 9)))
        elif holder and type(holder[key]) in (int, float):
            holder[key] *= rng.choice((-1, 1.5, 2, 10**6, 2**32))
    data = bytearray(json.dumps(tree).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 2)] = rng.choice((*BYTES, bytes([rng.randrange(256)])))
    return bytes(data)


def test_random_mutations_raise_only_user_errors(tmp_path):
    """The environment variable HIERVL_FUZZ sets the number of inputs."""
    rng, path, num_painted = random.Random(0), tmp_path / "a.json", 0
    count = int(os.environ.get("HIERVL_FUZZ", 2000))
    for _ in range(count):
        path.write_bytes(mutate(rng, TEXT))
        try:
            for label, _ in paint(path, "instances").values():
                assert label.shape == SIZE and set(np.unique(label).tolist()) <= {0, 1, 2, 255}
            num_painted += 1
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and "a.json" in str(error)
    # Some mutations must have no effect, and others must be noticed.
    assert 0.02 * count < num_painted < 0.6 * count


HOSTILE_SHAPES = {
    "3e7": "[[0, 0, 3e7, 0, 3e7, 3e7]]",
    "far and many": json.dumps([[1e9, 1, -1e9, 2] * 2000]),
    "long": json.dumps([[1e5, 1, -1e5, 2] * 2000]),
    "nan": "[[0, 0, NaN, 0, 9, 9]]",
    "inf": "[[0, 0, 1e999, 0, 9, 9]]",
    "huge": "[[0, 0, 1e300, 0, 9, 9]]",
    "int": f"[[0, 0, {10**300}, 0, 9, 9]]",
    "counts": '{"size": [24, 32], "counts": [4294967295, 4294967295]}',
    "sum": f'{{"size": [24, 32], "counts": [0, {2**62}, 0]}}',
    "string": f'{{"size": [24, 32], "counts": "{"o" * 10**6}"}}',
    "overflow": '{"size": [24, 32], "counts": "oooooo?oooooo?oooooo?"}',
    "size": '{"size": [2000000000, 2000000000], "counts": [4000000000000000000]}',
    "nested": "[" * 10**6,
    "box": '[], "bbox": [-1e9, -1e9, 1e9, 1e9]',
}
SUBPROCESS_SCRIPT = """
import resource, sys
sys.path.insert(0, {repository!r})
from hiervl.data.prepare.coco_json import CocoFile, CocoMasks
from hiervl.data.prepare.masks import Job
from hiervl.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for path in sys.argv[1:]:
    try:
        CocoMasks([CocoFile(path)], {classes!r}, 255)(Job("7.jpg", key=(0, 7)), {size!r})
        print("painted")
    except UserError as error:
        print("refused")
"""


def test_hostile_shapes_do_not_kill_the_process(tmp_path):
    paths = []
    for name, shape in HOSTILE_SHAPES.items():
        text = TEXT.replace('"segmentation": []', f'"segmentation": {shape}')
        paths.append(write(tmp_path / f"{name}.json", text.encode()))
    script = SUBPROCESS_SCRIPT.format(repository=str(REPOSITORY), classes=CLASSES, size=SIZE)
    result = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["painted"] * 3 + ["refused"] * 10 + ["painted"]
