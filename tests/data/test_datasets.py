import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from hiervl.data.datasets import check_dataset, count_pixels, dataset_index, table_of
from hiervl.data.images import image_size, read_image, read_label
from hiervl.data.index import PackedIndex
from hiervl.errors import UserError

from tests.conftest import shared_file


def test_parts_are_registered_with_their_classes():
    assert {"camvid_train", "camvid_val", "camvid_cross_val", "shapes_train", "shapes_val"} <= set(DatasetCatalog)
    metadata = MetadataCatalog.get("camvid_val")
    assert len(metadata.stuff_classes) == len(metadata.stuff_colors) == 11
    assert (metadata.ignore_label, metadata.evaluator_type) == (255, "sem_seg")
    shapes = table_of("shapes_val")
    assert len(shapes.classes) >= 25 and shapes.classes[0] == "background"
    assert len(set(shapes.classes)) == len(set(shapes.colors)) == len(shapes.classes)


def test_camvid_is_read_from_the_data_root(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", shared_file("datasets"))
    splits = shared_file("splits")
    assert len(DatasetCatalog.get("camvid_train")) == 367
    assert len(dataset_index("camvid_cross_val", splits)) == 101
    check_dataset(dataset_index("camvid_val"), 11, 255, sample=10)


def test_missing_data_root_and_unknown_part_are_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(UserError, match="camvid does not exist; set DETECTRON2_DATASETS"):
        DatasetCatalog.get("camvid_train")
    with pytest.raises(UserError, match="unknown dataset 'camvid'; available: .*camvid_val"):
        dataset_index("camvid")


def test_valid_folder_passes_and_pixels_are_counted(labeled):
    check_dataset(labeled, 4, 255, max_classes=4)
    assert (count_pixels(labeled, 4) == 60 * 20).all()


def test_mask_with_more_classes_than_top_k_is_reported(labeled):
    with pytest.raises(UserError, match="_mask.png contains 4 classes, but MODEL.HSQG.TOP_K is only 3"):
        check_dataset(labeled, 4, 255, max_classes=3)


def break_first_pair(folder, defect):
    """Breaks the first labeled image or mask of ``folder``."""
    image, mask = folder / "0.png", folder / "0_mask.png"
    if defect == "no image":
        image.unlink()
    elif defect == "no mask":
        mask.unlink()
    elif defect == "id":
        Image.fromarray(np.full((60, 80), 37, np.uint8)).save(mask)
    elif defect == "size":
        Image.fromarray(np.zeros((30, 80), np.uint8)).save(mask)
    elif defect == "color":
        Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(mask)
    elif defect == "truncated":
        mask.write_bytes(mask.read_bytes()[:-40])
    elif defect == "text":
        image.write_text("not an image")


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        ("no image", ["0.png does not exist", "DETECTRON2_DATASETS"]),
        ("no mask", ["0_mask.png does not exist"]),
        ("id", ["0_mask.png has the id 37", "4 classes (0 to 3)", "class list"]),
        ("size", ["0_mask.png is 80x30", "0.png is 80x60"]),
        ("color", ["0_mask.png is a color image", "indexed"]),
        ("truncated", ["cannot decode", "0_mask.png"]),
        ("text", ["cannot decode", "0.png"]),
    ],
)
def test_error_for_bad_input_is_one_line_that_names_the_file(folder, labeled, defect, words):
    break_first_pair(folder, defect)
    with pytest.raises(UserError) as error:
        check_dataset(labeled, 4, 255)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_masks_of_unlabeled_images_are_not_opened(folder, unlabeled):
    for i in range(12):
        (folder / f"{i}_mask.png").unlink()
    check_dataset(unlabeled, 4, 255, masks=False)
    (folder / "11.png").unlink()
    with pytest.raises(UserError, match="11.png"):
        check_dataset(unlabeled, 4, 255, sample=3, masks=False)  # the last image is always checked


def test_labeled_image_without_a_mask_is_reported(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png has no mask in its list"):
        check_dataset(PackedIndex([("a.png", "")], str(tmp_path)), 4, 255)


def test_images_are_upright_rgb(tmp_path):
    rotated = Image.new("L", (30, 20), 7)
    exif = rotated.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    rotated.save(tmp_path / "a.jpg", exif=exif)
    path = str(tmp_path / "a.jpg")
    assert read_image(path).shape == (30, 20, 3) and image_size(path) == (30, 20)


def test_truncated_image_is_an_error_and_not_partly_gray(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="cannot decode .*a.jpg"):
        read_image(str(path))


def test_16_bit_labels_are_read_and_16_bit_images_are_refused(tmp_path):
    ids = np.array([[0, 1], [2, 300]], np.uint16)
    Image.fromarray(ids).save(tmp_path / "deep.png")
    assert (read_label(str(tmp_path / "deep.png")) == ids).all()
    with pytest.raises(UserError, match="8 bits"):
        read_image(str(tmp_path / "deep.png"))
