"""The networks that the parts build, with random weights, and what they are trained on."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import open_clip
import torch
from detectron2.modeling import build_model

from hiervl.config import load_config
from hiervl.losses.regularizers import TeacherView
from hiervl.modeling.backbones import clip_model
from tools.benchmark.models import make_inputs

from .findings import ROOT, Settings

_FROM_FILE = ("MODEL.TEXT.EMBEDDINGS", "hiervl/data/tables/voc_clip_vit_b16.npz", "MODEL.TEXT.DEFINITIONS", "")
_UNTRAINED = ("MODEL.WEIGHTS", "", "MODEL.BACKBONE.WEIGHTS", "", "MODEL.BACKBONE.TIMM.PRETRAINED", False)


@dataclass(frozen=True)
class Network:
    """A config of the repository without its weights.

    Attributes:
        config: file in configs/. size: side of the image. overrides: KEY VALUE pairs.
        small_backbone: KEY VALUE pairs of one of the same kind that a CPU builds at once.
    """

    config: str
    size: int
    overrides: tuple = ()
    small_backbone: tuple = ()


_SMALL_VIT = ("MODEL.BACKBONE.TIMM.NAME", "vit_tiny_patch16_224")
NETWORKS = {
    "shapes": Network("shapes.yaml", 64),
    "CamVid": Network("camvid_23.yaml", 256),
    "R50": Network("voc_92_r50.yaml", 512, _FROM_FILE),
    "CLIP ViT-B/16": Network("voc_92.yaml", 512, _FROM_FILE, ("MODEL.BACKBONE.CLIP.MODEL", "ViT-S-32-alt")),
    "DINOv2 ViT-B/14": Network("voc_92_dinov2.yaml", 518, _FROM_FILE, _SMALL_VIT),
    "DINOv2 ViT-S/14": Network(
        "voc_92_dinov2.yaml",
        518,
        (*_FROM_FILE, "MODEL.BACKBONE.TIMM.NAME", "vit_small_patch14_dinov2.lvd142m"),
        _SMALL_VIT,
    ),
}
TINY = (
    "MODEL.PIXEL_DECODER.CONV_DIM", 32, "MODEL.PIXEL_DECODER.MASK_DIM", 32, "MODEL.PIXEL_DECODER.ENC_LAYERS", 1,
    "MODEL.PIXEL_DECODER.FEEDFORWARD_DIM", 64, "MODEL.DECODER.HIDDEN_DIM", 32, "MODEL.DECODER.NUM_LAYERS", 3,
    "MODEL.DECODER.NUM_QUERIES", 20, "MODEL.DECODER.FEEDFORWARD_DIM", 64, "MODEL.CRITERION.NUM_POINTS", 256,
)  # fmt: skip
TINY_SIZE = 64


def config(name: str, settings: Settings, *overrides):
    """The config of a network, on the device of the check, and tiny on a CPU."""
    network = NETWORKS[name]
    small = (*network.small_backbone, *TINY) if settings.tiny else ()
    device = ("MODEL.DEVICE", settings.device)
    everything = [*device, *_UNTRAINED, *network.overrides, *small, *overrides]
    return load_config(str(ROOT / "configs" / network.config), everything)


def image_size(name: str, settings: Settings) -> int:
    """Side of the images that a network is timed with."""
    return TINY_SIZE if settings.tiny else NETWORKS[name].size


def build(cfg) -> torch.nn.Module:
    """The network; the same weights on any device."""
    torch.manual_seed(0)
    with untrained_clip():
        return build_model(cfg)


@torch.no_grad()
def leave_pixel_centers(network: torch.nn.Module) -> None:
    """Add noise to the places at which deformable attention samples.

    Training starts with places at pixel centers, where bilinear interpolation has a kink: rounding decides which side's
    gradient they get, and no two devices agree.
    """
    random = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        if "sampling_offsets" in name:
            parameter += 0.1 * torch.randn(parameter.shape, generator=random).to(parameter.device)


@contextlib.contextmanager
def untrained_clip() -> Iterator[None]:
    """Within it, CLIP's towers have random weights, which need no download."""

    def make(model: str, pretrained: str, key: str) -> torch.nn.Module:
        known = open_clip.get_model_config(f"{model}-quickgelu") is not None  # as OpenAI's weights need
        network = open_clip.create_model(f"{model}-quickgelu" if known else model)
        return network.eval().requires_grad_(False)

    with mock.patch.object(clip_model, "load_clip", make):
        yield


def training_inputs(labeled: int, pseudo: int, size: int, model: torch.nn.Module) -> list[dict]:
    """Images of noise, with labels or with pseudo-labels of random weight; on the CPU."""
    classes = model.num_classes
    inputs = make_inputs(labeled + pseudo, size, classes)
    random = torch.Generator().manual_seed(1)
    for i, x in enumerate(inputs[labeled:]):
        weight = (torch.rand(size, size, generator=random) < 0.7).float()
        x |= {"pseudo": True, "weight": weight, "image_weight": weight.mean(), "padded": False}
        x |= {"valid": torch.ones(size, size, dtype=torch.bool), "feature_dropout": 0.5 * (i % 2)}
        x["unknown"] = torch.rand(classes, generator=random) < 0.2
        if model.query_generator is not None:
            x["teacher"] = TeacherView(
                pixel_text=torch.rand(classes, -(-size // 4), -(-size // 4), generator=random),
                index=torch.arange(classes),
                valid=x["valid"],
                relevance=torch.rand(classes, generator=random),
                mixed=False,
            )
    return inputs


def on_device(value, device):
    """A copy of nested lists, dicts and dataclasses with their tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: on_device(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [on_device(item, device) for item in value]
    if dataclasses.is_dataclass(value):
        return type(value)(*(on_device(getattr(value, f.name), device) for f in dataclasses.fields(value)))
    return value


@contextlib.contextmanager
def drawn_on_the_cpu() -> Iterator[None]:
    """Within it, points and dropout are drawn on the CPU, so that they are the same on every device."""
    bernoulli = torch.bernoulli

    def on_cpu(draw):
        return lambda *shape, device="cpu", **options: draw(*shape, **options).to(device)

    with mock.patch.multiple(
        torch,
        rand=on_cpu(torch.rand),
        randint=on_cpu(torch.randint),
        bernoulli=lambda share: bernoulli(share.cpu()).to(share.device),
    ):
        yield


def losses_and_gradients(model: torch.nn.Module, network: torch.nn.Module, inputs: list[dict]) -> tuple[dict, dict]:
    """A training step up to the update, with draws that depend on nothing.

    Args:
        model: what is called, such as a distributed wrapper of `network`.
    Returns:
        {"labeled/loss_mask": number, ...}, and {parameter: gradient in float64 on the CPU}.
    """
    network.train()
    network.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with drawn_on_the_cpu():
        batch = network.prepare_batch(on_device(inputs, network.device))
        losses = model(batch, network.normalizers(batch))
    flat = {f"{kind}/{name}": value for kind, of_kind in losses.items() for name, value in of_kind.items()}
    sum(flat.values()).backward()
    gradients = {name: p.grad.double().cpu() for name, p in network.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in flat.items()}, gradients
