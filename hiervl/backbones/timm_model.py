"""Any timm model that offers `features_only` with strides 4, 8, 16 and 32 (ResNet, ConvNeXt, Swin, MobileNet...)."""
import timm
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

from ..checkpoint import load_strictly
from ..errors import UserError

_NAMES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """
    Args:
        name: a timm model name, with or without a pretrained tag.
        pretrained: load timm's weights (from its hub, or from `weights` when that is given).
        weights: path of a state dict of the `features_only` model.
        drop_path: stochastic depth rate.
    Raises:
        UserError: an unknown name, a model without the four strides, weights that cannot be had.
    """

    @configurable
    def __init__(self, *, name: str, pretrained: bool = False, weights: str = "", drop_path: float = 0.0):
        super().__init__()
        options = {"drop_path_rate": drop_path} if drop_path else {}
        self.body = _create(name, pretrained and not weights, options)
        reductions = self.body.feature_info.reduction()
        self._stages = {_NAMES[r]: i for i, r in enumerate(reductions) if r in _NAMES}
        if len(self._stages) != len(_NAMES):
            raise UserError(f"MODEL.BACKBONE.TIMM.NAME: {name} has features at strides {reductions}; "
                            "HierVL needs 4, 8, 16 and 32.")
        if weights:
            load_strictly(self.body, weights, "MODEL.BACKBONE.WEIGHTS")
        channels = self.body.feature_info.channels()
        self._shape = {stage: ShapeSpec(channels=channels[i], stride=reductions[i])
                       for stage, i in self._stages.items()}
        # Swin and its relatives give (B, H, W, C).
        self._channels_last = str(getattr(self.body, "output_fmt", "")).endswith("NHWC")

    @classmethod
    def from_config(cls, cfg, input_shape):
        options = cfg.MODEL.BACKBONE.TIMM
        return {"name": options.NAME, "pretrained": options.PRETRAINED, "drop_path": options.DROP_PATH,
                "weights": cfg.MODEL.BACKBONE.WEIGHTS}

    def forward(self, image):
        """(B, 3, H, W) -> dict of (B, C, H/stride, W/stride)."""
        outputs = self.body(image)
        if self._channels_last:
            outputs = [x.permute(0, 3, 1, 2).contiguous() for x in outputs]
        return {stage: outputs[i] for stage, i in self._stages.items()}

    def output_shape(self):
        return dict(self._shape)


def _create(name, pretrained, options):
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:6]}*")[:5]
        raise UserError(f"MODEL.BACKBONE.TIMM.NAME: timm has no model {name!r}; similar: {', '.join(near) or 'none'}.")
    try:
        return timm.create_model(name, features_only=True, pretrained=pretrained, **options)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise UserError(f"MODEL.BACKBONE.TIMM: weights of {name} could not be downloaded "
                        f"({type(error).__name__}); fetch them elsewhere and name the file in "
                        "MODEL.BACKBONE.WEIGHTS.") from error
