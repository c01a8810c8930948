"""Peak memory of the largest semi-supervised step, and what lowers it: micro-batches, activation checkpointing, TOP_K.

Each row is a process of its own. On a CPU the peak is what is resident; activations take the same memory on a GPU.
"""

import argparse
import tempfile

import torch
from detectron2.data import MetadataCatalog

from hiervl.config import load_config
from hiervl.semi.memory import LargestStep
from hiervl.semi.trainer import SemiSupervisedTrainer
from tools.benchmark import common
from tools.benchmark.models import ROOT, text_file

NAMES, TOP_K = 1000, 48
CHECKPOINTED = ("backbone", "pixel_decoder", "decoder")
# voc_92.yaml with a ViT-B/16 of random weights: 8 labeled images and three views of 8 unlabeled ones.
VOC_92 = (
    *("MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.BACKBONE.TIMM.NAME", "vit_base_patch16_clip_224"),
    *("MODEL.BACKBONE.CLIP.PRETRAINED", "", "SOLVER.AMP.ENABLED", False),
)
CASES = {  # name -> (classes, overrides)
    "all 32 images at once": (21, ()),
    "ACCUMULATE 4: 8 at once": (21, ("SOLVER.ACCUMULATE", 4)),
    "ACCUMULATE 8: 4 at once": (21, ("SOLVER.ACCUMULATE", 8)),
    "ACCUMULATE 32: one by one": (21, ("SOLVER.ACCUMULATE", 32)),
    "all at once, checkpointed": (21, ("SOLVER.ACTIVATION_CHECKPOINTING", CHECKPOINTED)),
    "ACCUMULATE 4, checkpointed": (21, ("SOLVER.ACCUMULATE", 4, "SOLVER.ACTIVATION_CHECKPOINTING", CHECKPOINTED)),
    f"ACCUMULATE 4, {TOP_K} classes": (TOP_K, ("SOLVER.ACCUMULATE", 4)),
    f"ACCUMULATE 4, {NAMES} classes, TOP_K {TOP_K}": (NAMES, ("SOLVER.ACCUMULATE", 4)),
}


def add_arguments(parser) -> None:
    parser.add_argument("--crop", type=int, default=128, help="side of the training crops in pixels (512 in voc_92)")


def peak_of(crop: int, classes: int, overrides: tuple) -> dict[str, float]:
    """Gigabytes of this process with the network built, and at the peak of the largest step."""
    dataset, names = f"benchmark_{classes}", [f"class {k}" for k in range(classes)]
    MetadataCatalog.get(dataset).stuff_classes = names
    torch.manual_seed(0)
    with text_file(names) as text, tempfile.TemporaryDirectory() as folder:
        base = ("MODEL.DEVICE", "cpu", "DATASETS.TRAIN", (dataset,), "MODEL.TEXT.EMBEDDINGS", text)
        points = 12544 * crop**2 // 512**2  # of the masks, whose memory is to shrink as that of the crops does
        options = ("INPUT.CROP_SIZE", (crop, crop), "MODEL.CRITERION.NUM_POINTS", points, "MODEL.HSQG.TOP_K", TOP_K)
        cfg = load_config(
            str(ROOT / "configs" / "voc_92.yaml"), [*base, *VOC_92, *options, "OUTPUT_DIR", folder, *overrides]
        )
        trainer = SemiSupervisedTrainer(cfg)
        trainer.model.train()
        built = common.resident("VmRSS")
        peak = LargestStep.from_config(cfg, trainer).peak(trainer.accumulate)
    return {"network GB": built / 1024, "peak GB": peak / 2**30}


def run(options: argparse.Namespace) -> tuple[dict[str, list[dict]], dict]:
    """The table, and the facts about the machine."""
    rows = []
    for name, (classes, overrides) in CASES.items():
        row = {"step": name} | common.in_new_process(peak_of, options.crop, classes, overrides)
        rows.append(row | {"activations GB": row["peak GB"] - row["network GB"]})
    first = rows[0]["activations GB"]
    rows = [row | {"activations / first row": row["activations GB"] / first} for row in rows]
    return {f"voc_92, ViT-B/16, crops of {options.crop}, float32": rows}, {"torch": torch.__version__}
