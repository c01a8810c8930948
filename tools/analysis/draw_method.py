"""The figures of docs/how-it-works.md: what each module of a trained network makes of one image.

    python -m tools.analysis.draw_method --config-file configs/camvid_23_hiervl.yaml --image 40 --name camvid \
        --opts MODEL.WEIGHTS output/camvid_23_hiervl/model_final.pth

Writes NAME_relevance.jpg, NAME_alignment.jpg, NAME_scores.jpg, NAME_queries.jpg and NAME_prediction.jpg into --output.
"""

import os
import sys
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from hiervl.modeling import meta_arch
from hiervl.data.datasets import dataset_index
from hiervl.data.images import read_label
from hiervl.data.mapper import TestMapper
from hiervl.errors import UserError, exit_status
from hiervl.modeling.text.word_lists import read_lines
from tools.analysis import trained

SHOWN = 4  # classes in the figures that show some of them
DISTRACTORS = 12  # the most relevant ones, in the chart
SCALES = "coarse, stride 32", "middle, stride 16", "fine, stride 8"
PRESENT, ABSENT, KNOWN, NEW = "#1f6fb4", "#9ec5e8", "#d9843b", "#8a63b0"


@dataclass
class Seen:
    """What the network makes of one image of H x W pixels with a list of names.

    Attributes:
        image: (H, W, 3) uint8. label: (H, W), ids of the classes. output: the network's Output.
        names: of the K' kept words, in the output's order. colors: (K + 1, 3) uint8, the last one for ignored pixels.
    """

    network: torch.nn.Module
    image: np.ndarray
    label: np.ndarray
    output: meta_arch.NetworkOutput
    names: list
    colors: np.ndarray

    @classmethod
    def inference_forward(cls, network, sample, colors, names) -> "Seen":
        network.set_classes(names)
        image = sample["image"][None].to(network.device, torch.float32)
        with torch.no_grad():
            output = network.inference_forward(image)
        label = read_label(sample["sem_seg_file_name"])
        return cls(
            network,
            sample["image"].permute(1, 2, 0).numpy(),
            label,
            output,
            [names[k] for k in output.selected.index[0]],
            colors,
        )

    @property
    def relevance(self):
        return self.output.selected.relevance[0]

    def full(self, maps, smooth=False) -> np.ndarray:
        """Maps (C, h, w) of the padded image -> (C, H, W)."""
        height, width = self.image.shape[:2]
        multiple = self.network.size_divisibility
        padded = (height + -height % multiple, width + -width % multiple)
        how = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest"}
        return F.interpolate(maps[None], size=padded, **how)[0, :, :height, :width].cpu().numpy()

    def paint(self, kept_label) -> np.ndarray:
        """(H, W) positions among the kept words -> (H, W, 3) in the classes' colors."""
        return self.colors[self.output.selected.index[0].cpu().numpy()[kept_label]]

    def truth(self) -> np.ndarray:
        return self.colors[np.minimum(self.label, len(self.colors) - 1)]

    def share(self, k) -> float:
        """Of the image's pixels, those whose label is kept word k."""
        return float((self.label == int(self.output.selected.index[0, k])).mean())


def choose(seen: Seen, count: int) -> list:
    """Positions of kept words that the image shows, from the largest region to a small one."""
    order = sorted((k for k in range(len(seen.names)) if seen.share(k) > 0.002), key=seen.share, reverse=True)
    return [order[i] for i in np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]


