"""Draw the figures of docs/how-it-works.md: what each module of a trained network computes for one image.

    python -m tools.analysis.draw_method --config-file configs/camvid_23_hiervl.yaml --image 40 --name camvid \
        --opts MODEL.WEIGHTS output/camvid_23_hiervl/model_final.pth

Writes NAME_relevance.jpg, NAME_alignment.jpg, NAME_scores.jpg, NAME_queries.jpg and NAME_prediction.jpg to --output.
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

from hiervl.data.datasets import dataset_index
from hiervl.data.images import read_label
from hiervl.data.mapper import TestMapper
from hiervl.errors import UserError, exit_status
from hiervl.modeling import meta_arch
from hiervl.modeling.text.word_lists import read_lines
from tools.analysis import trained

matplotlib.use("Agg")  # draws without a display; must precede the import of pyplot
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

NUM_EXAMPLES = 4  # classes in the figures that show a selection of them
NUM_DISTRACTORS = 12  # in the relevance chart: the most relevant ones
SCALES = "coarse, stride 32", "middle, stride 16", "fine, stride 8"
# Bar colors: classes in the image or not, other words seen in training or not.
PRESENT, ABSENT, SEEN_WORD, UNSEEN_WORD = "#1f6fb4", "#9ec5e8", "#d9843b", "#8a63b0"


@dataclass
class ImageResult:
    """What the network computes for one image of H x W pixels and a list of names.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        label: (H, W), class ids.
        output: of the network, for a batch of this one image.
        names: of the K' selected classes, in the order of the output.
        colors: (K + 1, 3) uint8, the last one for ignored pixels.
    """

    network: torch.nn.Module
    image: np.ndarray
    label: np.ndarray
    output: meta_arch.NetworkOutput
    names: list
    colors: np.ndarray

    @classmethod
    def compute(cls, network, sample, colors, names) -> "ImageResult":
        """Run the network on a sample of TestMapper with `names` as its classes."""
        network.set_classes(names)
        image = sample["image"][None].to(network.device, torch.float32)  # (1, 3, H, W)
        with torch.no_grad():
            output = network.inference_forward(image)
        label = read_label(sample["sem_seg_file_name"])
        selected_names = [names[k] for k in output.selected.index[0]]
        return cls(network, sample["image"].permute(1, 2, 0).numpy(), label, output, selected_names, colors)

    @property
    def relevance(self) -> torch.Tensor:
        """(K',) relevance of the selected classes."""
        return self.output.selected.relevance[0]

    def class_id(self, k: int) -> int:
        """Position of selected class k in the list of names, which is its id in the label map."""
        return int(self.output.selected.index[0, k])

    def region(self, k: int) -> np.ndarray:
        """(H, W) bool, the pixels labeled as selected class k."""
        return self.label == self.class_id(k)

    def area(self, k: int) -> float:
        """Fraction of the image's pixels that are labeled as selected class k."""
        return float(self.region(k).mean())

    def upsample(self, maps: torch.Tensor, smooth: bool = False) -> np.ndarray:
        """Bring maps (C, h, w) of the padded image to the image's size (C, H, W)."""
        height, width = self.image.shape[:2]
        multiple = self.network.size_divisibility
        padded = (height + -height % multiple, width + -width % multiple)
        mode = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest"}
        return F.interpolate(maps[None], size=padded, **mode)[0, :, :height, :width].cpu().numpy()

    def colorize(self, selected_label: np.ndarray) -> np.ndarray:
        """(H, W) indices of selected classes -> (H, W, 3) class colors."""
        return self.colors[self.output.selected.index[0].cpu().numpy()[selected_label]]

    def colorized_label(self) -> np.ndarray:
        """(H, W, 3) class colors of the label map."""
        return self.colors[np.minimum(self.label, len(self.colors) - 1)]


def choose_examples(result: ImageResult) -> list:
    """Indices of up to NUM_EXAMPLES selected classes in the image, evenly spaced from the largest to the smallest."""
    present = (k for k in range(len(result.names)) if result.area(k) > 0.002)
    order = sorted(present, key=result.area, reverse=True)
    return [order[i] for i in np.linspace(0, len(order) - 1, min(NUM_EXAMPLES, len(order))).round().astype(int)]


def draw_relevance(network, sample, colors, words, threshold):
    """HSQG's chart: relevance of the classes and of the most relevant distractors among `words`."""
    class_names = network.class_names
    num_classes, names = len(class_names), [*class_names, *words]
    result = ImageResult.compute(network, sample, colors, names)
    relevance = result.output.selected.logits[0].sigmoid().cpu().numpy()  # (V,)
    selected = set(result.output.selected.index[0][result.relevance > 0].tolist())
    classes = sorted(range(num_classes), key=lambda k: -relevance[k])
    distractors = sorted(range(num_classes, len(relevance)), key=lambda k: -relevance[k])[:NUM_DISTRACTORS]
    bars = [*classes, *distractors]
    present = set(np.unique(result.label).tolist())

    def bar_color(k: int) -> str:
        if k < num_classes:
            return PRESENT if k in present else ABSENT
        return SEEN_WORD if names[k] in network.trained_names else UNSEEN_WORD

    bar_colors = [bar_color(k) for k in bars]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(0.17 * len(bars) + 0.6, 3.2)), width_ratios=(1, 1.05))
    figure.subplots_adjust(left=0.01, right=0.985, top=0.98, bottom=0.45 / figure.get_figheight(), wspace=0.36)
    show(left, result.image)
    right.barh(
        range(len(bars)),
        relevance[bars],
        height=0.75,
        color=bar_colors,
        edgecolor="white",
        linewidth=0,
        hatch=["" if k in selected else "////" for k in bars],
    )
    right.axvline(threshold, color="black", linewidth=0.8, linestyle="--")
    bar_labels = [names[k] + ("" if k in selected else " (not selected)") for k in bars]
    right.set_yticks(range(len(bars)), bar_labels, fontsize=8)
    right.set_ylim(len(bars) - 0.4, -0.6)
    right.set_xlim(0, 1)
    right.set_xlabel(f"relevance; dashed: MIN_RELEVANCE {threshold:g}", fontsize=8)
    right.tick_params(axis="x", labelsize=8)
    right.spines[["top", "right"]].set_visible(False)
    legend = {
        "class, in the image": PRESENT,
        "class, not in the image": ABSENT,
        "other word, seen in training": SEEN_WORD,
        "other word, not seen in training": UNSEEN_WORD,
    }
    right.legend(
        handles=[Patch(color=color, label=label) for label, color in legend.items() if color in bar_colors],
        title=f"{num_classes} classes, {len(distractors)} most relevant of {len(words)} other words",
        title_fontsize=8,
        alignment="left",
        fontsize=8,
        loc="lower right",
        frameon=False,
    )
    network.set_classes(class_names)
    return figure


