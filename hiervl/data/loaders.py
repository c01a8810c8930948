"""Data loaders. Training data is a map-style dataset from the iteration number to this rank's samples.

Item i of :class:`SemiSupervisedBatches` depends only on (seed, i, global slot). Resuming a run thus means starting at
item i, and any number of GPUs sees the same global batches.
"""

import functools
import os
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .augmentation import cutmix_box
from .datasets import check_dataset, count_pixels, data_root, dataset_index, dataset_root, table_of
from .index import PackedIndex
from .mapper import TestMapper, TrainMapper
from .partners import partner_of, remote_partners, slots_of
from .randomness import rng
from .rare_class import RareClassSampler
from .splits import load_split

_SPOT_CHECK = 64  # unlabeled images checked before training
_TEST_CHECK = 1000  # images and masks checked before evaluation; the evaluator checks the rest as it reads them


class SemiSupervisedBatches(Dataset):
    """Batches of one rank: ``batches[iteration]`` is ``{"labeled": [sample], "unlabeled": [sample]}``.

    Labeled samples are those of :meth:`TrainMapper.labeled`. Unlabeled samples are those of
    :meth:`TrainMapper.unlabeled` with two more keys:

    - ``cutmix_box``: for each strong view, (y0, x0, y1, x1) or None. CutMix is *not yet applied* to the strong views;
      the trainer pastes images, label maps and valid masks together.
    - ``partner``: position, in this list, of the sample that the box is copied from (partners.py). Positions after the
      end mean partners that belong to other ranks, in the order of `remote_partners`; the trainer fetches them.
    """

    @configurable
    def __init__(
        self,
        labeled: Sequence[dict],
        unlabeled: Sequence[dict],
        mapper: TrainMapper,
        *,
        seed: int,
        max_iter: int,
        labeled_per_batch: int,
        unlabeled_per_batch: int = 0,
        strong_views: int = 1,
        cutmix_prob: float = 0.5,
        with_truth: bool = False,
        rare_class: RareClassSampler | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            labeled, unlabeled: records; each list is repeated endlessly, in a new order every epoch.
            mapper: makes the samples.
            seed: seed of every draw.
            max_iter: number of items.
            labeled_per_batch, unlabeled_per_batch: global batch sizes, over all ranks. With 0 unlabeled samples,
                training is supervised.
            strong_views: number of strong views per unlabeled sample.
            cutmix_prob: probability that a strong view has a box.
            with_truth: add the masks of unlabeled images, if they have any, for logging.
            rare_class: draws the labeled images, instead of iterating over them epoch by epoch.
            rank, world_size: index of this process and number of processes.

        Raises:
            UserError: a batch size is negative or not a multiple of the world size, or there are no images.
        """
        sizes = {"SOLVER.IMS_PER_BATCH": labeled_per_batch, "SEMI.UNLABELED_PER_BATCH": unlabeled_per_batch}
        for key, count in sizes.items():
            if count % world_size or count < 0:
                raise UserError(f"{key} is {count}; it must be a multiple of the number of processes ({world_size})")
        if not len(labeled) or (unlabeled_per_batch and not len(unlabeled)):
            raise UserError(f"nothing to train on: {len(labeled)} labeled and {len(unlabeled)} unlabeled images")
        self.labeled, self.unlabeled, self.mapper = labeled, unlabeled, mapper
        self.seed, self.max_iter = seed, max_iter
        self.labeled_per_batch, self.unlabeled_per_batch = labeled_per_batch, unlabeled_per_batch
        self.strong_views, self.cutmix_prob, self.with_truth = strong_views, cutmix_prob, with_truth
        self.rare_class = rare_class
        self.rank, self.world_size = rank, world_size

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Reads the split and checks its images.

        Raises:
            UserError: a key is invalid, or a list, image or mask is missing or broken.
        """
        if cfg.SEED < 0:
            raise UserError(f"SEED is {cfg.SEED}; it must be 0 or more, because every random draw depends on it")
        if len(cfg.DATASETS.TRAIN) != 1:
            raise UserError(f"DATASETS.TRAIN is {cfg.DATASETS.TRAIN}; name exactly one dataset")
        labeled, unlabeled = split_from_config(cfg)
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        num_classes, ignore = len(metadata.stuff_classes), metadata.ignore_label
        mapper = TrainMapper(cfg, ignore_label=ignore, first_instance=table_of(cfg.DATASETS.TRAIN[0]).first_instance)
        check_dataset(
            labeled,
            num_classes,
            ignore,
            instances=mapper.instances,
            max_classes=cfg.MODEL.HSQG.TOP_K if cfg.MODEL.HSQG.ENABLED else None,
        )
        _check_not_evaluated(labeled, cfg)
        if cfg.SEMI.UNLABELED_PER_BATCH:
            check_dataset(unlabeled, num_classes, ignore, sample=_SPOT_CHECK, masks=False)
        rare = cfg.SEMI.RARE_CLASS
        return {
            "labeled": labeled,
            "unlabeled": unlabeled,
            "mapper": mapper,
            "seed": cfg.SEED,
            "max_iter": cfg.SOLVER.MAX_ITER,
            "labeled_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "unlabeled_per_batch": cfg.SEMI.UNLABELED_PER_BATCH,
            "strong_views": cfg.SEMI.STRONG_VIEWS,
            "cutmix_prob": cfg.SEMI.CUTMIX_PROB,
            "with_truth": cfg.SEMI.LOG_PSEUDO_LABEL_ACCURACY,
            "rare_class": RareClassSampler(count_pixels(labeled, num_classes), rare.TEMPERATURE, rare.MIN_PIXELS)
            if rare.ENABLED
            else None,
            "rank": comm.get_rank(),
            "world_size": comm.get_world_size(),
        }

    def __len__(self) -> int:
        return self.max_iter

    def __getitem__(self, iteration: int) -> dict[str, list[dict]]:
        if not 0 <= iteration < self.max_iter:
            raise IndexError(f"iteration {iteration} of {self.max_iter}")
        labeled = [
            self._labeled(iteration, slot) for slot in slots_of(self.rank, self.world_size, self.labeled_per_batch)
        ]
        return {"labeled": labeled, "unlabeled": self._unlabeled_list(iteration)}

    def _labeled(self, iteration: int, slot: int) -> dict:
        crop_rng = rng(self.seed, iteration, slot, "labeled/crop")
        if self.rare_class is None:
            record = self._pick(self.labeled, iteration * self.labeled_per_batch + slot, "labeled/order")
            return self.mapper.labeled(record, crop_rng)
        index, class_id = self.rare_class.draw(rng(self.seed, iteration, slot, "labeled/rare"))
        return self.mapper.labeled(self.labeled[index], crop_rng, want=(class_id, self.rare_class.min_pixels))

    def _unlabeled_list(self, iteration: int) -> list[dict]:
        """This rank's unlabeled samples."""
        total = self.unlabeled_per_batch
        slots = slots_of(self.rank, self.world_size, total)
        remote = remote_partners(self.rank, self.world_size, total)
        position = {slot: i for i, slot in enumerate([*slots, *remote])}
        samples = [self._unlabeled(iteration, slot) for slot in slots]
        for sample, slot in zip(samples, slots):
            partner = partner_of(slot, total)
            sample["partner"] = position[partner]
            sample["cutmix_box"] = self._boxes(iteration, slot) if partner != slot else [None] * self.strong_views
        return samples

    def _unlabeled(self, iteration: int, slot: int) -> dict:
        record = self._pick(self.unlabeled, iteration * self.unlabeled_per_batch + slot, "unlabeled/order")
        crop_rng = rng(self.seed, iteration, slot, "unlabeled/crop")
        strong_rngs = [rng(self.seed, iteration, slot, f"unlabeled/strong{v}") for v in range(self.strong_views)]
        return self.mapper.unlabeled(record, crop_rng, strong_rngs, self.with_truth)

    def _boxes(self, iteration: int, slot: int) -> list[tuple[int, int, int, int] | None]:
        """The CutMix box of each strong view."""
        return [
            cutmix_box(
                rng(self.seed, iteration, slot, f"unlabeled/cutmix{v}"), *self.mapper.crop_size, self.cutmix_prob
            )
            for v in range(self.strong_views)
        ]

    def _pick(self, records: Sequence[dict], position: int, stream: str) -> dict:
        """The record at ``position`` of the endlessly repeated list, which is reshuffled every epoch."""
        epoch, i = divmod(position, len(records))
        return records[int(_order(self.seed, epoch, len(records), stream)[i])]


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, length: int, stream: str) -> np.ndarray:
    """Permutation (length,) of one epoch. Cached, because all samples of a batch need the same few epochs."""
    return rng(seed, epoch, 0, stream).permutation(np.arange(length, dtype=np.int32))


