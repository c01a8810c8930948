"""The networks that the benchmarks time, and the reference they are compared with.

The reference is the same network, the way Mask2Former runs on a CPU: deformable attention through grid_sample, the
masks of all queries made at full size after every decoder layer and resampled to the size of the attention, one cost
matrix and one transfer to the host for each image and layer, and at inference all query masks brought to the size of
the image before they become class scores. "grid_sample" is the network as it is but for deformable attention (and the
matcher, in training): what the kernel brings by itself. What else was made cheaper (docs/PERFORMANCE.md) is in all.
"""

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from tools.benchmark import common
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from scipy.optimize import linear_sum_assignment

from hiervl.config import load_config
from hiervl.losses.matcher import Matches
from hiervl.ops.function import reference_path
from hiervl.semi.solver import build_optimizer

ROOT = Path(__file__).resolve().parents[2]
TEXT_DIM = 512
LANGUAGE_OFF = ("MODEL.HSQG.ENABLED", False, "MODEL.CMSAM.ENABLED", False, "MODEL.DECODER.SEMANTIC", False)
# name: (config file, classes, side of the image, images, overrides). All with random weights.
NETWORKS = {
    "Mask2Former-R50": ("Base-HierVL.yaml", 21, 512, 1, (*LANGUAGE_OFF, "MODEL.DECODER.CLASSIFIER", "linear")),
    "HierVL-R50": ("Base-HierVL.yaml", 21, 512, 1, ()),
    "camvid_23": ("camvid_23.yaml", 11, 256, 4, ("MODEL.BACKBONE.WEIGHTS", "")),
}
COMPARED = ("Mask2Former-R50", "camvid_23")  # with the reference path


class PerImageMatcher:
    """Mask2Former's way: for each image and layer one cost matrix, moved to the host and solved there.

    Same arguments and result as the `matcher` whose weights it takes.
    """

    def __init__(self, matcher):
        self.class_weight, self.mask_weight, self.dice_weight = (
            matcher.class_weight, matcher.mask_weight, matcher.dice_weight)  # fmt: skip

    @torch.no_grad()
    def __call__(self, class_logits, mask_logits, segments, weight, labels):
        pairs, counts = [], []
        for image, classes in enumerate(labels):
            before = len(pairs)
            for layer in range(len(class_logits)):
                cost = self._cost(
                    class_logits[layer, image], mask_logits[layer, image], segments[image], weight[image], classes
                )
                matched = zip(*linear_sum_assignment(cost.cpu().numpy()))
                pairs += [(layer, image, query, segment) for query, segment in matched]
            counts.append(len(pairs) - before)
        table = torch.tensor(pairs, dtype=torch.long).view(-1, 4).to(class_logits.device)
        return Matches(*table.unbind(1), counts=counts)

    def _cost(self, class_logits, mask_logits, segments, weight, classes):
        """(N, K+1), (N, P), (P,), (P,), (M,) -> (N, M)."""
        masks = (segments[None] == torch.arange(len(classes), device=segments.device)[:, None]).float()
        one = F.binary_cross_entropy_with_logits(mask_logits, torch.ones_like(mask_logits), reduction="none")
        zero = F.binary_cross_entropy_with_logits(mask_logits, torch.zeros_like(mask_logits), reduction="none")
        cross_entropy = torch.einsum("np,mp->nm", one * weight, masks)
        cross_entropy = cross_entropy + torch.einsum("np,mp->nm", zero * weight, 1 - masks)
        probability = mask_logits.sigmoid() * weight
        overlap = 2 * torch.einsum("np,mp->nm", probability, masks)
        dice = 1 - (overlap + 1) / (probability.sum(-1)[:, None] + (masks * weight).sum(-1)[None] + 1)
        return (
            -self.class_weight * class_logits.softmax(-1)[:, classes]
            + self.mask_weight * cross_entropy / weight.sum().clamp(min=1e-6)
            + self.dice_weight * dice
        )


@contextlib.contextmanager
def full_size_masks(decoder: torch.nn.Module) -> Iterator[None]:
    """Within it the decoder's attention masks are made at full size and resampled."""
    make_tokens = decoder._tokens

    def tokens(memory, mask_features):
        *rest, small = make_tokens(memory, mask_features)
        return *rest, [(mask_features, x.shape[-2:]) for x in small]

    @torch.no_grad()
    def visible(embed, source, semantic=None):
        mask_features, size = source
        masks = torch.einsum("bnc,bchw->bnhw", embed, mask_features)
        inside = F.interpolate(masks, size=size, mode="bilinear", align_corners=False).flatten(2) >= 0
        return inside | ~inside.any(dim=2, keepdim=True)

    with mock.patch.multiple(decoder, _tokens=tokens, _attention_mask=visible):
        yield