def draw_alignment(result: ImageResult):
    """CMSAM's alignment maps (cosines) of some classes at the three scales."""
    examples = choose_examples(result)
    figure, axes = grid(result, len(examples), 1 + len(SCALES), right=0.92)
    maps = [result.upsample(scale[0]) for scale in result.output.aligned.maps]  # each (K', H, W)
    limit = max(float(np.abs(scale[examples]).max()) for scale in maps)
    for row, k in zip(axes, examples):
        show(row[0], highlight_region(result, k))
        row[0].set_ylabel(result.names[k], fontsize=9)
        for axis, scale in zip(row[1:], maps):
            mappable = axis.imshow(scale[k], cmap="RdBu_r", vmin=-limit, vmax=limit)
    for axis, title in zip(axes[0], ("image, true region", *SCALES)):
        axis.set_title(title, fontsize=8)
    color_bar = figure.add_axes((0.93, 0.1, 0.012, 0.8))
    figure.colorbar(mappable, cax=color_bar).ax.tick_params(labelsize=7)
    return figure


def draw_similarity(result: ImageResult):
    """The pixel-text similarity without and with guided upsampling: one class, and the most similar class per pixel."""
    alignment, output = result.network.alignment, result.output
    guided, alignment.guided_upsampling = alignment.guided_upsampling, False
    with torch.no_grad():
        memory = memory_before_alignment(result)
        bilinear = alignment(output.selected, memory, output.mask_features).similarity[0]  # (K', H/4, W/4)
    alignment.guided_upsampling = guided
    k = choose_examples(result)[-1]
    figure, axes = grid(result, 2, 3)
    pair = [result.upsample(similarity) for similarity in (bilinear, output.aligned.similarity[0])]
    limit = max(float(np.abs(similarity[k]).max()) for similarity in pair)
    show(axes[0, 0], highlight_region(result, k), "detail of the image, true region")
    zoom(axes[0, 0], result.region(k))
    show(axes[1, 0], result.colorized_label(), "true classes")
    for column, (similarity, title) in enumerate(zip(pair, ("bilinear", "guided by M")), 1):
        axes[0, column].imshow(similarity[k], cmap="RdBu_r", vmin=-limit, vmax=limit)
        zoom(axes[0, column], result.region(k))
        axes[0, column].set_title(f"similarity to {result.names[k]}, {title}", fontsize=8)
        show(axes[1, column], result.colorize(similarity.argmax(0)), f"most similar class, {title}")
    return figure


