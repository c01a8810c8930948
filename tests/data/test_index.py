import pickle

import pytest

from hiervl.data.index import PackedIndex
from hiervl.data.splits import load_split
from hiervl.errors import UserError


def index_of(tmp_path, text, **kwargs):
    path = tmp_path / "list.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return PackedIndex.from_list_file(str(path), "/root", **kwargs)


def test_records_have_absolute_paths_and_a_mask_only_if_listed(tmp_path):
    index = index_of(tmp_path, "a.jpg a.png\n\nb.jpg\n")
    assert index[0] == {"file_name": "/root/a.jpg", "sem_seg_file_name": "/root/a.png", "image_id": "a.jpg"}
    assert index[-1] == {"file_name": "/root/b.jpg", "image_id": "b.jpg"}
    assert [record["image_id"] for record in index] == ["a.jpg", "b.jpg"]
    with pytest.raises(IndexError):
        index[2]


def test_names_with_spaces_are_separated_by_a_tab(tmp_path):
    index = index_of(tmp_path, "my image.jpg\tmy mask.png\r\nother image.jpg\t\r\n")
    assert list(index.all_names()) == [("my image.jpg", "my mask.png"), ("other image.jpg", "")]


def test_non_ascii_names_and_byte_order_mark(tmp_path):
    assert index_of(tmp_path, "\ufeffstraße.jpg bücher.png\n").names(0) == ("straße.jpg", "bücher.png")


def test_pickle_has_no_object_per_image():
    index = PackedIndex(((f"{i}.jpg", "") for i in range(1000)), "/root")
    copy = pickle.loads(pickle.dumps(index))
    assert copy[999] == index[999] and len(copy) == 1000
    assert len(pickle.dumps(index)) < 1000 * (len("999.jpg\t") + 8) + 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["list.txt is empty"]),
        ("\n \n", ["list.txt is empty"]),
        ("a.jpg a.png\nb.jpg b.png\na.jpg a.png\n", ["line 3", "'a.jpg'", "line 1", "remove"]),
        ("a.jpg a.png\nmy own image.jpg\n", ["line 2", "3 names", "tab"]),
        ("\ta.png\n", ["line 1", "expected"]),
        (b"\xff\xfe\x00", ["not UTF-8"]),
    ],
)
def test_error_for_a_broken_list_names_the_file_and_line(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        index_of(tmp_path, text)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in ["list.txt", *words]), message


def test_missing_list_and_labeled_line_without_mask_are_reported(tmp_path):
    with pytest.raises(UserError, match="nowhere.txt.*README"):
        PackedIndex.from_list_file(str(tmp_path / "nowhere.txt"), "/root")
    with pytest.raises(UserError, match="line 2: labeled image 'b.jpg' has no mask"):
        index_of(tmp_path, "a.jpg a.png\nb.jpg\n", need_mask=True)


def test_overlapping_split_lists_are_an_error(folder):
    labeled, unlabeled = load_split(str(folder), str(folder))
    assert (len(labeled), len(unlabeled)) == (4, 8)
    (folder / "unlabeled.txt").write_text("9.png\n0.png\n")
    with pytest.raises(UserError, match="'0.png' is in both labeled.txt and unlabeled.txt"):
        load_split(str(folder), str(folder))


def test_split_without_an_unlabeled_list_uses_the_rest_of_the_pool(folder):
    pool = PackedIndex.from_list_file(str(folder / "train.txt"), str(folder))
    (folder / "unlabeled.txt").unlink()
    labeled, unlabeled = load_split(str(folder), str(folder), pool)
    assert [image for image, _ in unlabeled.all_names()] == [f"{i}.png" for i in range(4, 12)]
    with pytest.raises(UserError, match="unlabeled.txt"):
        load_split(str(folder), str(folder))


def test_error_for_a_missing_split_folder_names_the_keys(tmp_path):
    with pytest.raises(UserError, match="DATASETS.SPLIT"):
        load_split(str(tmp_path / "seed9"), str(tmp_path))