class Bench:
    """One network with an optimizer and a batch, and its ways to take a step and to predict.

    Args:
        network: a key of NETWORKS. classes, size, batch: other than there. overrides: more KEY VALUE pairs.
    """

    def __init__(self, network: str, *, classes=None, size=None, batch=None, overrides=()):
        file, own_classes, own_size, own_batch, fixed = NETWORKS[network]
        self.classes, self.size = classes or own_classes, size or own_size
        names = [f"class {k}" for k in range(self.classes)]
        dataset = f"benchmark_{self.classes}"
        MetadataCatalog.get(dataset).stuff_classes = names
        torch.manual_seed(0)
        with text_file(names) as text:
            base = ("MODEL.DEVICE", "cpu", "DATASETS.TRAIN", (dataset,), "MODEL.TEXT.EMBEDDINGS", text)
            self.cfg = load_config(str(ROOT / "configs" / file), [*base, *fixed, *overrides])
            self.model = build_model(self.cfg)
        self.optimizer = build_optimizer(self.cfg, self.model)
        self.inputs = make_inputs(batch or own_batch, self.size, self.classes)
        self.images = torch.stack([x["image"] for x in self.inputs]).float()

    def loss(self) -> torch.Tensor:
        """Sum of the losses of the batch, of every kind of image."""
        return sum(value for of_kind in self.model(self.inputs).values() for value in of_kind.values())

    def step(self) -> None:
        """A training step on labeled images: losses, gradients, clipping, AdamW."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.SOLVER.CLIP_NORM)
        self.optimizer.step()

    def grid_sample_step(self) -> None:
        """The same step with the grid_sample path and the matcher per image and layer."""
        criterion = self.model.criterion
        with mock.patch.object(criterion, "matcher", PerImageMatcher(criterion.matcher)), reference_path():
            self.step()

    def reference_step(self) -> None:
        """The same step on the reference path."""
        with full_size_masks(self.model.decoder):
            self.grid_sample_step()

    @torch.no_grad()
    def predict(self) -> torch.Tensor:
        """Class probabilities of the first image: (1, K, H, W)."""
        return self.model.eval().predict(self.images[:1])

    def predict_bfloat16(self) -> torch.Tensor:
        """The same under autocast."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.predict()

    @torch.no_grad()
    def grid_sample_predict(self) -> torch.Tensor:
        """Class scores of the first image, of query masks at the image's size: (K, H, W)."""
        model = self.model.eval()
        with reference_path():
            output = model.inference_forward(self.images[:1])
            last = output.layers[-1]
            masks = F.interpolate(last.mask_logits(output.mask_features), scale_factor=4, mode="bilinear")
        height, width = self.images.shape[-2:]
        masks = masks[0, :, :height, :width].sigmoid()  # (N, H, W)
        return torch.einsum("nk,nhw->khw", last.class_logits[0].softmax(-1)[:, :-1], masks)

    def reference_predict(self) -> torch.Tensor:
        """The same on the reference path."""
        with full_size_masks(self.model.decoder):
            return self.grid_sample_predict()


@contextlib.contextmanager
def text_file(names: list[str]) -> Iterator[str]:
    """An embeddings file with random vectors for `names`: the time does not depend on what they say."""
    vectors = np.random.default_rng(0).normal(size=(len(names), TEXT_DIM)).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "names.npz"
        np.savez(path, names=np.array(names), embeddings=vectors)
        yield str(path)


def make_inputs(batch: int, size: int, classes: int) -> list[dict]:
    """Labeled images of noise; label maps of 16 tiles, of at most 16 classes."""
    random = torch.Generator().manual_seed(0)
    inputs, tile = [], -(-size // 4)
    for _ in range(batch):
        image = torch.randint(0, 256, (3, size, size), generator=random, dtype=torch.uint8)
        tiles = torch.randint(0, classes, (4, 4), generator=random)
        label = tiles.repeat_interleave(tile, 0).repeat_interleave(tile, 1)[:size, :size]
        inputs.append({"image": image, "sem_seg": label.contiguous()})
    return inputs


@contextlib.contextmanager
def stage_marks(model: torch.nn.Module, mark: Callable[[], object]) -> Iterator[list[tuple[str, object, object]]]:
    """A list that gets (name, mark before, mark after) of each forward pass of each child of the network.

    Args:
        mark: a clock, or a function that records an event of a GPU.
    """
    marks, started, handles = [], {}, []

    def before(name: str, *_):
        started[name] = mark()

    def after(name: str, *_):
        marks.append((name, started[name], mark()))

    for name, child in model.named_children():
        handles.append(child.register_forward_pre_hook(functools.partial(before, name)))
        handles.append(child.register_forward_hook(functools.partial(after, name)))
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def stage_times(model: torch.nn.Module, times: dict[str, float]) -> Iterator[None]:
    """Add up in `times`, at the end of the block, the seconds that each child of the network took forward."""
    with stage_marks(model, time.perf_counter) as marks:
        yield
    for name, before, after in marks:
        times[name] = times.get(name, 0.0) + after - before


def peak_memory(network: str, call: str) -> dict[str, float]:
    """Megabytes of a process that builds a network and runs `Bench.<call>` twice; Linux only.

    Returns:
        before: resident when it was built; peak: the most that was resident.
    """
    bench = Bench(network)
    run: Callable[[], object] = getattr(bench, call)
    before = common.resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(2):
        run()
    return {"before": before, "peak": common.resident("VmHWM")}
