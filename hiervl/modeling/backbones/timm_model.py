"""Any timm model that offers `features_only` with strides 4, 8, 16 and 32 (ResNet, ConvNeXt, Swin, MobileNet...), and
plain ViTs (DINOv2, DINOv3, EVA-02...) through a simple feature pyramid."""

from functools import lru_cache

import timm
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

from ...checkpoint import load_strictly
from ...errors import UserError
from .feature_pyramid import STRIDES, SimpleFeaturePyramid, pad_to_patches

_NAMES = {stride: name for name, stride in STRIDES.items()}
_PLAIN_VITS = ("vision_transformer", "eva")  # timm's modules; DINOv3 is in eva


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """
    Args:
        name: a timm model name, with or without a pretrained tag.
        pretrained: load timm's weights, from its hub or from `weights`, a file that timm published.
        weights: without `pretrained` the path of a state dict of the `features_only` model.
        drop_path: stochastic depth rate.
    Raises:
        UserError: an unknown name, a model without the four strides, weights that cannot be had.
    """

    @configurable
    def __init__(self, *, name: str, pretrained: bool = False, weights: str = "", drop_path: float = 0.0):
        super().__init__()
        _check_name(name)
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
                f"MODEL.BACKBONE.TIMM.NAME: {name} has features at strides {self._reductions}; "
                "HierVL needs 4, 8, 16 and 32, or a plain ViT."
            )
        if weights and not pretrained:
            load_strictly(self.body, weights, "MODEL.BACKBONE.WEIGHTS")
        self._shape = (
            self.pyramid.output_shape()
            if is_vit
            else {
                stage: ShapeSpec(channels=channels[i], stride=self._reductions[i]) for stage, i in self._stages.items()
            }
        )
        # Swin and its relatives give (B, H, W, C).
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

    def forward(self, image):
        """(B, 3, H, W) -> dict of (B, C, H/stride, W/stride)."""
        if self.pyramid is not None:
            (last,) = self.body(pad_to_patches(image, self._reductions[0]))
            return self.pyramid(last, image.shape[-2:])
        outputs = self.body(image)
        if self._channels_last:
            outputs = [x.permute(0, 3, 1, 2).contiguous() for x in outputs]
        return {stage: outputs[i] for stage, i in self._stages.items()}

    def output_shape(self):
        return dict(self._shape)


@lru_cache
def _plain_vits():
    return {name for module in _PLAIN_VITS for name in timm.list_models(module=module)}


def _check_name(name):
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:6]}*")[:5]
        raise UserError(f"MODEL.BACKBONE.TIMM.NAME: timm has no model {name!r}; similar: {', '.join(near) or 'none'}.")


def _create(name, pretrained, weights, options):
    if pretrained and weights:
        options["pretrained_cfg_overlay"] = {"file": weights}
    try:
        if pretrained and weights:  # features_only loads what fits, silent about the rest; the whole model is strict
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": weights})
        return timm.create_model(name, features_only=True, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            raise
        reason = " ".join(str(error).split())[:150]
        if weights:
            raise UserError(
                f"{weights}: does not hold timm's weights of {name} ({reason}; MODEL.BACKBONE.WEIGHTS with "
                "MODEL.BACKBONE.TIMM.PRETRAINED True)."
            ) from error
        raise UserError(
            f"MODEL.BACKBONE.TIMM: weights of {name} could not be downloaded ({reason}); fetch timm's file "
            "elsewhere and name it in MODEL.BACKBONE.WEIGHTS."
        ) from error
