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


def test_a_missing_data_root_and_an_unknown_part(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(UserError, match="camvid does not exist; set DETECTRON2_DATASETS"):
        DatasetCatalog.get("camvid_train")
    with pytest.raises(UserError, match="no data set 'camvid'; known are .*camvid_val"):
        dataset_index("camvid")


def test_a_good_folder_passes_and_is_counted(labeled):
    check_dataset(labeled, 4, 255, max_classes=4)
    assert (count_pixels(labeled, 4) == 60 * 20).all()


def test_a_mask_with_more_classes_than_can_be_kept_is_told_at_the_start(labeled):
    with pytest.raises(UserError, match="_mask.png shows 4 classes, but MODEL.HSQG.TOP_K is 3"):
        check_dataset(labeled, 4, 255, max_classes=3)


def broken(folder, what):
    """Breaks the first labeled image or mask of ``folder`` in one way."""
    image, mask = folder / "0.png", folder / "0_mask.png"
    if what == "no image":
        image.unlink()
    elif what == "no mask":
        mask.unlink()
    elif what == "id":
        Image.fromarray(np.full((60, 80), 37, np.uint8)).save(mask)
    elif what == "size":
        Image.fromarray(np.zeros((30, 80), np.uint8)).save(mask)
    elif what == "color":
        Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(mask)
    elif what == "truncated":
        mask.write_bytes(mask.read_bytes()[:-40])
    elif what == "text":
        image.write_text("not an image")


@pytest.mark.parametrize(
    ("what", "words"),
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
def test_bad_input_is_one_line_that_names_the_file(folder, labeled, what, words):
    broken(folder, what)
    with pytest.raises(UserError) as error:
        check_dataset(labeled, 4, 255)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_masks_are_left_alone_when_the_images_are_unlabeled(folder, unlabeled):
    for i in range(12):
        (folder / f"{i}_mask.png").unlink()
    check_dataset(unlabeled, 4, 255, masks=False)
    (folder / "11.png").unlink()
    with pytest.raises(UserError, match="11.png"):
        check_dataset(unlabeled, 4, 255, sample=3, masks=False)  # the last one is always looked at


def test_a_labeled_image_without_a_mask_in_its_list(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png has no mask in its list"):
        check_dataset(PackedIndex([("a.png", "")], str(tmp_path)), 4, 255)


def test_images_are_upright_rgb(tmp_path):
    lying = Image.new("L", (30, 20), 7)
    exif = lying.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    lying.save(tmp_path / "a.jpg", exif=exif)
    path = str(tmp_path / "a.jpg")
    assert read_image(path).shape == (30, 20, 3) and image_size(path) == (30, 20)


def test_a_truncated_photo_is_an_error_not_a_gray_picture(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="cannot decode .*a.jpg"):
        read_image(str(path))


def test_labels_of_every_depth_and_deep_images(tmp_path):
    ids = np.array([[0, 1], [2, 300]], np.uint16)
    Image.fromarray(ids).save(tmp_path / "deep.png")
    assert (read_label(str(tmp_path / "deep.png")) == ids).all()
    with pytest.raises(UserError, match="8 bits"):
        read_image(str(tmp_path / "deep.png"))
