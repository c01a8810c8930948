"""CLIP's image towers as backbones, through open_clip: ViTs with a simple feature pyramid, ResNets and ConvNeXts as
they are. Besides res2..res5 they give dense embeddings in the text space (`dense_text_features`).

CLIP was trained with other colors than ImageNet's networks: MODEL.PIXEL_MEAN [122.771, 116.746, 104.094],
MODEL.PIXEL_STD [68.501, 66.632, 70.323]. Sizes that are no multiple of the patch: see feature_pyramid.py.
"""

import logging

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

from ..clip import load_clip
from .clip_towers import ViTTower, build_tower
from .feature_pyramid import STRIDES, SimpleFeaturePyramid

logger = logging.getLogger(__name__)


@BACKBONE_REGISTRY.register()
class CLIPBackbone(Backbone):
    """
    Args:
        visual: open_clip's image tower. name: the model's name, for errors.
        drop_path: stochastic depth rate of the last block.
    Raises:
        UserError: a tower of another architecture, a drop path where there is none.
    """

    @configurable
    def __init__(self, visual, *, name: str = "the model", drop_path: float = 0.0):
        super().__init__()
        self.tower = build_tower(visual, name, drop_path)
        self.pyramid = None
        if isinstance(self.tower, ViTTower):
            self.pyramid = SimpleFeaturePyramid(self.tower.channels[0], self.tower.patch)

    @classmethod
    def from_config(cls, cfg, input_shape):
        options = cfg.MODEL.BACKBONE.CLIP
        network = load_clip(options.MODEL, options.PRETRAINED, "MODEL.BACKBONE.CLIP")
        _compare_colors(cfg.MODEL, network.visual)
        return {"visual": network.visual, "name": options.MODEL, "drop_path": options.DROP_PATH}

    @property
    def dense_stride(self) -> int:
        """Pixels per cell of the dense embeddings: 16 for ViTs, 32 for the others."""
        return self.tower.dense_stride

    def forward(self, image):
        """(B, 3, H, W) -> dict of (B, C, H/stride, W/stride)."""
        return self._features(self.tower(image)[0], image)

    def dense_text_features(self, image):
        """(B, 3, H, W) -> embeddings in the text space, (B, Dt, H/dense_stride, W/dense_stride) of unit length.

        For ViTs the last block's value path (MaskCLIP): every patch speaks for itself.
        """
        return self.tower(image, maps=False, dense=True)[1]

    def output_shape(self):
        if self.pyramid is not None:
            return self.pyramid.output_shape()
        return {
            name: ShapeSpec(channels=channels, stride=STRIDES[name])
            for name, channels in zip(STRIDES, self.tower.channels)
        }

    def _features(self, maps, image):
        return self.pyramid(maps[0], image.shape[-2:]) if self.pyramid is not None else dict(zip(STRIDES, maps))


def _compare_colors(model_options, visual):
    for key, own in (("PIXEL_MEAN", visual.image_mean), ("PIXEL_STD", visual.image_std)):
        trained = [round(255 * value, 3) for value in own]
        if max(abs(a - b) for a, b in zip(model_options[key], trained)) > 0.5:
            logger.warning("MODEL.%s is %s, the tower was trained with %s", key, model_options[key], trained)