def split_from_config(cfg) -> tuple[PackedIndex, PackedIndex]:
    """Loads (labeled, unlabeled) as configured by DATASETS.

    Raises:
        UserError: DATASETS.SPLIT is empty, or a folder or list is missing or broken.
    """
    name = cfg.DATASETS.TRAIN[0]
    if not cfg.DATASETS.SPLIT:
        raise UserError("DATASETS.SPLIT is empty; name a folder under DATASETS.SPLIT_ROOT, such as camvid/seed0/23")
    # An empty SPLIT_ROOT means the data root: the splits of `shapes` are generated next to its images.
    split_dir = os.path.join(cfg.DATASETS.SPLIT_ROOT or data_root(), cfg.DATASETS.SPLIT)
    pool = None
    if not os.path.exists(os.path.join(split_dir, "unlabeled.txt")) and os.path.isdir(split_dir):
        pool = dataset_index(name, cfg.DATASETS.SPLIT_ROOT)
    return load_split(split_dir, dataset_root(name), pool, table_of(name).paths)


def _check_not_evaluated(labeled: PackedIndex, cfg) -> None:
    """Raises UserError if a labeled image is also in a test part.

    DATASETS.TEST may name the training part itself, to measure the training error.
    """
    files = {record["file_name"] for record in labeled}
    for name in cfg.DATASETS.TEST:
        if name in cfg.DATASETS.TRAIN or table_of(name) != table_of(cfg.DATASETS.TRAIN[0]):
            continue
        index = dataset_index(name, cfg.DATASETS.SPLIT_ROOT)
        overlap = next((record["image_id"] for record in index if record["file_name"] in files), None)
        if overlap is not None:
            raise UserError(
                f"'{overlap}' is labeled in the split {cfg.DATASETS.SPLIT} and also in {name}, which DATASETS.TEST "
                "uses for evaluation; remove it from one of the two lists"
            )


