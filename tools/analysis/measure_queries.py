"""What the instance queries of a trained network do: whether they are used, repeat one another, and find the objects.

    python -m tools.analysis.measure_queries --config-file configs/shapes.yaml \
        --opts MODEL.WEIGHTS output/shapes/model_final.pth

A query is used in an image if it is likelier to hold an object than not and its mask is not empty. It is a duplicate
if a surer used query of its class has nearly the same mask (IoU of at least --overlap). A true object is found if the
mask of a used query reaches an IoU of 0.5 with it: of the same class, or of any. Data sets without maps of instances
have the regions of their classes for objects. Evaluates whole images of the first set of DATASETS.TEST.
"""

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from tabulate import tabulate
from hiervl.data.images import read_label
from hiervl.errors import exit_status
from hiervl.modeling.inference import upsample_to_image, resize_maps
from tools.analysis import trained

FOUND = 0.5  # IoU of a mask with the object that it finds


@dataclass
class Counts:
    """Sums over images. used_by: per query, the images in which it is used."""

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


def count(counts: Counts, classes, certain, masks, objects, overlap: float):
    """Add one image.

    Args:
        classes, certain: (N,) the likeliest class of each query, and how likely it is that it holds an object.
        masks: (N, P) bool, at the pixels that count. objects: list of (class, (P,) bool).
        overlap: IoU from which two masks are one.
    """
    order = [n for n in certain.argsort(descending=True).tolist() if certain[n] > 0.5 and masks[n].any()]
    masks = masks[order].float()
    counts.images += 1
    counts.used += len(order)
    counts.used_by[order] += 1
    alike = iou(masks, masks)
    same = classes[order][:, None] == classes[order]
    counts.duplicates += int(((alike >= overlap) & same).tril(-1).any(1).sum())
    counts.objects += len(objects)
    if not objects or not order:
        counts.ious += [0.0] * len(objects)
        return
    reached = iou(torch.stack([mask for _, mask in objects]).float(), masks)  # (M, used)
    right = classes[order] == torch.tensor([[k] for k, _ in objects])
    counts.found += int(((reached >= FOUND) & right).any(1).sum())
    counts.found_any += int((reached >= FOUND).any(1).sum())
    counts.ious += reached.amax(1).tolist()


def iou(first, second):
    """Masks (M, P) and (N, P) of 0 and 1 -> (M, N)."""
    both = first @ second.t()
    return both / (first.sum(1)[:, None] + second.sum(1) - both).clamp(min=1)


def true_objects(sample, num_classes: int, first_instance: int) -> tuple:
    """What an image shows: (which pixels count (H, W) bool, [(class, (P,) bool at those pixels)]).

    Objects are the instances, of numbers from `first_instance` on, or class regions where there is no map of them.
    """
    label = read_label(sample["sem_seg_file_name"]).astype(np.int64)
    counts = label < num_classes
    label, numbers = label[counts], np.zeros(counts.sum(), np.int64)
    if "instances_file_name" in sample:
        numbers = read_label(sample["instances_file_name"]).astype(np.int64)[counts]
        label = np.where(numbers >= first_instance, label, num_classes)
    pairs = np.unique(np.stack((label, numbers)), axis=1).T
    return (
        torch.from_numpy(counts),
        [(int(k), torch.from_numpy((label == k) & (numbers == n))) for k, n in pairs if k < num_classes],
    )


@torch.no_grad()
def measure(network, samples, first_instance: int, overlap: float) -> Counts:
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
            classes = output.selected.index[0][classes]
        pixels, objects = true_objects(sample, network.num_classes, first_instance)
        count(counts, classes.cpu(), 1 - probability[:, -1].cpu(), masks.cpu()[:, pixels], objects, overlap)
    return counts


def run(args):
    cfg = trained.read_config(args.config_file, args.opts)
    trained.output_folder(args, cfg, "queries.json")
    network = trained.load(cfg, args.model)
    samples, data = trained.samples(cfg)
    table = measure(network, samples, data.first_instance, args.overlap).table()
    print(tabulate(table.items(), floatfmt=".1f", tablefmt="github", missingval="-", headers=["", ""]))
    trained.save(args, cfg, "queries.json", table)


def parse_args(argv=None):
    parser = trained.parser(__doc__)
    parser.add_argument("--overlap", type=float, default=0.7, help="IoU from which two masks are one (%(default)s)")
    parser.add_argument("--output", default="output/queries", help="folder for queries.json (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