def memory_before_alignment(result: ImageResult) -> list:
    """F1..F3 before CMSAM, which the network's output does not contain."""
    with torch.no_grad():
        return result.network.pixel_decoder(result.output.features, result.output.selected.text)[0]


def draw_queries(result: ImageResult):
    """Masks of both sets: three scales of some semantic queries, and the most confident instance queries."""
    last, mask_features = result.output.layers[-1], result.output.mask_features
    semantic_masks = last.semantic_mask_logits(mask_features)[0].sigmoid()  # (E, K', h, w)
    presence = last.presence_logits[0].sigmoid()  # (E, K')
    figure, axes = grid(result, 5, NUM_EXAMPLES, blank=True)
    for column, k in enumerate(choose_examples(result)):
        for e, axis in enumerate(axes[:3, column]):
            mask = result.upsample(semantic_masks[e, k : k + 1], smooth=True)[0]
            show(axis, mask, f"{result.names[k]}, presence {presence[e, k]:.2f}", cmap="magma")
    for axis, title in zip(axes[:3, 0], SCALES):
        axis.set_ylabel(f"semantic\n{title.split(',')[0]}", fontsize=8)
    confidence, classes = last.class_logits[0].softmax(1)[:, :-1].max(1)  # (N,), without "no object"
    masks = last.mask_logits(mask_features)[0].sigmoid()  # (N, h, w)
    for axis, n in zip(axes[3:].flat, most_confident_queries(confidence, classes, masks)):
        mask = result.upsample(masks[n : n + 1], smooth=True)[0]
        show(axis, mask, f"query {n}: {result.names[classes[n]]} {confidence[n]:.2f}", cmap="magma")
    axes[3, 0].set_ylabel("instance", fontsize=8)
    axes[4, 0].set_ylabel("instance", fontsize=8)
    return figure


def most_confident_queries(confidence, classes, masks) -> list:
    """Up to 2 * NUM_EXAMPLES instance queries with a non-empty mask: first the best one of each class, then the rest.

    Args:
        confidence, classes: (N,) the best class of each query and its probability. masks: (N, h, w) probabilities.
    """
    nonempty = (n for n in range(len(confidence)) if masks[n].max() > 0.5)
    order = sorted(nonempty, key=lambda n: -float(confidence[n]))
    best_of_class = [n for i, n in enumerate(order) if classes[n] not in classes[order[:i]]]
    rest = [n for n in order if n not in best_of_class]
    return [*best_of_class, *rest][: 2 * NUM_EXAMPLES]


