"""HierVL, the network: image and class names in, class probabilities per pixel out (docs/how-it-works.md)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from .backbones import build_backbone
from ..losses.criterion import Criterion, Normalizers
from .dual_query_decoder import QueryDecoder, SemanticQueries
from ..errors import UserError
from .inference import ClassScoreHead, InferenceProtocol, Probabilities, upsample_to_image, pad_to_multiple
from .pixel_decoder import PixelDecoder
from ..losses.points import SharedPoints
from .query_generator import NUM_SCALES, SelectedClasses, QueryGenerator
from ..losses.regularizers import LABELED, PSEUDO, Regularizers, LossContext
from .spatial_alignment import AlignmentOutput, SpatialAlignment
from ..losses.targets import SEGMENTS, build_targets, most_frequent_classes
from .text import ClassText


@dataclass
class NetworkOutput:
    """All that the network finds in B images.

    Attributes:
        layers: the decoder's list of QueryPredictions. mask_features: M (B, Cm, H/4, W/4). features: the backbone's.
        selected: of HSQG, aligned: of CMSAM, or None without them.
    """

    layers: list
    mask_features: torch.Tensor
    features: dict
    selected: SelectedClasses | None
    aligned: AlignmentOutput | None

    def __getitem__(self, images: slice) -> "NetworkOutput":
        """That of some of the images."""
        return NetworkOutput(
            [layer[images] for layer in self.layers],
            self.mask_features[images],
            {name: x[images] for name, x in self.features.items()},
            self.selected and self.selected[images],
            self.aligned and self.aligned[images],
        )


@META_ARCH_REGISTRY.register()
class HierVL(nn.Module):
    """Mask transformer whose classes are named by text.

    In training `forward` takes a list of dicts, all images of one size:
        image: (3, H, W) uint8 or float, RGB 0..255
        sem_seg: (H, W) int64 labels; ids outside 0..K-1 do not count
        instances: (H, W) int64, numbers of single objects, 0 for none (labeled images, for segments "instances")
        weight: (H, W) float validity of the labels (default 1)
        padded: bool, whether the image does not fill its canvas (default False), and then
            valid: (H, W) bool, False on padding
        feature_dropout: float, share of backbone channels to drop (default 0)
        pseudo: True for a pseudo-labeled image (default False), which also needs
            image_weight: float, its kept share; unknown: (K,) bool, classes that may hide in it;
            teacher: what the teacher said (see regularizers.LossContext), in a network with language modules
    and returns a dict of weighted scalar losses: "loss_*" of the labeled, "loss_u_*" of the pseudo-labeled images.

    In evaluation it returns, per dict of image (and height, width of the wanted output), {"sem_seg": (K, height,
    width) float probabilities}, found as `protocol` says.
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
        segments,
        min_area,
        protocol,
        things=(),
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
        self.segments, self.min_area, self.things = segments, min_area, tuple(things)
        self.protocol = protocol
        self.regularizers = regularizers
        # Names trained in training, distractors too.
        self.trained_names = frozenset([*class_names, *(text.distractors()[0] if text else ())])
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg):
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        if not hasattr(metadata, "stuff_classes"):
            raise UserError(
                f"DATASETS.TRAIN: no data set called {cfg.DATASETS.TRAIN[0]!r}; datasets/README.md lists "
                "those that there are."
            )
        if cfg.MODEL.SIZE_DIVISIBILITY % 32:
            raise UserError(
                f"MODEL.SIZE_DIVISIBILITY is {cfg.MODEL.SIZE_DIVISIBILITY}; it must be a multiple of 32, "
                "the stride of res5."
            )
        if cfg.MODEL.CRITERION.SEGMENTS not in SEGMENTS:
            raise UserError(
                f"MODEL.CRITERION.SEGMENTS: {cfg.MODEL.CRITERION.SEGMENTS!r} is not one of {', '.join(SEGMENTS)}."
            )
        class_names, things = metadata.stuff_classes, set(metadata.get("thing_classes", ()))
        text = ClassText(cfg, class_names) if cfg.MODEL.DECODER.CLASSIFIER == "text" else None
        if text is None and cfg.MODEL.TEXT.ABLATION != "none":
            raise UserError(
                f"MODEL.TEXT.ABLATION is {cfg.MODEL.TEXT.ABLATION!r}, but MODEL.DECODER.CLASSIFIER linear "
                "reads no texts; set it to none."
            )
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
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
            "segments": cfg.MODEL.CRITERION.SEGMENTS,
            "min_area": cfg.MODEL.CRITERION.MIN_AREA,
            "things": [k for k, name in enumerate(class_names) if name in things],
            "protocol": InferenceProtocol(cfg),
            "regularizers": Regularizers(cfg, backbone, text),
            **_language_modules(cfg, text, shapes["res5"].channels),
        }

    @property
    def device(self):
        return self.pixel_mean.device

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def set_classes(self, class_names) -> None:
        """Segment these classes from now on. No weight depends on the list; their texts must be at hand.

        Raises:
            UserError: a name without a text, a name given twice, or a network without a text classifier.
        """
        if self.text is None:
            raise UserError(
                "MODEL.DECODER.CLASSIFIER is linear: its classes are fixed; train with `text` to choose other ones."
            )
        self.text.set_classes(class_names)
        self.class_names = list(class_names)

    def forward(self, batched_inputs, normalizers: dict = None):
        """See the class's docstring. normalizers: {"labeled": ..., "pseudo": ...} from `normalizers()`, when the
        losses of several micro-batches or ranks are to be added up."""
        if not self.training:
            return self.inference(batched_inputs)
        # Labeled images first, so that each kind is one slice of the batch.
        batched_inputs = sorted(batched_inputs, key=lambda x: x.get("pseudo", False))
        kinds = self._kinds(batched_inputs)
        inputs = self._stack(batched_inputs, "image")
        valid = self._stack(batched_inputs, "valid") if any(x.get("padded") for x in batched_inputs) else None
        images = self.preprocess(inputs)
        dropout = [x.get("feature_dropout", 0.0) for x in batched_inputs]
        names, variants = self._names(distractors=True)
        present = torch.cat([targets.present for _, _, targets in kinds])
        if names is not None:
            present = F.pad(present, (0, len(names) - self.num_classes))
        output = self.encode(
            images, dropout, names, variants, required=present, valid_mask=self.valid_mask(inputs.shape, valid)
        )
        losses = {}
        for kind, part, targets in kinds:
            own = normalizers[kind] if normalizers else self.criterion.normalizers(targets, self.decoder.num_queries)
            # Losses and what they compare keep float32 under autocast.
            with torch.autocast(self.device.type, enabled=False):
                result = self._losses(kind, output[part], targets, images[part], batched_inputs[part], own)
            prefix = "loss_" if kind == LABELED else "loss_u_"
            losses.update({name.replace("loss_", prefix): value for name, value in result.items()})
        return losses

    def _kinds(self, batched_inputs):
        """[(kind, its slice of the batch, its targets)] of the kinds of images that there are."""
        num_labeled = sum(not x.get("pseudo", False) for x in batched_inputs)
        parts = ((LABELED, slice(0, num_labeled)), (PSEUDO, slice(num_labeled, None)))
        return [(kind, part, self.targets(batched_inputs[part])) for kind, part in parts if batched_inputs[part]]

    def _losses(self, kind, output, targets, images, inputs, normalizers):
        selected_targets, relevance = targets, None
        if output.selected is not None:
            names = len(output.selected.names)
            everything = torch.arange(names, device=self.device).expand(len(images), -1)
            targets, selected_targets = (
                targets.restrict_to(everything, names),
                targets.restrict_to(output.selected.index, names),
            )
            relevance = output.selected.relevance
        points = SharedPoints.draw(selected_targets, self.criterion.num_candidates)
        losses = self.criterion(
            output.layers, output.mask_features, selected_targets, points, self.scores, normalizers, relevance
        )
        if self.regularizers is not None:
            context = LossContext(
                kind,
                output,
                targets,
                selected_targets,
                points.first(self.criterion.num_points),
                images,
                self._teacher(inputs),
            )
            # A regularizer is a mean over images; these are but a part of all that are added up.
            share = len(images) / normalizers.images.clamp(min=1)
            losses |= {name: value * share for name, value in self.regularizers(self, context).items()}
        return losses

    def _teacher(self, inputs):
        predictions = [x["teacher"] for x in inputs if "teacher" in x]
        if not predictions:
            return None
        stacked = {key: torch.stack([x[key] for x in predictions]).to(self.device) for key in predictions[0]}
        return stacked | {"valid": self._pad(stacked["valid"], False)}

    def _names(self, distractors=False):
        """T' (V, Dt) of the classes and, behind them, of the distractors; and all their texts (V, R, Dt), or None if
        every one has a single text."""
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
        """(B, 3, H, W) images, RGB 0..255 -> normalized and padded."""
        return pad_to_multiple((images - self.pixel_mean) / self.pixel_std, self.size_divisibility)

    def encode(
        self,
        images,
        feature_dropout=None,
        names=None,
        variants=None,
        *,
        required=None,
        trained=None,
        valid_mask=None,
        last_layer_only=False,
    ) -> NetworkOutput:
        """The whole data flow.

        Args:
            images: (B, 3, H, W), preprocessed. feature_dropout: B floats, shares of backbone channels to drop.
            names: (V, Dt), T of the classes and perhaps of further names. variants, required, trained, valid_mask: see
            QueryGenerator.
            last_layer_only: the predictions of the last layer suffice.
        """
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
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
        """What inference makes of (B, 3, H, W) images, RGB 0..255; of the decoder's predictions only the last.

        suppress: leave out classes of little relevance; not so for pseudo-labels, where every class must have its
        probability. valid: (B, H, W) bool, False on padding, or None.
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
            trained=trained,
            last_layer_only=True,
            valid_mask=self.valid_mask(images.shape, valid),
        )

    def predict(self, images, suppress: bool = True, valid=None) -> Probabilities:
        """(B, 3, H, W) images, RGB 0..255 -> probabilities of the classes; cut and valid: see `look`."""
        output = self.inference_forward(images, suppress, valid)
        selected = output.selected
        with torch.autocast(self.device.type, enabled=False):  # a threshold of 0.95 needs more than 8 bits
            class_scores = output.layers[-1].class_scores(
                output.mask_features, self.scores, selected and selected.relevance
            )
        # Only the K' class maps are brought to full size, not the masks of all queries.
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
    def inference(self, batched_inputs):
        results = []
        for x in batched_inputs:
            image = x["image"][None].to(self.device, torch.float32)
            size = (x.get("height", image.shape[2]), x.get("width", image.shape[3]))
            results.append(self.protocol.predict_image(image, size, self.predict))
        return results

    def targets(self, batched_inputs):
        """The criterion's targets of training inputs, all labeled or all pseudo-labeled."""
        sem_seg = self._pad(self._stack(batched_inputs, "sem_seg"), -1)
        weight = torch.stack(
            [x["weight"] if "weight" in x else torch.ones(x["sem_seg"].shape) for x in batched_inputs]
        ).to(self.device, torch.float32)
        weight = self._pad(weight, 0)
        pseudo = batched_inputs[0].get("pseudo", False)
        # The teacher draws no single objects: its regions are cut into components.
        segments = "components" if pseudo and self.segments == "instances" else self.segments
        if pseudo and self.query_generator is not None:
            weight = most_frequent_classes(sem_seg, weight, self.num_classes, self.query_generator.top_k)
        return build_targets(
            sem_seg,
            weight,
            self.num_classes,
            image_weight=weight.new_tensor([x["image_weight"] for x in batched_inputs]) if pseudo else None,
            unknown=self._stack(batched_inputs, "unknown") if pseudo else None,
            segments=segments,
            min_area=self.min_area,
            max_segments=self.decoder.num_queries // 2,
            instances=self._pad(self._stack(batched_inputs, "instances"), 0) if segments == "instances" else None,
            things=self.things,
        )

    def normalizers(self, batched_inputs) -> dict:
        """Denominators of the losses of these inputs, per kind of image."""
        result = {LABELED: Normalizers.zero(self.device), PSEUDO: Normalizers.zero(self.device)}
        for kind, _, targets in self._kinds(sorted(batched_inputs, key=lambda x: x.get("pseudo", False))):
            result[kind] = self.criterion.normalizers(targets, self.decoder.num_queries)
        return result

    def valid_mask(self, shape, valid=None):
        """What of the canvas is image: (B, H', W') bool of the padded size, or None if all of it is or nobody asks.

        shape: (B, 3, H, W) of the images. valid: (B, H, W) bool, False on padding; None: there is none.
        """
        batch, _, height, width = shape
        fits = height % self.size_divisibility == width % self.size_divisibility == 0
        if self.query_generator is None or (valid is None and fits):
            return None
        if valid is None:
            valid = torch.ones(1, height, width, dtype=torch.bool, device=self.device)
        return self._pad(valid, False).expand(batch, -1, -1)

    def _pad(self, maps, value):
        """Maps (B, H, W) padded as images are, so that labels and mask features cover the same canvas."""
        height, width = maps.shape[-2:]
        return F.pad(maps, (0, -width % self.size_divisibility, 0, -height % self.size_divisibility), value=value)

    def _stack(self, batched_inputs, key):
        value = torch.stack([x[key] for x in batched_inputs]).to(self.device, non_blocking=True)
        return value.float() if key == "image" else value


