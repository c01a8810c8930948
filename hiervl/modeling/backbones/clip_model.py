"""CLIP's image towers as backbones, loaded through open_clip.

ViTs get a simple feature pyramid; ResNets and ConvNeXts are used as they are. Besides res2..res5, the backbones compute
dense embeddings in the text space (`dense_text_features`).

CLIP normalizes colors differently from ImageNet networks: MODEL.PIXEL_MEAN [122.771, 116.746, 104.094] and
MODEL.PIXEL_STD [68.501, 66.632, 70.323]. For image sizes that are not a multiple of the patch size, see
feature_pyramid.py.
"""

import logging

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

from ...errors import UserError
from ..clip import load_clip
from .clip_towers import ViTTower, build_tower
from .feature_pyramid import STRIDES, SimpleFeaturePyramid

logger = logging.getLogger(__name__)


@BACKBONE_REGISTRY.register()
class CLIPBackbone(Backbone):
    """CLIP image tower that returns res2..res5.

    Args:
        visual: open_clip's image tower.
        name: the model's name, for error messages.
        drop_path: stochastic depth rate of the last block.
    Raises:
        UserError: an unsupported architecture, or a drop path rate for a ResNet.
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
        _check_pixel_statistics(cfg.MODEL, network.visual)
        return {"visual": network.visual, "name": options.MODEL, "drop_path": options.DROP_PATH}

    @property
    def dense_stride(self) -> int:
        """Stride of the dense embeddings in pixels: 16 for ViTs, 32 for ResNets and ConvNeXts."""
        return self.tower.dense_stride

    @property
    def skips_padding(self) -> bool:
        return self.pyramid is not None

    def forward(self, image, size=None):
        """(B, 3, H, W) -> dict of (B, C, H/stride, W/stride). For `size`, of a ViT, see crop_to_patches."""
        if self.pyramid is None:
            return dict(zip(STRIDES, self.tower(image)[0]))
        return self.pyramid(self.tower(image, size=size)[0][0], image.shape[-2:])

    def dense_text_features(self, image):
        """(B, 3, H, W) -> unit-length embeddings in the text space (B, Dt, H/dense_stride, W/dense_stride).

        ViTs use only the value path of the last block's attention, so that each patch is embedded without mixing in
        other patches (MaskCLIP, arXiv 2112.01071).
        """
        return self.tower(image, maps=False, dense=True)[1]

    def checkpoint_activations(self):
        """Compute the activations of the blocks again in the backward pass instead of keeping them.

        Raises:
            UserError: the tower is not a ViT.
        """
        if not isinstance(self.tower, ViTTower):
            raise UserError(
                "SOLVER.ACTIVATION_CHECKPOINTING: of CLIP's image towers only ViTs have blocks for it; take backbone "
                "out of the list."
            )
        self.tower.recompute = True

    def output_shape(self):
        if self.pyramid is not None:
            return self.pyramid.output_shape()
        return {
            name: ShapeSpec(channels=channels, stride=STRIDES[name])
            for name, channels in zip(STRIDES, self.tower.channels)
        }


def _check_pixel_statistics(model_options, visual):
    """Warn if PIXEL_MEAN or PIXEL_STD differs from the values with which the tower was trained."""
    for key, statistic in (("PIXEL_MEAN", visual.image_mean), ("PIXEL_STD", visual.image_std)):
        trained = [round(255 * value, 3) for value in statistic]
        if max(abs(a - b) for a, b in zip(model_options[key], trained)) > 0.5:
            logger.warning("MODEL.%s is %s, but the tower was trained with %s", key, model_options[key], trained)
