"""timm models as backbones.

Supported are all models that offer `features_only` with strides 4, 8, 16 and 32 (ResNet, ConvNeXt, Swin, MobileNet...),
and plain ViTs (DINOv2, DINOv3, EVA-02...), which get a simple feature pyramid.
"""

import os
from functools import lru_cache

import timm
import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

from ...checkpoint import load_strictly
from ...download import check_answers, check_hub, local_weights, reason_of
from ...errors import UserError
from .feature_pyramid import STRIDES, SimpleFeaturePyramid, crop_to_patches

_NAMES = {stride: name for name, stride in STRIDES.items()}
_PLAIN_VIT_MODULES = ("vision_transformer", "eva")  # modules of timm; DINOv3 is in eva


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """timm model that returns res2..res5.

    Args:
        name: timm model name, with or without a pretrained tag.
        pretrained: load timm's weights, from `weights` if that is set and from timm's hub otherwise.
        weights: weights file or URL. With `pretrained`, a file published by timm; otherwise a state dict of the
            `features_only` model. "" for no file.
        drop_path: stochastic depth rate.
    Raises:
        UserError: an unknown name, a model without the four strides, or weights that are unavailable or do not fit.
    """

    @configurable
    def __init__(self, *, name: str, pretrained: bool = False, weights: str = "", drop_path: float = 0.0):
        super().__init__()
        _check_name(name)
        if weights:
            weights = local_weights(weights, "MODEL.BACKBONE.WEIGHTS")
        options = {"drop_path_rate": drop_path} if drop_path else {}
        is_vit = name.split(".")[0] in _plain_vits()
        if is_vit:
            options.update(dynamic_img_size=True, out_indices=(-1,))
        self.body = _create(name, pretrained, weights, options)
        self._reductions, channels = self.body.feature_info.reduction(), self.body.feature_info.channels()
        self.pyramid = SimpleFeaturePyramid(channels[0], self._reductions[0]) if is_vit else None
        self._stages = {_NAMES[r]: i for i, r in enumerate(self._reductions) if r in _NAMES}
        if not is_vit and len(self._stages) != len(_NAMES):
            raise UserError(
                f"MODEL.BACKBONE.TIMM.NAME: {name} has features at strides {self._reductions}; choose a model with "
                "strides 4, 8, 16 and 32, or a plain ViT."
            )
        if weights and not pretrained:
            load_strictly(self.body, weights, "MODEL.BACKBONE.WEIGHTS")
        if is_vit:
            self._shape = self.pyramid.output_shape()
        else:
            self._shape = {
                stage: ShapeSpec(channels=channels[i], stride=self._reductions[i]) for stage, i in self._stages.items()
            }
        # Swin and related models return (B, h, w, C).
        self._channels_last = str(getattr(self.body, "output_fmt", "")).endswith("NHWC")

    @classmethod
    def from_config(cls, cfg, input_shape):
        options = cfg.MODEL.BACKBONE.TIMM
        return {
            "name": options.NAME,
            "pretrained": options.PRETRAINED,
            "drop_path": options.DROP_PATH,
            "weights": cfg.MODEL.BACKBONE.WEIGHTS,
        }

    @property
    def skips_padding(self) -> bool:
        return self.pyramid is not None

    def forward(self, image, size=None):
        """(B, 3, H, W) -> dict of (B, C, H/stride, W/stride). For `size`, of a ViT, see crop_to_patches."""
        if self.pyramid is not None:
            (last_map,) = self.body(crop_to_patches(image, size, self._reductions[0]))
            return self.pyramid(last_map, image.shape[-2:])
        outputs = self.body(image)
        if self._channels_last:
            outputs = [x.permute(0, 3, 1, 2).contiguous() for x in outputs]
        return {stage: outputs[i] for stage, i in self._stages.items()}

    def checkpoint_activations(self):
        """Compute the activations of the blocks again in the backward pass instead of keeping them.

        Raises:
            UserError: timm cannot do it for this model.
        """
        model = getattr(self.body, "model", self.body)  # a ViT is wrapped once more
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise UserError(
                f"SOLVER.ACTIVATION_CHECKPOINTING: timm cannot do it for {type(model).__name__}; take backbone out of "
                "the list."
            ) from None

    def output_shape(self):
        return dict(self._shape)


@lru_cache
def _plain_vits():
    """Names of all plain ViTs in timm."""
    return {name for module in _PLAIN_VIT_MODULES for name in timm.list_models(module=module)}


def _check_name(name):
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.split('.')[0][:6]}*")[:5]
        raise UserError(
            f"MODEL.BACKBONE.TIMM.NAME: timm has no model {name!r}; similar: {', '.join(similar) or 'none'}."
        )


def _create(name, pretrained, weights, options):
    """The `features_only` model, with timm's weights if `pretrained`."""
    if pretrained and weights:
        options["pretrained_cfg_overlay"] = {"file": weights}
    if pretrained and not weights:
        _check_source(name)
    try:
        if pretrained and weights:
            # With features_only, timm silently skips weights that do not fit. Loading the whole model checks them.
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": weights})
        return timm.create_model(name, features_only=True, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            raise
        reason = " ".join(str(error).split())[:150]
        if weights:
            raise UserError(
                f"{weights}: does not contain timm's weights of {name} ({reason}; MODEL.BACKBONE.WEIGHTS with "
                "MODEL.BACKBONE.TIMM.PRETRAINED True)."
            ) from error
        raise _no_download(name, reason) from error


def _check_source(name):
    """timm's hub client retries for minutes where there is no network."""
    source = timm.get_pretrained_cfg(name, allow_unregistered=False)
    try:
        if source and source.hf_hub_id:
            check_hub(source.hf_hub_id)
        elif source and source.url and not _is_cached(source.url):
            check_answers(source.url)
    except OSError as error:
        raise _no_download(name, reason_of(error)) from error


def _is_cached(url):
    """Whether torch.hub, which timm fetches addresses with, has a file."""
    return os.path.exists(os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url)))


def _no_download(name, reason):
    return UserError(
        f"MODEL.BACKBONE.TIMM: the weights of {name} could not be downloaded ({reason}); download timm's file "
        "on another machine and set MODEL.BACKBONE.WEIGHTS to it, or train from scratch with "
        "MODEL.BACKBONE.TIMM.PRETRAINED False."
    )
