"""HierVL, the network: image and class names in, class probabilities per pixel out (DESIGN section 1)."""
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from .backbones import build_backbone
from .criterion import Criterion, Normalizers
from .dual_query_decoder import QueryDecoder
from .errors import UserError
from .inference import ClassScores, pad_to_multiple, sliding_window
from .pixel_decoder import PixelDecoder
from .targets import SEGMENTS, build_targets
from .text import ClassText


@META_ARCH_REGISTRY.register()
class HierVL(nn.Module):
    """Mask transformer whose classes are named by text.

    In training `forward` takes a list of dicts, all images of one size:
        image: (3, H, W) uint8 or float, RGB 0..255
        sem_seg: (H, W) int64 labels; ids outside 0..K-1 do not count
        weight: (H, W) float validity (default 1)
        feature_dropout: float, share of backbone channels to drop (default 0)
        pseudo: True for a pseudo-labelled image (default False), which also needs
            image_weight: float, its kept share, and unknown: (K,) bool, classes that may hide in it
    and returns a dict of weighted scalar losses: "loss_*" of the labelled, "loss_u_*" of the pseudo-labelled images.

    In evaluation it returns, per dict of image (and height, width of the wanted output), {"sem_seg": (K, height,
    width) float probabilities}.
    """

    @configurable
    def __init__(self, *, backbone, pixel_decoder, decoder, text, criterion, class_names, pixel_mean, pixel_std,
                 size_divisibility, segments, min_area, test_mode, window, stride):
        super().__init__()
        # Channels-last convolutions are faster on CPUs and on tensor cores (docs/DECISIONS.md).
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.pixel_decoder = pixel_decoder
        self.text = text
        self.decoder = decoder
        self.scores = ClassScores()
        self.criterion = criterion
        self.class_names = list(class_names)
        self.size_divisibility = size_divisibility
        self.segments, self.min_area = segments, min_area
        self.test_mode, self.window, self.stride = test_mode, window, stride
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg):
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        if not hasattr(metadata, "stuff_classes"):
            raise UserError(f"DATASETS.TRAIN: no data set called {cfg.DATASETS.TRAIN[0]!r}; datasets/README.md lists "
                            "those that there are.")
        class_names = metadata.stuff_classes
        text = ClassText(cfg, class_names) if cfg.MODEL.DECODER.CLASSIFIER == "text" else None
        if cfg.TEST.MODE not in ("whole", "sliding"):
            raise UserError(f"TEST.MODE: {cfg.TEST.MODE!r} is not one of whole, sliding.")
        if cfg.MODEL.CRITERION.SEGMENTS not in SEGMENTS:
            raise UserError(f"MODEL.CRITERION.SEGMENTS: {cfg.MODEL.CRITERION.SEGMENTS!r} is not one of "
                            f"{', '.join(SEGMENTS)}.")
        backbone = build_backbone(cfg)
        return {"backbone": backbone, "pixel_decoder": PixelDecoder(cfg, backbone.output_shape()),
                "decoder": QueryDecoder(cfg, len(class_names), text.dim if text else 0),
                "text": text, "criterion": Criterion(cfg), "class_names": class_names,
                "pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD,
                "size_divisibility": cfg.MODEL.SIZE_DIVISIBILITY,
                "segments": cfg.MODEL.CRITERION.SEGMENTS, "min_area": cfg.MODEL.CRITERION.MIN_AREA,
                "test_mode": cfg.TEST.MODE, "window": cfg.TEST.WINDOW, "stride": cfg.TEST.STRIDE}

    @property
    def device(self):
        return self.pixel_mean.device

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def forward(self, batched_inputs, normalizers: dict = None):
        """See the class's docstring. normalizers: {"labeled": ..., "pseudo": ...} from `normalizers()`, when the
        losses of several micro-batches or ranks are to be added up."""
        if not self.training:
            return self.inference(batched_inputs)
        # Labelled images first, so that each kind is one slice of the batch.
        batched_inputs = sorted(batched_inputs, key=lambda x: x.get("pseudo", False))
        predictions = self.predict_queries(self._stack(batched_inputs, "image"),
                                           [x.get("feature_dropout", 0.0) for x in batched_inputs])
        num_labeled = sum(not x.get("pseudo", False) for x in batched_inputs)
        losses = {}
        for kind, prefix, part in (("labeled", "loss_", slice(0, num_labeled)),
                                   ("pseudo", "loss_u_", slice(num_labeled, None))):
            if batched_inputs[part]:
                own = [{name: value[part] for name, value in p.items()} for p in predictions]
                result = self.criterion(own, self.targets(batched_inputs[part]), self.scores,
                                        normalizers and normalizers[kind])
                losses.update({name.replace("loss_", prefix): value for name, value in result.items()})
        return losses

    def predict_queries(self, images, feature_dropout=None):
        """(B, 3, H, W) images, RGB 0..255 -> the decoder's predictions (list of dicts).

        feature_dropout: B floats, the share of each image's backbone channels to drop.
        """
        images = pad_to_multiple((images - self.pixel_mean) / self.pixel_std, self.size_divisibility)
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        if feature_dropout is not None and any(feature_dropout):
            features = {name: _drop_channels(x, feature_dropout) for name, x in features.items()}
        memory, mask_features = self.pixel_decoder(features)
        return self.decoder(memory, mask_features, self.text() if self.text else None)

    def predict(self, images):
        """(B, 3, H, W) images, RGB 0..255 -> probabilities (B, K, H, W)."""
        last = self.predict_queries(images)[-1]
        height, width = images.shape[-2:]
        grid = last["mask_logits"].shape[-2:]
        evidence = self.scores(last["class_logits"], last["mask_logits"].flatten(2)).unflatten(2, grid)
        # Only the K class maps are brought to full size, not the N query masks.
        padded = (height + -height % self.size_divisibility, width + -width % self.size_divisibility)
        evidence = F.interpolate(evidence, size=padded, mode="bilinear", align_corners=False)
        return self.scores.normalize(evidence[..., :height, :width])

    @torch.no_grad()
    def inference(self, batched_inputs):
        results = []
        for x in batched_inputs:
            image = x["image"][None].to(self.device, torch.float32)
            if self.test_mode == "sliding":
                probability = sliding_window(image, self.predict, self.window, self.stride)
            else:
                probability = self.predict(image)
            size = (x.get("height", image.shape[2]), x.get("width", image.shape[3]))
            if size != tuple(image.shape[-2:]):
                probability = F.interpolate(probability, size=size, mode="bilinear", align_corners=False)
            results.append({"sem_seg": probability[0]})
        return results

    def targets(self, batched_inputs):
        """The criterion's targets of training inputs, all labelled or all pseudo-labelled."""
        sem_seg = self._stack(batched_inputs, "sem_seg")
        weight = torch.stack([x["weight"] if "weight" in x else torch.ones(x["sem_seg"].shape)
                              for x in batched_inputs]).to(self.device, torch.float32)
        pseudo = batched_inputs[0].get("pseudo", False)
        return build_targets(
            sem_seg, weight, self.num_classes,
            image_weight=weight.new_tensor([x["image_weight"] for x in batched_inputs]) if pseudo else None,
            unknown=self._stack(batched_inputs, "unknown") if pseudo else None,
            segments=self.segments, min_area=self.min_area, max_segments=self.decoder.num_queries // 2)

    def normalizers(self, batched_inputs) -> dict:
        """Denominators of the losses of these inputs, per kind of image."""
        result = {}
        for kind, pseudo in (("labeled", False), ("pseudo", True)):
            own = [x for x in batched_inputs if x.get("pseudo", False) == pseudo]
            zero = Normalizers.unstack(torch.zeros(3, device=self.device))
            result[kind] = self.criterion.normalizers(self.targets(own), self.decoder.num_queries) if own else zero
        return result

    def _stack(self, batched_inputs, key):
        value = torch.stack([x[key] for x in batched_inputs]).to(self.device, non_blocking=True)
        return value.float() if key == "image" else value


def _drop_channels(x, rates):
    """Drop whole channels of (B, C, h, w), image b at rate rates[b], and scale the rest up."""
    keep = 1 - torch.tensor(rates, device=x.device, dtype=x.dtype)[:, None].expand(-1, x.shape[1])  # (B, C)
    return x * (torch.bernoulli(keep) / keep)[..., None, None]