def draw_prediction(result: ImageResult):
    """From the class scores of each set of queries to probabilities."""
    last, mask_features, score_head = result.output.layers[-1], result.output.mask_features, result.network.scores
    relevance = result.output.selected.relevance
    with torch.no_grad():
        both = last.class_scores(mask_features, score_head, relevance)  # (1, K', h, w)
        # Without the semantic set: (1, N, K'+1) and (1, N, h * w) -> (1, K', h * w)
        flat = score_head(last.class_logits, last.mask_logits(mask_features).flatten(2), relevance=relevance)
        instance = flat.unflatten(2, mask_features.shape[2:])  # (1, K', h, w)
        semantic = both - instance
        probability = result.upsample(score_head.normalize(both)[0], smooth=True)  # (K', H, W)
    prediction = probability.argmax(0)
    figure, axes = grid(result, 2, 3)
    show(axes[0, 0], result.image, "image")
    for axis, scores, title in ((axes[0, 1], semantic, "semantic set"), (axes[0, 2], instance, "instance set")):
        show(axis, result.colorize(result.upsample(scores[0], smooth=True).argmax(0)), f"class scores: {title}")
    show(axes[1, 0], result.colorized_label(), "true classes (black: ignored)")
    show(axes[1, 1], result.colorize(prediction), "prediction: both sets")
    show(axes[1, 2], probability.max(0), "probability of the predicted class, 0 to 1", cmap="magma")
    named = [(k, name) for k, name in enumerate(result.names) if max((prediction == k).mean(), result.area(k)) > 0.001]
    colors = result.colors[result.output.selected.index[0].cpu().numpy()] / 255
    figure.legend(
        handles=[Patch(color=colors[k], label=name) for k, name in named],
        ncols=min(len(named), 6),
        fontsize=8,
        loc="lower center",
        frameon=False,
    )
    legend_height = 0.1 + 0.2 * -(-len(named) // 6)  # inches
    total_height = figure.get_figheight() + legend_height
    figure.set_figheight(total_height)
    figure.subplots_adjust(bottom=legend_height / total_height, top=1 - 0.24 / total_height)
    return figure


def grid(result: ImageResult, rows, columns, right=1.0, blank=False):
    """A figure with rows x columns axes without ticks, in the image's proportions; `blank`: also without frames."""
    height, width = result.image.shape[:2]
    figure_width = min(11, 8 * width / height)  # inches
    size = figure_width, rows * (figure_width * right / columns * height / width * 0.93 + 0.22)
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
    """Show only the surroundings of the largest connected part of a region (H, W) bool."""
    _, _, stats, centers = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    center = centers[1 + stats[1:, cv2.CC_STAT_AREA].argmax()]  # (x, y); component 0 is the background

    def limits(middle, size):
        start = np.clip(middle - size / factor / 2, 0, size - size / factor) - 0.5
        return start, start + size / factor

    height, width = region.shape
    axis.set_xlim(*limits(center[0], width))
    axis.set_ylim(*reversed(limits(center[1], height)))  # y points down in images


def highlight_region(result: ImageResult, k) -> np.ndarray:
    """The image, faded outside the true region of selected class k: (H, W, 3)."""
    faded = 178 + (0.3 * result.image).astype(np.uint8)
    return np.where(result.region(k)[..., None], result.image, faded)


def save(figure, path):
    try:
        figure.savefig(path, dpi=86, pil_kwargs={"quality": 74, "optimize": True})
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); choose another folder with --output."
        ) from None
    plt.close(figure)
    print(f"{path}: {os.path.getsize(path) / 1e3:.0f} kB")


def run(args):
    cfg = trained.read_config(args.config_file, args.opts)
    if not (cfg.MODEL.HSQG.ENABLED and cfg.MODEL.CMSAM.ENABLED and cfg.MODEL.DECODER.SEMANTIC):
        raise UserError(
            "MODEL.HSQG.ENABLED, MODEL.CMSAM.ENABLED and MODEL.DECODER.SEMANTIC must be True to draw these modules."
        )
    network = trained.load(cfg, args.model)
    dataset = cfg.DATASETS.TEST[0]
    index = dataset_index(dataset, cfg.DATASETS.SPLIT_ROOT)
    if not 0 <= args.image < len(index):
        raise UserError(f"--image {args.image}: {dataset} has images 0 to {len(index) - 1}.")
    sample = TestMapper(cfg)(index[args.image])
    words = network.text.distractors()[0]
    if args.unseen:
        words = list(dict.fromkeys([*words, *read_lines(args.unseen, "--unseen")]))
    colors = np.array([*MetadataCatalog.get(dataset).stuff_colors, (0, 0, 0)], np.uint8)
    os.makedirs(args.output, exist_ok=True)
    relevance = draw_relevance(network, sample, colors, words, cfg.MODEL.HSQG.MIN_RELEVANCE)
    result = ImageResult.compute(network, sample, colors, network.class_names)
    with torch.no_grad():
        figures = {
            "relevance": relevance,
            "alignment": draw_alignment(result),
            "scores": draw_similarity(result),
            "queries": draw_queries(result),
            "prediction": draw_prediction(result),
        }
    for name, figure in figures.items():
        if name in args.figures:
            save(figure, os.path.join(args.output, f"{args.name}_{name}.jpg"))


def parse_args(argv=None):
    parser = trained.parser(__doc__)
    parser.add_argument(
        "--image", type=int, default=0, help="index in the first dataset of DATASETS.TEST (%(default)s)"
    )
    parser.add_argument("--unseen", default="", help="file with additional distractors for the relevance chart")
    parser.add_argument(
        "--figures",
        nargs="+",
        default=["relevance", "alignment", "scores", "queries", "prediction"],
        help="which figures to write (all)",
    )
    parser.add_argument("--name", default="method", help="prefix of the file names (%(default)s)")
    parser.add_argument("--output", default="docs/figures", help="folder for the figures (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return exit_status(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
