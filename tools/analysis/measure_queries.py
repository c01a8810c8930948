"""Measure how a trained network uses its instance queries: how many are used, are duplicates, and find objects.

    python -m tools.analysis.measure_queries --config-file configs/shapes.yaml \
        --opts MODEL.WEIGHTS output/shapes/model_final.pth

A query is used in an image if its probability of "no object" is below 0.5 and its mask is not empty. It is a duplicate
if a more confident used query of the same class has nearly the same mask (IoU of at least --overlap). A true object is
found if the mask of a used query reaches an IoU of 0.5 with it; this is counted for queries of the same class, and of
any class. For datasets without instance maps, the regions of the classes are the objects. Evaluates whole images of
the first dataset of DATASETS.TEST.
"""

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from tabulate import tabulate

from hiervl.data.images import read_label
from hiervl.errors import exit_status
from hiervl.modeling.inference import resize_maps, upsample_to_image
from tools.analysis import trained

FOUND_IOU = 0.5  # of a mask with the object that it finds


@dataclass
class Counts:
    """Sums over images.

    Attributes:
        used_by: (N,) number of images in which each query is used.
        found, found_any: objects found by a query of their class, and by any query.
        ious: for each object, the best IoU of any used query.
    """

    used_by: np.ndarray
    images: int = 0
    used: int = 0
    duplicates: int = 0
    objects: int = 0
    found: int = 0
    found_any: int = 0
    ious: list = field(default_factory=list)

    def table(self) -> dict:
        return {
            "instance queries": len(self.used_by),
            "used per image": self.used / max(self.images, 1),
            "% of them never used": _percent((self.used_by == 0).sum(), len(self.used_by)),
            "% of the used that are duplicates": _percent(self.duplicates, self.used),
            "% of objects found, class right": _percent(self.found, self.objects),
            "% of objects found, any class": _percent(self.found_any, self.objects),
            "mean best IoU, %": 100 * float(np.mean(self.ious)) if self.ious else None,
        }


def _percent(part, whole):
    return 100 * float(part / whole) if whole else None


def count(counts: Counts, classes, confidence, masks, objects, overlap: float) -> None:
    """Add one image.

    Args:
        classes, confidence: (N,) most likely class of each query, and its probability of being an object.
        masks: (N, P) bool, at the valid pixels.
        objects: list of (class, (P,) bool).
        overlap: IoU at which two masks count as the same.
    """
    order = confidence.argsort(descending=True).tolist()
    used = [n for n in order if confidence[n] > 0.5 and masks[n].any()]
    masks, classes = masks[used].float(), classes[used]
    counts.images += 1
    counts.used += len(used)
    counts.used_by[used] += 1
    same_mask = iou(masks, masks) >= overlap
    same_class = classes[:, None] == classes
    # Below the diagonal: pairs with a more confident query.
    counts.duplicates += int((same_mask & same_class).tril(-1).any(1).sum())
    counts.objects += len(objects)
    if not objects or not used:
        counts.ious += [0.0] * len(objects)
        return
    ious = iou(torch.stack([mask for _, mask in objects]).float(), masks)  # (number of objects, number of used queries)
    correct = classes == torch.tensor([[k] for k, _ in objects])
    counts.found += int(((ious >= FOUND_IOU) & correct).any(1).sum())
    counts.found_any += int((ious >= FOUND_IOU).any(1).sum())
    counts.ious += ious.amax(1).tolist()


def iou(first, second):
    """Pairwise IoU of masks (M, P) and (N, P) of 0 and 1: (M, N)."""
    intersection = first @ second.t()
    return intersection / (first.sum(1)[:, None] + second.sum(1) - intersection).clamp(min=1)


def true_objects(sample, num_classes: int, first_instance: int) -> tuple:
    """Ground-truth objects of an image of H x W pixels, P of them valid (not ignored).

    The objects are the instances, which have numbers from `first_instance` on in the instance map; without such a map,
    they are the regions of the classes.

    Returns:
        valid pixels (H, W) bool, and a list of (class, (P,) bool).
    """
    label = read_label(sample["sem_seg_file_name"]).astype(np.int64)
    valid = label < num_classes
    label, instance = label[valid], np.zeros(valid.sum(), np.int64)
    if "instances_file_name" in sample:
        instance = read_label(sample["instances_file_name"]).astype(np.int64)[valid]
        label = np.where(instance >= first_instance, label, num_classes)  # num_classes: no object
    pairs = np.unique(np.stack((label, instance)), axis=1).T
    objects = [
        (int(k), torch.from_numpy((label == k) & (instance == number))) for k, number in pairs if k < num_classes
    ]
    return torch.from_numpy(valid), objects


@torch.no_grad()
def measure(network, samples, first_instance: int, overlap: float) -> Counts:
    """Count over all samples; arguments as in `true_objects` and `count`."""
    counts = Counts(np.zeros(network.decoder.num_queries, np.int64))
    for sample in samples:
        image = sample["image"][None].to(network.device, torch.float32)
        output = network.inference_forward(image)
        last = output.layers[-1]
        masks = upsample_to_image(last.mask_logits(output.mask_features), image.shape[2:])
        masks = resize_maps(masks, (sample["height"], sample["width"]))[0] > 0
        probability = last.class_logits[0].float().softmax(1)  # (N, K'+1)
        classes = probability[:, :-1].argmax(1)
        if output.selected is not None:
            classes = output.selected.index[0][classes]  # among the K' selected classes -> among all classes
        valid, objects = true_objects(sample, network.num_classes, first_instance)
        count(counts, classes.cpu(), 1 - probability[:, -1].cpu(), masks.cpu()[:, valid], objects, overlap)
    return counts


def run(args):
    cfg = trained.read_config(args.config_file, args.opts)
    trained.output_folder(args, cfg, "queries.json")
    network = trained.load(cfg, args.model)
    samples, dataset = trained.samples(cfg)
    table = measure(network, samples, dataset.first_instance, args.overlap).table()
    print(tabulate(table.items(), floatfmt=".1f", tablefmt="github", missingval="-", headers=["", ""]))
    trained.save(args, cfg, "queries.json", table)


def parse_args(argv=None):
    parser = trained.parser(__doc__)
    parser.add_argument(
        "--overlap", type=float, default=0.7, help="IoU at which two masks count as the same (%(default)s)"
    )
    parser.add_argument("--output", default="output/queries", help="folder for queries.json (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
