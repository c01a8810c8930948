"""Small networks and training inputs that several tests build on."""

import torch

from hiervl.modeling.backbones import TimmBackbone
from hiervl.modeling.classifier import LinearClassifier, TextClassifier
from hiervl.losses.criterion import Criterion
from hiervl.modeling.dual_query_decoder import QueryDecoder
from hiervl.modeling.inference import InferenceProtocol
from hiervl.losses.matcher import HungarianMatcher
from hiervl.modeling.meta_arch import HierVL
from hiervl.modeling.pixel_decoder import PixelDecoder
from hiervl.modeling.query_generator import QueryGenerator
from hiervl.losses.regularizers import Regularizers, TeacherView
from hiervl.losses.targets import TargetBuilder
from hiervl.modeling.spatial_alignment import SpatialAlignment
from hiervl.modeling.text import ClassText

DIM, TEXT_DIM = 32, 16
WEIGHTS = {
    "language": 0.1,
    "vision_language": 1.0,
    "relevance": 1.0,
    "diversity": 0.1,
    "contrastive": 0.1,
    "vision": 0.1,
    "consistency": 1.0,
}


def make_network(classes=4, kind="text", embeddings=None, top_k=48, weights=None, **changes):
    """kind: "linear" (Mask2Former's head), "text", or "hiervl" (with the language modules)."""
    torch.manual_seed(0)
    backbone = changes.get("backbone") or TimmBackbone(name="lcnet_050")
    vectors = torch.randn(classes, TEXT_DIM) if embeddings is None else embeddings
    head = LinearClassifier(DIM, classes) if kind == "linear" else TextClassifier(DIM, vectors.shape[1])
    options = {
        "backbone": backbone,
        "class_names": [f"class {k}" for k in range(len(vectors))],
        "text": None if kind == "linear" else ClassText(vectors, adapter=kind == "hiervl"),
        "pixel_decoder": PixelDecoder(
            backbone.output_shape(),
            conv_dim=DIM,
            mask_dim=DIM,
            num_layers=1,
            num_heads=4,
            num_points=2,
            feedforward_dim=32,
            text_dim=vectors.shape[1] if kind == "hiervl" else 0,
        ),
        "decoder": QueryDecoder(
            memory_dim=DIM,
            mask_dim=DIM,
            hidden_dim=DIM,
            num_queries=6,
            num_heads=4,
            num_layers=3,
            feedforward_dim=32,
            classifier=head,
            semantic=kind == "hiervl",
        ),
        "criterion": Criterion(
            matcher=HungarianMatcher(2.0, 5.0, 5.0),
            class_weight=2.0,
            mask_weight=5.0,
            dice_weight=5.0,
            pixel_weight=2.0,
            presence_weight=2.0,
            no_object_weight=0.1,
            num_points=100,
            oversample_ratio=3.0,
            importance_ratio=0.75,
            deep_supervision=True,
        ),
        "pixel_mean": [120.0] * 3,
        "pixel_std": [60.0] * 3,
        "size_divisibility": 32,
        "target_builder": TargetBuilder(
            segments="class_regions",
            min_area=4,
            max_segments=3,
            max_classes=top_k if kind == "hiervl" else None,
            size_divisibility=32,
        ),
        "protocol": InferenceProtocol(),
    }
    if kind == "hiervl":
        res5 = backbone.output_shape()["res5"].channels
        options |= {
            "query_generator": QueryGenerator(
                feature_dim=res5, text_dim=vectors.shape[1], hidden_dim=DIM, top_k=top_k, min_relevance=0.05
            ),
            "alignment": SpatialAlignment(dim=DIM, memory_dim=DIM),
            "regularizers": Regularizers(
                backbone, weights=WEIGHTS if weights is None else weights, boundary_weight=1.0, boundary_width=2
            ),
        }
    return HierVL(**options | changes)


def training_input(size=64, classes=4, **extra):
    return {
        "image": torch.randint(0, 256, (3, size, size), dtype=torch.uint8),
        "sem_seg": torch.randint(0, classes, (size, size)),
        **extra,
    }


def pseudo_input(classes=4, share=0.5, teacher=False, **extra):
    view = TeacherView(
        pixel_text=torch.rand(classes, 16, 16),
        index=torch.arange(classes),
        valid=torch.ones(64, 64, dtype=torch.bool),
        relevance=torch.rand(classes),
        mixed=False,
    )
    return training_input(
        classes=classes,
        weight=torch.ones(64, 64),
        pseudo=True,
        image_weight=torch.tensor(share),
        unknown=torch.zeros(classes, dtype=torch.bool),
        **({"teacher": view} if teacher else {}),
        **extra,
    )


def flatten_losses(losses):
    """{"labeled": {"loss_mask": ...}, "pseudo": ...} -> {"labeled/loss_mask": ..., "pseudo/loss_mask": ...}."""
    return {f"{kind}/{name}": value for kind, of_kind in losses.items() for name, value in of_kind.items()}


def activations_and_gradients(backbone, image):
    """Number of values that the forward pass keeps for the backward pass, and the gradients of all parameters."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = sum(value.square().mean() for value in backbone(image).values())
    backbone.zero_grad()
    loss.backward()
    return sum(kept), {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
