import numpy as np
import pytest
import torch
from PIL import Image

from hiervl.data import images
from hiervl.data.datasets import count_pixels
from hiervl.data.index import PackedIndex
from hiervl.data.loaders import SemiSupervisedBatches, build_test_loader, build_train_loader
from hiervl.data.partners import remote_partners, slots_of
from hiervl.data.mapper import TestMapper, TrainMapper
from hiervl.data.randomness import rng
from hiervl.data.rare_class import RareClassSampler
from hiervl.errors import UserError


def make_batches(labeled, unlabeled, mapper, **kwargs):
    defaults = dict(seed=3, max_iter=20, labeled_per_batch=2, unlabeled_per_batch=4, strong_views=2)
    return SemiSupervisedBatches(labeled, unlabeled, mapper, **{**defaults, **kwargs})


def assert_same(a, b):
    """Asserts that two nested samples are equal, comparing tensors by value."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def test_items_are_the_same_after_resuming_and_in_workers(labeled, unlabeled, mapper):
    data = make_batches(labeled, unlabeled, mapper, max_iter=9)
    once = [data[i] for i in range(9)]
    resumed = list(
        build_train_loader(make_batches(labeled, unlabeled, mapper, max_iter=9), start_iter=4, num_workers=2)
    )
    assert len(resumed) == 5
    assert_same(resumed, once[4:])
    other_seed = make_batches(labeled, unlabeled, mapper, seed=4)[0]
    for different in (once[1], other_seed):
        assert not torch.equal(once[0]["labeled"][0]["image"], different["labeled"][0]["image"])


def test_each_image_is_seen_once_per_epoch_in_a_new_order(labeled, unlabeled, mapper):
    data = make_batches(labeled, unlabeled, mapper)
    seen = [s["file_name"] for i in range(6) for s in data[i]["unlabeled"]]
    first, second, third = seen[:8], seen[8:16], seen[16:]
    assert set(first) == set(second) == set(third) == {r["file_name"] for r in unlabeled}
    assert first != second or second != third
    seen = [s["file_name"] for i in range(10) for s in data[i]["labeled"]]
    assert all(seen.count(r["file_name"]) == 5 for r in labeled)  # the labeled list repeats


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_together_see_the_batches_of_a_single_process(labeled, unlabeled, mapper, world_size):
    one = make_batches(labeled, unlabeled, mapper, labeled_per_batch=4)
    ranks = [make_batches(labeled, unlabeled, mapper, labeled_per_batch=4, rank=r, world_size=world_size)
             for r in range(world_size)]  # fmt: skip
    for i in (0, 7):
        whole, parts = one[i], [rank[i] for rank in ranks]
        assert_same([s for part in parts for s in part["labeled"]], whole["labeled"])
        samples = [(rank, s) for rank, part in enumerate(parts) for s in part["unlabeled"]]
        assert len(samples) == len(whole["unlabeled"]) == 4
        for (rank, sample), expected in zip(samples, whole["unlabeled"]):
            for key in ("file_name", "image", "strong", "valid", "cutmix_box"):
                assert_same(sample[key], expected[key])
            # The position of the partner may differ, but not the partner itself.
            slots = [*slots_of(rank, world_size, 4), *remote_partners(rank, world_size, 4)]
            assert slots[sample["partner"]] == expected["partner"]


def test_cutmix_partners(labeled, unlabeled, mapper):
    def partners(**kwargs):
        samples = make_batches(labeled, unlabeled, mapper, **kwargs)[0]["unlabeled"]
        return [s["partner"] for s in samples]

    assert partners() == [1, 0, 3, 2]
    assert partners(unlabeled_per_batch=3) == [1, 0, 1]
    assert partners(rank=1, world_size=2, unlabeled_per_batch=2) == [1]  # slot 0, of the other rank
    assert partners(rank=1, world_size=2, labeled_per_batch=2, unlabeled_per_batch=6) == [3, 2, 1]  # slots 3, 4, 5; 2
    single = make_batches(labeled, unlabeled, mapper, unlabeled_per_batch=1, cutmix_prob=1.0)[0]["unlabeled"]
    assert single[0]["partner"] == 0 and single[0]["cutmix_box"] == [None, None]
    # In an odd batch over three ranks, the last slot's partner is on another rank.
    last = make_batches(labeled, unlabeled, mapper, labeled_per_batch=3, unlabeled_per_batch=3, rank=2, world_size=3)[0]
    assert [s["partner"] for s in last["unlabeled"]] == [1]


def test_supervised_batches_have_no_unlabeled_samples_and_the_same_labeled_ones(labeled, unlabeled, mapper):
    supervised = make_batches(labeled, [], mapper, unlabeled_per_batch=0)[5]
    assert supervised["unlabeled"] == []
    assert_same(supervised["labeled"], make_batches(labeled, unlabeled, mapper)[5]["labeled"])


def test_the_mask_of_an_unlabeled_image_is_never_opened(folder, labeled, unlabeled, mapper, monkeypatch):
    opened = []
    monkeypatch.setattr(images.Image, "open", lambda path, *a, f=Image.open: opened.append(path) or f(path, *a))
    data = make_batches(labeled, unlabeled, mapper)
    for i in range(4):
        data[i]
    allowed = {r["sem_seg_file_name"] for r in labeled}
    assert {path for path in opened if path.endswith("_mask.png")} <= allowed and len(opened) > 8
    for record in unlabeled:
        (folder / record["sem_seg_file_name"]).unlink()
    data[4]
    assert "true_sem_seg" not in data[4]["unlabeled"][0]


def test_with_truth_adds_the_mask_and_changes_nothing_else(labeled, unlabeled, mapper):
    plain = make_batches(labeled, unlabeled, mapper)[2]
    with_truth = make_batches(labeled, unlabeled, mapper, with_truth=True)[2]
    for sample in with_truth["unlabeled"]:
        assert sample.pop("true_sem_seg").shape == (48, 64)
    assert_same(plain, with_truth)


def test_rare_class_sampling_finds_the_rare_class(tmp_path):
    for i in range(10):
        mask = np.zeros((120, 120), np.uint8)
        if i == 7:
            mask[60:84, 60:84] = 1
        Image.fromarray(mask).save(tmp_path / f"{i}_mask.png")
        Image.new("RGB", (120, 120)).save(tmp_path / f"{i}.png")
    index = PackedIndex([(f"{i}.png", f"{i}_mask.png") for i in range(10)], str(tmp_path))
    sampler = RareClassSampler(count_pixels(index, 3), temperature=0.1, min_pixels=60)
    assert sampler.probabilities[2] == 0 and sampler.probabilities[1] > 0.99

    def fraction_of_crops_with_class_1(rare_class):
        data = SemiSupervisedBatches(
            index, [], TrainMapper((40, 40)), seed=0, max_iter=20, labeled_per_batch=4, rare_class=rare_class
        )
        return np.mean([(s["sem_seg"] == 1).sum().item() >= 60 for i in range(20) for s in data[i]["labeled"]])

    assert fraction_of_crops_with_class_1(None) < 0.1 and fraction_of_crops_with_class_1(sampler) > 0.5


def test_rare_class_draws_follow_the_documented_softmax():
    counts = np.array([[900, 0, 50], [0, 50, 0]])
    sampler = RareClassSampler(counts, temperature=0.5, min_pixels=1)
    expected = np.exp((1 - np.array([0.9, 0.05, 0.05])) / 0.5)
    assert np.allclose(sampler.probabilities, expected / expected.sum())
    draws = [sampler.draw(rng(0, i, 0, "rare")) for i in range(600)]
    assert abs(np.mean([c == 0 for _, c in draws]) - sampler.probabilities[0]) < 0.06
    assert all(counts[index, class_id] > 0 for index, class_id in draws)
    with pytest.raises(UserError, match="no pixel"):
        RareClassSampler(np.zeros((2, 3)), 0.1, 1)


def test_test_loader_gives_each_image_to_exactly_one_rank(labeled, folder):
    seen = []
    for rank in range(3):
        for batch in build_test_loader(labeled, TestMapper(), rank=rank, world_size=3):
            assert len(batch) == 1 and batch[0]["image"].shape == (3, 60, 80)
            seen.append(batch[0]["image_id"])
    assert sorted(seen) == sorted(r["image_id"] for r in labeled)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_decoding_error_in_training_is_one_line_that_names_the_file(folder, labeled, unlabeled, mapper, num_workers):
    for record in labeled:
        (folder / record["file_name"]).write_bytes(b"broken")
    with pytest.raises(UserError) as error:
        list(build_train_loader(make_batches(labeled, unlabeled, mapper, max_iter=1), num_workers=num_workers))
    message = str(error.value)
    assert message.startswith("cannot decode ") and ".png" in message and "\n" not in message


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"labeled_per_batch": 3, "world_size": 2}, "SOLVER.IMS_PER_BATCH is 3"),
        ({"unlabeled_per_batch": 3, "world_size": 2}, "SEMI.UNLABELED_PER_BATCH is 3"),
        ({"unlabeled": []}, "nothing to train on: 4 labeled and 0 unlabeled"),
    ],
)
def test_invalid_batch_settings_are_refused(labeled, unlabeled, mapper, kwargs, words):
    kwargs = {"unlabeled": unlabeled, **kwargs}
    with pytest.raises(UserError, match=words):
        make_batches(labeled, mapper=mapper, **kwargs)


def test_items_end_at_max_iter(labeled, unlabeled, mapper):
    data = make_batches(labeled, unlabeled, mapper)
    assert len(data) == 20
    with pytest.raises(IndexError):
        data[20]
