"""How well the alignment maps of a trained network fit outlines, and what CMSAM's parts are worth to it as it stands.

    python -m tools.analysis.measure_alignment --config-file configs/camvid_23_hiervl.yaml \
        --opts MODEL.WEIGHTS output/camvid_23_hiervl/model_final.pth

Evaluates the class probabilities and the pixel-text similarity (a pixel's class is the most similar one) by mIoU
and boundary IoU: with the network as it is, with its maps upsampled bilinearly instead of along the edges of the mask
features, and without the flows between pixels and queries. No weight is trained anew: the rows tell what the trained
network makes of these parts, not what another would have become without them. Whole images of the first set of
DATASETS.TEST.
"""

import contextlib
import sys

import torch
from tabulate import tabulate
from hiervl.data.images import read_label
from hiervl.errors import UserError, exit_status
from hiervl.evaluation import BoundaryIoU, ConfusionMatrix
from hiervl.evaluation.confusion import compute_metrics
from hiervl.modeling.inference import upsample_to_image, resize_maps
from tools.analysis import trained

# Attributes of SpatialAlignment that a row switches off.
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
        """label: (H, W) array. maps: (K, H, W), highest where the class is. source: what to name in an error."""
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
    """One row per entry of ROWS; the network is left as it was."""
    found = {name: [Quality(network.num_classes, ignore_label) for _ in range(2)] for name in ROWS}
    for sample in samples:
        label = read_label(sample["sem_seg_file_name"])
        image = sample["image"][None].to(network.device, torch.float32)
        for name, off in ROWS.items():
            with switched_off(network.alignment, off):
                said = network.predict(image)
            pixel_text = upsample_to_image(
                said.scatter_to_all_classes(said.pixel_text.float(), fill=-1.0), image.shape[2:]
            )
            for quality, maps in zip(found[name], (said.dense(), pixel_text)):
                maps = resize_maps(maps, (sample["height"], sample["width"]))[0]
                quality.update(label, maps, sample["sem_seg_file_name"])
    return [
        {"network": name} | probabilities.row("probabilities") | similarity.row("pixel-text similarity")
        for name, (probabilities, similarity) in found.items()
    ]


@contextlib.contextmanager
def switched_off(module, attributes):
    """Meanwhile the attributes of the module are False."""
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
        raise UserError("MODEL.CMSAM.ENABLED must be True: its alignment maps are what is measured.")
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
