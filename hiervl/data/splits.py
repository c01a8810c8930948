"""Labeled and unlabeled lists of a semi-supervised split."""

import os

from ..errors import UserError
from .index import MaskPaths, PackedIndex


def load_split(
    split_dir: str, root: str, pool: PackedIndex | None = None, paths: MaskPaths | None = None
) -> tuple[PackedIndex, PackedIndex]:
    """Reads ``labeled.txt`` and ``unlabeled.txt`` of a split folder.

    Args:
        split_dir: the folder, such as ``datasets/splits/camvid/seed0/23``.
        root: the dataset's folder, which the paths in the lists are relative to.
        pool: all training images. If a published split has no
            ``unlabeled.txt`` (COCO), the unlabeled images are the pool minus
            the labeled ones. The result may be empty, which is an error only
            when training uses unlabeled images.
        paths: rules that locate masks and instance maps, see
            :class:`PackedIndex`.

    Returns:
        (labeled, unlabeled); every labeled entry has a mask.

    Raises:
        UserError: the folder or a list is missing, a list is empty or broken
            (see :meth:`PackedIndex.from_list_file`), or an image is in both.
    """
    if not os.path.isdir(split_dir):
        raise UserError(f"split folder {split_dir} does not exist; check DATASETS.SPLIT_ROOT and DATASETS.SPLIT")
    unlabeled_file = os.path.join(split_dir, "unlabeled.txt")
    labeled = PackedIndex.from_list_file(os.path.join(split_dir, "labeled.txt"), root, need_mask=True, paths=paths)
    if pool is not None and not os.path.exists(unlabeled_file):
        return labeled, pool.without(labeled)
    unlabeled = PackedIndex.from_list_file(unlabeled_file, root, paths=paths)
    names = {image for image, _ in labeled.all_names()}
    both = next((image for image, _ in unlabeled.all_names() if image in names), None)
    if both is not None:
        raise UserError(f"'{both}' is in both labeled.txt and unlabeled.txt of {split_dir}; remove it from one of them")
    return labeled, unlabeled
