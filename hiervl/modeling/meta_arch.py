"""HierVL, the network: image and class names in, class probabilities per pixel out (docs/how-it-works.md)."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ..errors import UserError
from ..losses.criterion import Criterion, Normalizers
from ..losses.points import SharedPoints
from ..losses.regularizers import LABELED, PSEUDO, LossContext, Regularizers
from ..losses.targets import TargetBuilder
from ..utils.padding import pad_to_multiple, run_backbone
from ..utils.transfer import stack_on_device, to_device
from .backbones import build_backbone
from .dual_query_decoder import QueryDecoder, SemanticQueries
from .inference import ClassScoreHead, InferenceProtocol, Probabilities, upsample_to_image
from .outputs import NetworkOutput, TrainingBatch
from .pixel_decoder import PixelDecoder
from .query_generator import NUM_SCALES, QueryGenerator
from .spatial_alignment import SpatialAlignment
from .text import ClassText


@META_ARCH_REGISTRY.register()
class HierVL(nn.Module):
    """Mask transformer whose classes are named by text.

    In training, `forward` takes a list of dicts, all images of one size, or the TrainingBatch that `prepare_batch`
    made of it:
        image: (3, H, W) uint8 or float, RGB in 0..255
        sem_seg: (H, W) int64 labels; ids outside 0..K-1 are ignored
        instances: (H, W) int64, object numbers, 0 for none (labeled images, with segments "instances")
        weight: (H, W) float validity of the labels (default 1)
        padded: bool, whether the image is smaller than its canvas (default False), and then
            valid: (H, W) bool, False on padding
        feature_dropout: float, share of backbone channels to drop (default 0)
        pseudo: True for a pseudo-labeled image (default False), which also needs
            image_weight: float, its kept share; unknown: (K,) bool, classes that may hide in it;
            teacher: TeacherView, what the EMA teacher saw, in a network with language modules
    and returns weighted scalar losses by kind of image: {"labeled": {"loss_class": ..., ...}, "pseudo": {...}}.

    In evaluation it takes a list of dicts with `image`, and optionally `height` and `width` of the output, and returns
    for each {"sem_seg": (K, height, width) float probabilities}, computed as `protocol` says.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone,
        pixel_decoder,
        decoder,
        text,
        criterion,
        class_names,
        pixel_mean,
        pixel_std,
        size_divisibility,
        target_builder,
        protocol,
        query_generator=None,
        alignment=None,
        regularizers=None,
    ):
        super().__init__()
        # Channels-last convolutions are faster on CPUs and on tensor cores (docs/DECISIONS.md).
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.pixel_decoder = pixel_decoder
        self.text = text
        self.query_generator = query_generator
        self.alignment = alignment
        self.decoder = decoder
        self.scores = ClassScoreHead(semantic=decoder.semantic)
        self.criterion = criterion
        self.class_names = list(class_names)
        self.size_divisibility = size_divisibility
        self.target_builder = target_builder
        self.protocol = protocol
        self.regularizers = regularizers
        # Names that training shows, distractors included.
        self.trained_names = frozenset([*class_names, *(text.distractors()[0] if text else ())])
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg):
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        if not hasattr(metadata, "stuff_classes"):
            raise UserError(
                f"DATASETS.TRAIN: there is no dataset {cfg.DATASETS.TRAIN[0]!r}; datasets/README.md lists those that "
                "HierVL knows."
            )
        class_names, things = metadata.stuff_classes, set(metadata.get("thing_classes", ()))
        text = ClassText(cfg, class_names) if cfg.MODEL.DECODER.CLASSIFIER == "text" else None
        backbone = build_backbone(cfg)
        shapes, hsqg = backbone.output_shape(), cfg.MODEL.HSQG.ENABLED
        return {
            "backbone": backbone,
            "pixel_decoder": PixelDecoder(cfg, shapes, text.dim if text else 0),
            "text": text,
            "decoder": QueryDecoder(cfg, len(class_names), text.dim if text else 0),
            "criterion": Criterion(cfg, NUM_SCALES),
            "class_names": class_names,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": cfg.MODEL.SIZE_DIVISIBILITY,
            "target_builder": TargetBuilder(
                segments=cfg.MODEL.CRITERION.SEGMENTS,
                min_area=cfg.MODEL.CRITERION.MIN_AREA,
                max_segments=cfg.MODEL.DECODER.NUM_QUERIES // 2,
                things=[k for k, name in enumerate(class_names) if name in things],
                max_classes=cfg.MODEL.HSQG.TOP_K if cfg.MODEL.HSQG.ENABLED else None,
                size_divisibility=cfg.MODEL.SIZE_DIVISIBILITY,
            ),
            "protocol": InferenceProtocol(cfg),
            "regularizers": Regularizers(cfg, backbone, text),
            "query_generator": QueryGenerator(cfg, shapes["res5"].channels, text.dim) if hsqg else None,
            "alignment": SpatialAlignment(cfg) if cfg.MODEL.CMSAM.ENABLED else None,
        }

    @property
    def device(self):
        return self.pixel_mean.device

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def set_classes(self, class_names) -> None:
        """Segment these classes from now on. No weight depends on the list; their texts must be available.

        Raises:
            UserError: a name without a text, a name given twice, or a network without a text classifier.
        """
        if self.text is None:
            raise UserError(
                "MODEL.DECODER.CLASSIFIER is linear: its classes are fixed; train with `text` to choose other ones."
            )
        self.text.set_classes(class_names)
        self.class_names = list(class_names)

    def forward(self, batched_inputs, normalizers: dict | None = None):
        """See the class's docstring.

        Args:
            normalizers: {kind: Normalizers}, to add up the losses of several micro-batches or ranks; None: of this
                batch alone.
        """
        if not self.training:
            return self.inference(batched_inputs)
        batch = batched_inputs if isinstance(batched_inputs, TrainingBatch) else self.prepare_batch(batched_inputs)
        images = self._stack(batch.inputs, "image").float()
        valid = self._stack(batch.inputs, "valid") if any(x.get("padded") for x in batch.inputs) else None
        names, variants = self._names(distractors=True)
        required = torch.cat([targets.present for _, targets in batch.kinds.values()])  # (B, K)
        if names is not None:
            required = F.pad(required, (0, len(names) - self.num_classes))  # (B, V)
        valid_mask = self.valid_mask(images.shape, valid)
        size, images = images.shape[2:], self.preprocess(images)
        dropout = [x.get("feature_dropout", 0.0) for x in batch.inputs]
        output = self.encode(images, dropout, names, variants, size=size, required=required, valid_mask=valid_mask)
        normalizers = normalizers or self.normalizers(batch)
        # Losses and what they compare stay in float32 under autocast.
        with torch.autocast(self.device.type, enabled=False):
            return {
                kind: self._losses(kind, output[part], targets, images[part], batch.inputs[part], normalizers[kind])
                for kind, (part, targets) in batch.kinds.items()
            }

    def prepare_batch(self, batched_inputs: list) -> TrainingBatch:
        """Sort training inputs by kind and build their targets."""
        inputs = sorted(batched_inputs, key=lambda x: x.get("pseudo", False))
        num_labeled = sum(not x.get("pseudo", False) for x in inputs)
        parts = {LABELED: slice(0, num_labeled), PSEUDO: slice(num_labeled, None)}
        kinds = {
            kind: (part, self.target_builder(inputs[part], self.num_classes, self.device))
            for kind, part in parts.items()
            if inputs[part]
        }
        return TrainingBatch(inputs, kinds)

    def normalizers(self, batch: TrainingBatch) -> dict:
        """Denominators of the losses of a batch: {kind: Normalizers}, zeros for a kind that it lacks."""
        zeros = {kind: Normalizers.zero(self.device) for kind in (LABELED, PSEUDO)}
        return zeros | {
            kind: self.criterion.normalizers(targets, self.decoder.num_queries)
            for kind, (_, targets) in batch.kinds.items()
        }

    def _losses(self, kind, output, targets, images, inputs, normalizers) -> dict:
        """{name: weighted loss} of the images of one kind."""
        selected, selected_targets = output.selected, targets
        if selected is not None:
            num_names = len(selected.names)
            all_names = torch.arange(num_names, device=self.device).expand(len(images), -1)  # (B, V)
            selected_targets = targets.restrict_to(selected.index, num_names)
            targets = targets.restrict_to(all_names, num_names)
        points = SharedPoints.draw(selected_targets, self.criterion.num_candidates)
        losses = self.criterion(
            output.layers,
            output.mask_features,
            selected_targets,
            points,
            self.scores,
            normalizers,
            selected and selected.relevance,
        )
        if self.regularizers is not None:
            points = points.first(self.criterion.num_points)
            context = self._loss_context(kind, output, targets, selected_targets, points, images, inputs)
            # A regularizer is a mean over images; these may be a part of all whose losses are added up.
            share = len(images) / normalizers.images.clamp(min=1)
            losses |= {name: value * share for name, value in self.regularizers(context).items()}
        return losses

    def _loss_context(self, kind, output, targets, selected_targets, points, images, inputs) -> LossContext:
        text = self.text and self.text()
        with_queries = self.query_generator is not None and kind == LABELED
        return LossContext(
            kind,
            images,
            tuple(inputs[0]["image"].shape[1:]),
            targets,
            selected_targets,
            points,
            output.features,
            output.selected,
            output.aligned,
            text=text,
            anchors=self.text and self.text.anchors(),
            name_queries=self.query_generator.project_names(text) if with_queries else None,
            similarity_temperature=self.alignment and self.alignment.score_temperature(),
            teacher=[x["teacher"] for x in inputs if "teacher" in x] or None,
        )

    def _names(self, distractors=False):
        """T' (V, Dt) of the classes, followed by the distractors if asked for; and all their texts (V, R, Dt), or None
        if every name has a single text."""
        if self.text is None or self.query_generator is None:
            return self.text and self.text(), None
        names, variants = self.text(), self.text.variants()
        if distractors:
            more = self.text.distractors()[1]
            names = torch.cat((names, more))
            if variants is not None:
                variants = torch.cat((variants, more[:, None].expand(-1, variants.shape[1], -1)))
        return names, variants

    def preprocess(self, images):
        """Normalize and pad (B, 3, H, W) images, RGB in 0..255."""
        return pad_to_multiple((images - self.pixel_mean) / self.pixel_std, self.size_divisibility)

    def encode(
        self,
        images,
        feature_dropout=None,
        names=None,
        variants=None,
        *,
        size=None,
        required=None,
        trained=None,
        valid_mask=None,
        last_layer_only=False,
    ) -> NetworkOutput:
        """The whole data flow: backbone, HSQG, pixel decoder, CMSAM, query decoder.

        Args:
            images: (B, 3, H, W), preprocessed. feature_dropout: B floats, shares of backbone channels to drop.
            size: (height, width) of the images before padding, if it is known.
            names: (V, Dt), T' of the classes, and of distractors in training. For variants, required, trained and
                valid_mask see QueryGenerator.forward.
            last_layer_only: return the last layer's predictions only.
        """
        features = run_backbone(self.backbone, images.contiguous(memory_format=torch.channels_last), size)
        if feature_dropout is not None and any(feature_dropout):
            features = {name: _drop_channels(x, feature_dropout) for name, x in features.items()}
        if self.query_generator is None:
            memory, mask_features = self.pixel_decoder(features)
            return NetworkOutput(
                self.decoder(memory, mask_features, names, last_layer_only=last_layer_only),
                mask_features,
                features,
                None,
                None,
            )
        selected = self.query_generator(
            features["res5"], names, variants, required=required, trained=trained, valid_mask=valid_mask
        )
        memory, mask_features = self.pixel_decoder(features, selected.text)
        aligned, queries = None, selected.queries
        if self.alignment is not None:
            aligned = self.alignment(selected, memory, mask_features, valid_mask)
            queries, memory = aligned.queries, aligned.memory
        semantic = (
            SemanticQueries(queries, selected.queries, selected.log_relevance, aligned and aligned.similarity)
            if self.decoder.semantic
            else None
        )
        layers = self.decoder(memory, mask_features, selected.text, semantic, last_layer_only)
        return NetworkOutput(layers, mask_features, features, selected, aligned)

    def inference_forward(self, images, suppress: bool = True, valid=None) -> NetworkOutput:
        """The network's output at inference, with the decoder's last predictions only.

        Args:
            images: (B, 3, H, W), RGB in 0..255.
            suppress: drop classes of low relevance. Not for pseudo-labels: every class must get its probability.
            valid: (B, H, W) bool, False on padding; None: no padding.
        """
        names, variants = self._names()
        trained = None
        if suppress:
            trained = torch.tensor([name in self.trained_names for name in self.class_names], device=self.device)
        return self.encode(
            self.preprocess(images),
            None,
            names,
            variants,
            size=images.shape[2:],
            trained=trained,
            last_layer_only=True,
            valid_mask=self.valid_mask(images.shape, valid),
        )

    def predict(self, images, suppress: bool = True, valid=None) -> Probabilities:
        """Class probabilities of (B, 3, H, W) images, RGB in 0..255; for suppress and valid see `inference_forward`."""
        output = self.inference_forward(images, suppress, valid)
        selected = output.selected
        with torch.autocast(self.device.type, enabled=False):  # a threshold of 0.95 needs more than 8 bits
            class_scores = output.layers[-1].class_scores(
                output.mask_features, self.scores, selected and selected.relevance
            )
        # Only the K' class maps are upsampled, not the masks of all queries.
        probability = self.scores.normalize(upsample_to_image(class_scores, images.shape[2:]))
        if selected is None:
            index = torch.arange(self.num_classes, device=self.device).expand(len(images), -1)
            return Probabilities(probability, index, self.num_classes)
        return Probabilities(
            probability,
            selected.index,
            self.num_classes,
            selected.logits.sigmoid(),
            output.aligned and output.aligned.similarity,
        )

    @torch.no_grad()
    def inference(self, batched_inputs) -> list:
        """Images of one size, with results of one size, go through the network together."""
        groups = {}
        for i, x in enumerate(batched_inputs):
            height, width = x["image"].shape[1:]
            size = (x.get("height", height), x.get("width", width))
            groups.setdefault((height, width, size), []).append(i)
        results = [None] * len(batched_inputs)
        for (*_, size), indices in groups.items():
            images = self._stack([batched_inputs[i] for i in indices], "image").float()
            for i, result in zip(indices, self.protocol.predict_images(images, size, self.predict)):
                results[i] = result
        return results

    def valid_mask(self, shape, valid=None):
        """Where the padded canvas shows the image, for modules that must not see padding.

        Args:
            shape: (B, 3, H, W) of the images. valid: (B, H, W) bool, False on padding; None: no padding so far.
        Returns:
            (B, H', W') bool of the padded size; None if there is no padding or no module needs the mask.
        """
        batch, _, height, width = shape
        fits = height % self.size_divisibility == width % self.size_divisibility == 0
        if self.query_generator is None or (valid is None and fits):
            return None
        if valid is None:
            valid = torch.ones(1, height, width, dtype=torch.bool, device=self.device)
        return pad_to_multiple(valid, self.size_divisibility, False).expand(batch, -1, -1)

    def _stack(self, inputs, key):
        return stack_on_device([x[key] for x in inputs], self.device)


def _drop_channels(x, rates):
    """Channel dropout of (B, C, h, w), with rate rates[b] for image b; the channels that stay are scaled up."""
    keep = 1 - to_device(torch.tensor(rates, dtype=x.dtype), x.device)[:, None].expand(-1, x.shape[1])  # (B, C)
    return x * (torch.bernoulli(keep) / keep)[..., None, None]