def _language_modules(cfg, text, feature_dim) -> dict:
    """HSQG and CMSAM, where the config has them.

    Raises:
        UserError: a module without the one that it builds on.
    """
    model = cfg.MODEL
    needs = {
        "MODEL.HSQG.ENABLED": (model.HSQG.ENABLED, "MODEL.DECODER.CLASSIFIER text", text is not None),
        "MODEL.CMSAM.ENABLED": (model.CMSAM.ENABLED, "MODEL.HSQG.ENABLED True", model.HSQG.ENABLED),
        "MODEL.PIXEL_DECODER.TEXT_AWARE": (
            model.PIXEL_DECODER.TEXT_AWARE,
            "MODEL.HSQG.ENABLED True",
            model.HSQG.ENABLED,
        ),
        "MODEL.DECODER.SEMANTIC": (model.DECODER.SEMANTIC, "MODEL.HSQG.ENABLED True", model.HSQG.ENABLED),
    }
    for key, (wanted, need, there) in needs.items():
        if wanted and not there:
            raise UserError(f"{key} is True but needs {need}; set both, or it to False.")
    return {
        "query_generator": QueryGenerator(cfg, feature_dim, text.dim) if model.HSQG.ENABLED else None,
        "alignment": SpatialAlignment(cfg) if model.CMSAM.ENABLED else None,
    }


def _drop_channels(x, rates):
    """Drop whole channels of (B, C, h, w), image b at rate rates[b], and scale the rest up."""
    keep = 1 - torch.tensor(rates, device=x.device, dtype=x.dtype)[:, None].expand(-1, x.shape[1])  # (B, C)
    return x * (torch.bernoulli(keep) / keep)[..., None, None]