def draw_relevance(network, sample, colors, words, threshold):
    """The chart of HSQG: relevance of the classes and of the most relevant distractors among all `words`."""
    class_names = network.class_names
    seen = Seen.inference_forward(network, sample, colors, [*class_names, *words])
    relevance = seen.output.selected.logits[0].sigmoid().cpu().numpy()
    kept = set(seen.output.selected.index[0][seen.relevance > 0].tolist())
    num = len(class_names)
    classes = sorted(range(num), key=lambda k: -relevance[k])
    others = sorted(range(num, len(relevance)), key=lambda k: -relevance[k])[:DISTRACTORS]
    bars = [*classes, *others]
    present = set(np.unique(seen.label).tolist())
    labels = [*class_names, *words]
    colors = [
        PRESENT if k in present else ABSENT if k < num else KNOWN if labels[k] in network.trained_names else NEW
        for k in bars
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(0.17 * len(bars) + 0.6, 3.2)), width_ratios=(1, 1.05))
    figure.subplots_adjust(left=0.01, right=0.985, top=0.98, bottom=0.45 / figure.get_figheight(), wspace=0.36)
    show(left, seen.image)
    right.barh(
        range(len(bars)),
        relevance[bars],
        height=0.75,
        color=colors,
        edgecolor="white",
        linewidth=0,
        hatch=["" if k in kept else "////" for k in bars],
    )
    right.axvline(threshold, color="black", linewidth=0.8, linestyle="--")
    right.set_yticks(range(len(bars)), [labels[k] + ("" if k in kept else " (not kept)") for k in bars], fontsize=8)
    right.set_ylim(len(bars) - 0.4, -0.6)
    right.set_xlim(0, 1)
    right.set_xlabel(f"relevance; dashed: MIN_RELEVANCE {threshold:g}", fontsize=8)
    right.tick_params(axis="x", labelsize=8)
    right.spines[["top", "right"]].set_visible(False)
    legend = {
        "class, in the image": PRESENT,
        "class, not in the image": ABSENT,
        "other word, seen in training": KNOWN,
        "other word, not seen in training": NEW,
    }
    right.legend(
        handles=[Patch(color=color, label=label) for label, color in legend.items() if color in colors],
        title=f"{len(class_names)} classes, {len(others)} most relevant of {len(words)} other words",
        title_fontsize=8,
        alignment="left",
        fontsize=8,
        loc="lower right",
        frameon=False,
    )
    network.set_classes(class_names)
    return figure


def draw_alignment(seen: Seen):
    """CMSAM's cosines of some classes at the three scales."""
    shown = choose(seen, SHOWN)
    figure, axes = grid(seen, len(shown), 1 + len(SCALES), right=0.92)
    maps = [seen.full(m[0]) for m in seen.output.aligned.maps]
    limit = max(float(np.abs(m[shown]).max()) for m in maps)
    for row, k in zip(axes, shown):
        show(row[0], outlined(seen, k))
        row[0].set_ylabel(seen.names[k], fontsize=9)
        for axis, m in zip(row[1:], maps):
            mappable = axis.imshow(m[k], cmap="RdBu_r", vmin=-limit, vmax=limit)
    for axis, title in zip(axes[0], ("image, true region", *SCALES)):
        axis.set_title(title, fontsize=8)
    bar = figure.add_axes((0.93, 0.1, 0.012, 0.8))
    figure.colorbar(mappable, cax=bar).ax.tick_params(labelsize=7)
    return figure


def draw_scores(seen: Seen):
    """The pixel-text similarity without and with guidance: one class, and the best class of each position."""
    alignment, output = seen.network.alignment, seen.output
    # What the maps alone give: the module's own sum, upsampled bilinearly.
    alignment.guided_upsampling, guided = False, alignment.guided_upsampling
    with torch.no_grad():
        plain = alignment(output.selected, memory_before(seen), output.mask_features).similarity[0]
    alignment.guided_upsampling = guided
    k = choose(seen, SHOWN)[-1]
    figure, axes = grid(seen, 2, 3)
    pair = [seen.full(scores) for scores in (plain, output.aligned.similarity[0])]
    limit = max(float(np.abs(m[k]).max()) for m in pair)
    show(axes[0, 0], outlined(seen, k), "a part of the image, true region")
    zoom(axes[0, 0], seen.label == int(output.selected.index[0, k]))
    show(axes[1, 0], seen.truth(), "true classes")
    for column, (scores, title) in enumerate(zip(pair, ("bilinear", "guided by M")), 1):
        axes[0, column].imshow(scores[k], cmap="RdBu_r", vmin=-limit, vmax=limit)
        zoom(axes[0, column], seen.label == int(output.selected.index[0, k]))
        axes[0, column].set_title(f"score of {seen.names[k]}, {title}", fontsize=8)
        show(axes[1, column], seen.paint(scores.argmax(0)), f"class of the best score, {title}")
    return figure