def _train_loader_from_config(cfg) -> dict:
    return {
        "batches": SemiSupervisedBatches(cfg),
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "pin_memory": cfg.MODEL.DEVICE.startswith("cuda"),
    }


@configurable(from_config=_train_loader_from_config)
def build_train_loader(
    batches: SemiSupervisedBatches, *, start_iter: int = 0, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Builds a loader that yields ``batches[start_iter]``, ``batches[start_iter + 1]``, ... up to the last item.

    Call it as ``build_train_loader(cfg, start_iter=i)`` or with explicit arguments.

    Args:
        batches: the items to load.
        start_iter: first item, > 0 when a run is resumed.
        num_workers: worker processes; 0 loads in this process.
        pin_memory: put batches into memory from which a GPU copies while the host goes on.
    """
    return _loader(batches, range(start_iter, len(batches)), num_workers, batch_size=None, pin_memory=pin_memory)


class MappedIndex(Dataset):
    """Map-style dataset whose item i is ``mapper(index[i])``."""

    def __init__(self, index: Sequence[dict], mapper: TestMapper) -> None:
        self.index, self.mapper = index, mapper

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict:
        return self.mapper(self.index[i])


def _test_loader_from_config(cfg, name: str) -> dict:
    index = dataset_index(name, cfg.DATASETS.SPLIT_ROOT)
    metadata = MetadataCatalog.get(name)
    check_dataset(index, len(metadata.stuff_classes), metadata.ignore_label, sample=_TEST_CHECK)
    return {
        "index": index,
        "mapper": TestMapper(cfg),
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "rank": comm.get_rank(),
        "world_size": comm.get_world_size(),
    }


@configurable(from_config=_test_loader_from_config)
def build_test_loader(
    index: Sequence[dict], mapper: TestMapper, *, num_workers: int = 0, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Builds a loader that yields lists of one sample.

    Each image goes to exactly one rank; no image is repeated to balance the ranks. Call it as
    ``build_test_loader(cfg, "camvid_val")`` or with explicit arguments.

    Args:
        index: records of all images.
        mapper: makes the samples.
        num_workers: worker processes; 0 loads in this process.
        rank, world_size: index of this process and number of processes.
    """
    share = range(len(index) * rank // world_size, len(index) * (rank + 1) // world_size)
    return _loader(MappedIndex(index, mapper), share, num_workers, batch_size=1)


def _loader(
    dataset: Dataset, sampler: range, num_workers: int, batch_size: int | None, pin_memory: bool = False
) -> DataLoader:
    if num_workers:
        _raise_file_limit()
    return _Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        collate_fn=_as_is,
        worker_init_fn=_init_worker,
    )


class _Loader(DataLoader):
    """A DataLoader that reduces a UserError from a worker to its one-line message."""

    def __iter__(self):
        try:
            yield from super().__iter__()
        except UserError as error:
            # The message of a worker's exception is its whole stack trace; the last line is the original message.
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("hiervl.errors.UserError: ")) from None


def _as_is(batch):
    """Collate function that leaves the batch a list."""
    return batch


def _init_worker(worker: int) -> None:
    """Limits each worker to one thread, because parallelism comes from the number of workers."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _raise_file_limit() -> None:
    """Raises the limit on open files: each tensor in flight from a worker holds a descriptor, and 1024 soon run out."""
    try:
        import resource
    except ImportError:  # Windows shares memory without file descriptors
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
