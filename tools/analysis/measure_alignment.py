"""Measure how well a trained network's alignment maps follow object outlines, and what CMSAM's parts contribute.

    python -m tools.analysis.measure_alignment --config-file configs/camvid_23_hiervl.yaml \
        --opts MODEL.WEIGHTS output/camvid_23_hiervl/model_final.pth

Evaluates the class probabilities and the pixel-text similarity (each pixel gets the most similar class) by mIoU and
boundary IoU: with the network as it is, with its maps upsampled bilinearly instead of along the edges of the mask
features, and without the feature exchange between pixels and queries. Nothing is retrained: the rows show how much the
trained network relies on these parts, not how good a network trained without them would be. Evaluates whole images of
the first dataset of DATASETS.TEST.
"""

import contextlib
import sys

import torch
from tabulate import tabulate

from hiervl.data.images import read_label
from hiervl.errors import UserError, exit_status
from hiervl.evaluation import BoundaryIoU, ConfusionMatrix
from hiervl.evaluation.confusion import compute_metrics
from hiervl.modeling.inference import resize_maps, upsample_to_image
from tools.analysis import trained

# Row -> attributes of SpatialAlignment that it switches off.
ROWS = {
    "as it is": (),
    "bilinear upsampling": ("guided_upsampling",),
    "without feature exchange": ("feature_exchange",),
}


class Quality:
    """mIoU and boundary mIoU of label maps."""

    def __init__(self, num_classes: int, ignore_label: int):
        self.regions = ConfusionMatrix(num_classes, ignore_label)
        self.boundaries = BoundaryIoU(num_classes, ignore_label)

    def update(self, label, maps, source: str):
        """Add one image.

        Args:
            label: (H, W) array of class ids.
            maps: (K, H, W); the class with the highest value is the prediction.
            source: file of the label map, for error messages.
        """
        prediction = maps.argmax(0).cpu().numpy()
        self.regions.update(label, prediction, source)
        self.boundaries.update(label, prediction)

    def row(self, name: str) -> dict:
        return {
            f"{name}, mIoU": compute_metrics(self.regions.counts).miou,
            f"{name}, boundary mIoU": self.boundaries.mean(),
        }


@torch.no_grad()
def measure(network, samples, ignore_label: int) -> list:
    """Evaluate the samples once for each entry of ROWS; returns one row each. The network is left unchanged."""
    qualities = {name: [Quality(network.num_classes, ignore_label) for _ in range(2)] for name in ROWS}
    for sample in samples:
        label = read_label(sample["sem_seg_file_name"])
        image = sample["image"][None].to(network.device, torch.float32)
        for name, off in ROWS.items():
            with switched_off(network.alignment, off):
                prediction = network.predict(image)
            # -1, the lowest cosine, for classes that were not selected: (1, K, H/4, W/4) -> (1, K, H, W)
            similarity = prediction.scatter_to_all_classes(prediction.pixel_text.float(), fill=-1.0)
            similarity = upsample_to_image(similarity, image.shape[2:])
            for quality, maps in zip(qualities[name], (prediction.dense(), similarity)):
                maps = resize_maps(maps, (sample["height"], sample["width"]))[0]
                quality.update(label, maps, sample["sem_seg_file_name"])
    return [
        {"network": name} | probabilities.row("probabilities") | similarity.row("pixel-text similarity")
        for name, (probabilities, similarity) in qualities.items()
    ]


@contextlib.contextmanager
def switched_off(module, attributes):
    """Set these attributes of the module to False within the block."""
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name in attributes:
            setattr(module, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def run(args):
    cfg = trained.read_config(args.config_file, args.opts)
    if not cfg.MODEL.CMSAM.ENABLED:
        raise UserError("MODEL.CMSAM.ENABLED must be True: this tool measures CMSAM's alignment maps.")
    trained.output_folder(args, cfg, "alignment.json")
    network = trained.load(cfg, args.model)
    samples, table = trained.samples(cfg)
    rows = measure(network, samples, table.ignore_label)
    print(tabulate(rows, headers="keys", floatfmt=".2f", tablefmt="github"))
    trained.save(args, cfg, "alignment.json", {"rows": rows})


def parse_args(argv=None):
    parser = trained.parser(__doc__)
    parser.add_argument("--output", default="output/alignment", help="folder for alignment.json (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