def memory_before(seen: Seen) -> list:
    """F1..F3 before CMSAM, which the network's output does not hold."""
    with torch.no_grad():
        return seen.network.pixel_decoder(seen.output.features, seen.output.selected.text)[0]


def draw_queries(seen: Seen):
    """Masks of both sets: three scales of some classes, and the surest instance queries."""
    last, features = seen.output.layers[-1], seen.output.mask_features
    regions = last.semantic_mask_logits(features)[0].sigmoid()  # (E, K', h, w)
    presence = last.presence_logits[0].sigmoid()  # (E, K')
    shown = choose(seen, SHOWN)
    figure, axes = grid(seen, 5, SHOWN, blank=True)
    for column, k in enumerate(shown):
        for e, axis in enumerate(axes[:3, column]):
            show(
                axis,
                seen.full(regions[e, k : k + 1], smooth=True)[0],
                f"{seen.names[k]}, presence {presence[e, k]:.2f}",
                cmap="magma",
            )
    for axis, title in zip(axes[:3, 0], SCALES):
        axis.set_ylabel(f"semantic\n{title.split(',')[0]}", fontsize=8)
    certain, kind = last.class_logits[0].softmax(1)[:, :-1].max(1)
    masks = last.mask_logits(features)[0].sigmoid()
    for axis, n in zip(axes[3:].flat, surest(certain, kind, masks)):
        show(
            axis,
            seen.full(masks[n : n + 1], smooth=True)[0],
            f"query {n}: {seen.names[kind[n]]} {certain[n]:.2f}",
            cmap="magma",
        )
    axes[3, 0].set_ylabel("instance", fontsize=8)
    axes[4, 0].set_ylabel("instance", fontsize=8)
    return figure


def surest(certain, kind, masks) -> list:
    """Instance queries that hold a region, the surest one of each class first."""
    order = sorted((n for n in range(len(certain)) if masks[n].max() > 0.5), key=lambda n: -float(certain[n]))
    first = [n for i, n in enumerate(order) if kind[n] not in kind[order[:i]]]
    return [*first, *(n for n in order if n not in first)][: 2 * SHOWN]


def draw_prediction(seen: Seen):
    """From the class scores of each set to probabilities."""
    last, features, scores = seen.output.layers[-1], seen.output.mask_features, seen.network.scores
    relevance = seen.output.selected.relevance
    with torch.no_grad():
        both = last.class_scores(features, scores, relevance)
        flat = scores(last.class_logits, last.mask_logits(features).flatten(2), relevance=relevance)
        instance = flat.unflatten(2, features.shape[2:])
        probability = seen.full(scores.normalize(both)[0], smooth=True)
    label = probability.argmax(0)
    figure, axes = grid(seen, 2, 3)
    show(axes[0, 0], seen.image, "image")
    show(axes[0, 1], seen.paint(seen.full((both - instance)[0], smooth=True).argmax(0)), "class scores: semantic set")
    show(axes[0, 2], seen.paint(seen.full(instance[0], smooth=True).argmax(0)), "class scores: instance set")
    show(axes[1, 0], seen.truth(), "true classes (black: ignored)")
    show(axes[1, 1], seen.paint(label), "prediction: both sets")
    show(axes[1, 2], probability.max(0), "probability of the predicted class, 0 to 1", cmap="magma")
    named = [(k, name) for k, name in enumerate(seen.names) if max((label == k).mean(), seen.share(k)) > 0.001]
    colors = seen.colors[seen.output.selected.index[0].cpu().numpy()] / 255
    figure.legend(
        handles=[Patch(color=colors[k], label=name) for k, name in named],
        ncols=min(len(named), 6),
        fontsize=8,
        loc="lower center",
        frameon=False,
    )
    legend = 0.1 + 0.2 * -(-len(named) // 6)  # inches
    whole = figure.get_figheight() + legend
    figure.set_figheight(whole)
    figure.subplots_adjust(bottom=legend / whole, top=1 - 0.24 / whole)
    return figure


def grid(seen: Seen, rows, columns, right=1.0, blank=False):
    """Axes without ticks in the image's proportions; `blank`: also without a frame."""
    height, width = seen.image.shape[:2]
    across = min(11, 8 * width / height)  # inches
    size = across, rows * (across * right / columns * height / width * 0.93 + 0.22)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    figure.subplots_adjust(
        left=0.035,
        right=right - 0.005,
        bottom=0.01,
        top=1 - 0.24 / figure.get_figheight(),
        wspace=0.02,
        hspace=0.13 if rows > 1 else 0,
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        if blank:
            axis.set_frame_on(False)
    return figure, axes


def show(axis, image, title="", cmap=None):
    axis.imshow(image, cmap=cmap, **({"vmin": 0, "vmax": 1} if cmap else {}))
    axis.set_xticks([])
    axis.set_yticks([])
    if title:
        axis.set_title(title, fontsize=8)


def zoom(axis, region, factor=2.5):
    """Show only the surroundings of the largest part of a region (H, W) bool."""
    _, _, stats, centers = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    middle = centers[1 + stats[1:, cv2.CC_STAT_AREA].argmax()]
    for set_limits, center, full in zip((axis.set_xlim, axis.set_ylim), middle, region.shape[::-1]):
        start = np.clip(center - full / factor / 2, 0, full - full / factor) - 0.5
        limits = (start, start + full / factor)
        set_limits(*(limits if set_limits == axis.set_xlim else limits[::-1]))


def outlined(seen: Seen, k) -> np.ndarray:
    """The image, faded outside the true region of kept word k."""
    inside = seen.label == int(seen.output.selected.index[0, k])
    return np.where(inside[..., None], seen.image, 178 + (0.3 * seen.image).astype(np.uint8))


def save(figure, path):
    try:
        figure.savefig(path, dpi=86, pil_kwargs={"quality": 74, "optimize": True})
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}; --output).") from None
    plt.close(figure)
    print(f"{path}: {os.path.getsize(path) / 1e3:.0f} kB")


