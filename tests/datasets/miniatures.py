"""The benchmarks in their official layouts with three to six images each, including annotations, .mat and palettes."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from scipy.io import savemat

SIZE = (24, 32)  # height, width


def photo(path, seed=0, size=SIZE, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **save)


def indexed(path, ids, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(ids))
    if palette is not None:
        image = Image.frombytes("P", image.size, np.asarray(ids, np.uint8).tobytes())
        image.putpalette(palette)
    image.save(path)


def box(y0, x0, y1, x1):
    """A COCO polygon that covers exactly the pixels [y0, y1) x [x0, x1)."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def coco(root):
    """Train: image 9 has a person, a small dog on it, and a crowd; 25 nothing; 30 run lengths. Val: 139 has a cup."""
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 47, "name": "cup"}]
    crowd = np.zeros(SIZE, np.uint8, order="F")
    crowd[:, 20:] = 1
    lengths = [24 * 20, 24 * 12]  # run lengths of `crowd`, down the columns
    packed = rle.encode(np.asfortranarray(np.roll(crowd, 5, axis=1)))
    train = [
        {"id": 1, "image_id": 9, "category_id": 18, "iscrowd": 0, "area": 16, "segmentation": [box(6, 6, 10, 10)]},
        {"id": 2, "image_id": 9, "category_id": 1, "iscrowd": 0, "area": 320, "segmentation": [box(2, 2, 18, 22)]},
        {
            "id": 3,
            "image_id": 9,
            "category_id": 1,
            "iscrowd": 1,
            "area": 288,
            "segmentation": {"size": list(SIZE), "counts": lengths},
        },
        {
            "id": 4,
            "image_id": 30,
            "category_id": 47,
            "iscrowd": 0,
            "area": 288,
            "segmentation": {"size": list(SIZE), "counts": packed["counts"].decode()},
        },
    ]
    val = [{"id": 5, "image_id": 139, "category_id": 47, "iscrowd": 0, "area": 9, "segmentation": [box(0, 0, 3, 3)]}]
    for folder, ids, annotations in (("train2017", (9, 25, 30), train), ("val2017", (139,), val)):
        images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in ids]
        for i in ids:
            photo(root / folder / f"{i:012d}.jpg", i)
        path = root / "annotations" / f"instances_{folder}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps(
                {
                    "info": {"year": 2017},
                    "licenses": [],
                    "images": images,
                    "annotations": annotations,
                    "categories": categories,
                }
            )
        )


def voc(root, sbd):
    """Train is 2007_000032, val 2007_000033; SBD has other masks for these two, and a mask for 2008_000002."""
    palette = np.random.default_rng(0).integers(0, 255, 768, dtype=np.uint8).tobytes()
    for seed, name in enumerate(("2007_000032", "2007_000033", "2008_000002")):
        photo(root / "JPEGImages" / f"{name}.jpg", seed)
        ids = np.full(SIZE, 15, np.uint8)
        ids[0] = 255
        if seed < 2:
            indexed(root / "SegmentationClass" / f"{name}.png", ids, palette)
        (sbd / "dataset" / "cls").mkdir(parents=True, exist_ok=True)
        fields = {
            "Boundaries": np.zeros((20, 1), object),
            "Segmentation": np.full(SIZE, 7, np.uint8),
            "CategoriesPresent": np.uint8(7),
        }
        savemat(sbd / "dataset" / "cls" / f"{name}.mat", {"GTcls": fields})
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "val.txt").write_text("2007_000033\n")


def ade20k(root):
    """Two training images and one validation image with ids 0 to 150."""
    for folder, short, count in (("training", "train", 2), ("validation", "val", 1)):
        for i in range(1, count + 1):
            photo(root / "images" / folder / f"ADE_{short}_{i:08d}.jpg", i)
            ids = np.tile(np.array([0, 1, 150, 3 + i], np.uint8).repeat(8), (SIZE[0], 1))
            indexed(root / "annotations" / folder / f"ADE_{short}_{i:08d}.png", ids)


def cityscapes(root):
    """Three training images of two cities and one validation image: road, two cars, a group of cars, an ignored id."""
    for i, (folder, city) in enumerate(
        [("train", "aachen"), ("train", "aachen"), ("train", "zurich"), ("val", "frankfurt")]
    ):
        stem = f"{city}_{i:06d}_000019"
        photo(root / "leftImg8bit" / folder / city / f"{stem}_leftImg8bit.png", i)
        labels = np.full(SIZE, 7, np.uint8)
        labels[:4], labels[4:8, :10], labels[4:8, 10:20], labels[4:8, 20:] = 3, 26, 26, 26
        instances = labels.astype(np.uint16)
        instances[4:8, :10], instances[4:8, 10:20] = 26000, 26001
        base = root / "gtFine" / folder / city
        indexed(base / f"{stem}_gtFine_labelIds.png", labels)
        indexed(base / f"{stem}_gtFine_instanceIds.png", instances)
        photo(base / f"{stem}_gtFine_color.png", i)
        polygon = {"label": "car", "polygon": [[0, 4], [10, 4], [10, 8], [0, 8]]}
        (base / f"{stem}_gtFine_polygons.json").write_text(
            json.dumps({"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": [polygon]})
        )


def camvid(source):
    """Three training images, one validation and one test image; ids 0 to 11; lists with folders of another machine."""
    names = {
        "train": ("0001TP_006690", "0016E5_00390", "0006R0_f01020"),
        "val": ("0016E5_07959",),
        "test": ("0001TP_008550",),
    }
    for folder, stems in names.items():
        lines = []
        for i, stem in enumerate(stems):
            photo(source / folder / f"{stem}.png", i)
            indexed(source / f"{folder}annot" / f"{stem}.png", np.tile(np.arange(32, dtype=np.uint8) % 12, (24, 1)))
            lines.append(f"/SegNet/CamVid/{folder}/{stem}.png /SegNet/CamVid/{folder}annot/{stem}.png\n")
        (source / f"{folder}.txt").write_text("".join(lines))