def run(args):
    cfg = trained.read_config(args.config_file, args.opts)
    if not (cfg.MODEL.HSQG.ENABLED and cfg.MODEL.CMSAM.ENABLED and cfg.MODEL.DECODER.SEMANTIC):
        raise UserError(
            "MODEL.HSQG.ENABLED, MODEL.CMSAM.ENABLED and MODEL.DECODER.SEMANTIC must be True: they are what is drawn."
        )
    network = trained.load(cfg, args.model)
    part = cfg.DATASETS.TEST[0]
    index = dataset_index(part, cfg.DATASETS.SPLIT_ROOT)
    if not 0 <= args.image < len(index):
        raise UserError(f"--image {args.image}: {part} has the images 0 to {len(index) - 1}.")
    sample = TestMapper(cfg)(index[args.image])
    words = network.text.distractors()[0]
    if args.unseen:
        words = list(dict.fromkeys([*words, *read_lines(args.unseen, "--unseen")]))
    colors = np.array([*MetadataCatalog.get(part).stuff_colors, (0, 0, 0)], np.uint8)
    os.makedirs(args.output, exist_ok=True)
    relevance = draw_relevance(network, sample, colors, words, cfg.MODEL.HSQG.MIN_RELEVANCE)
    seen = Seen.inference_forward(network, sample, colors, network.class_names)
    with torch.no_grad():
        figures = {
            "relevance": relevance,
            "alignment": draw_alignment(seen),
            "scores": draw_scores(seen),
            "queries": draw_queries(seen),
            "prediction": draw_prediction(seen),
        }
    for name, figure in figures.items():
        if name in args.figures:
            save(figure, os.path.join(args.output, f"{args.name}_{name}.jpg"))


def parse_args(argv=None):
    parser = trained.parser(__doc__)
    parser.add_argument("--image", type=int, default=0, help="which of the first set of DATASETS.TEST (%(default)s)")
    parser.add_argument("--unseen", default="", help="file with further words that are no class, for the chart")
    parser.add_argument(
        "--figures",
        nargs="+",
        default=["relevance", "alignment", "scores", "queries", "prediction"],
        help="which ones to write (all)",
    )
    parser.add_argument("--name", default="method", help="what the files' names begin with (%(default)s)")
    parser.add_argument("--output", default="docs/figures", help="folder for the figures (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
