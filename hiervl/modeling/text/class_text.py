"""ClassText: text embeddings T (K, Dt) for any list of class names.

CLIP's text embeddings lie in a narrow cone (cosines of 0.7 to 0.9 between street classes), which makes them hard to
separate for a cosine classifier. Therefore a fixed mean is subtracted, and the result is normalized again. The mean
defines the space in which the other weights are trained, so the checkpoint contains it, along with the adapter and the
context tokens. The embeddings are not in the checkpoint; they are computed or looked up for the current list of names.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from ...errors import UserError
from .adapter import ResidualAdapter
from .ablations import ablate_texts
from .embeddings import EmbeddingTable
from .tower import TextTower
from .word_lists import read_definitions, read_lines, read_templates


class ClassText(nn.Module):
    """Text embeddings of the class names, centered and optionally adapted.

    Args:
        source: source of the embeddings, EmbeddingTable or TextTower. A tensor (K, Dt) holds one embedding per class.
        class_names: the classes; with a tensor, "class 0", "class 1", ... by default.
        center: subtract the mean of the first list of classes. With a single class the mean would be the embedding
            itself, so it is left at zero.
        adapter: adapt the text space with a ResidualAdapter, T' = norm(T + gamma * A(T)).
        context_tokens: number of learnable tokens before every name, which replace the prompt templates (0: none).
            Needs a TextTower.
        distractors: words that are not classes, used to train the relevance. Class names among them are left out.
    Raises:
        UserError: a name that is a duplicate, has no embedding, or is too long for the tower.
    """

    @configurable
    def __init__(
        self,
        source,
        class_names: list[str] = None,
        *,
        center: bool = True,
        adapter: bool = False,
        context_tokens: int = 0,
        distractors: tuple[str, ...] = (),
    ):
        super().__init__()
        if isinstance(source, torch.Tensor):
            class_names = list(class_names or (f"class {k}" for k in range(len(source))))
            source = EmbeddingTable.from_tensor(source, class_names)
        self.source, self._all_distractors, self._context_cache = source, list(distractors), {}
        names = _check_names(class_names)
        raw, index = self._look_up(names)
        means = _class_means(raw, index, len(names))
        self.register_buffer("mean", means.mean(dim=0) if center and len(names) > 1 else torch.zeros(raw.shape[1]))
        for name in ("raw", "class_index", "variant_index", "raw_distractors"):  # (M, Dt), (M,), (K, R), (V, Dt)
            self.register_buffer(name, None, persistent=False)
        self._store(names, raw, index)
        self.adapter = ResidualAdapter(self.dim) if adapter else None
        self.context_embed = self._make_context(context_tokens) if context_tokens else None

    @classmethod
    def from_config(cls, cfg, class_names):
        options = cfg.MODEL.TEXT
        definitions = read_definitions(options.DEFINITIONS)
        if options.EMBEDDINGS:
            source = EmbeddingTable(options.EMBEDDINGS, class_names, options.EXTRA_EMBEDDINGS, definitions)
        elif options.EXTRA_EMBEDDINGS:
            raise UserError(
                "MODEL.TEXT.EXTRA_EMBEDDINGS needs MODEL.TEXT.EMBEDDINGS, which is empty; set that too, or leave both "
                "empty to use a text tower, which can embed any word."
            )
        else:
            source = TextTower(
                options.MODEL, options.PRETRAINED, read_templates(options.TEMPLATES), definitions, options.CACHE
            )
        words = read_lines(options.DISTRACTORS, "MODEL.TEXT.DISTRACTORS") if options.DISTRACTORS else ()
        if options.ABLATION == "random" and options.CONTEXT_TOKENS:
            raise UserError(
                "MODEL.TEXT.ABLATION random replaces the text tower, which MODEL.TEXT.CONTEXT_TOKENS needs; set "
                "ABLATION to none or CONTEXT_TOKENS to 0."
            )
        source = ablate_texts(source, options.ABLATION, class_names)
        return {
            "source": source,
            "class_names": class_names,
            "center": options.CENTER,
            "adapter": options.ADAPTER,
            "context_tokens": options.CONTEXT_TOKENS,
            "distractors": words,
        }

    @property
    def dim(self) -> int:
        """Dt, the width of the text embeddings."""
        return self.mean.shape[0]

    def set_classes(self, names: list[str]) -> None:
        """Switch to another list of names from the same source. Mean, adapter and context tokens do not change.

        Raises:
            UserError: as in the constructor. The previous list stays in use.
        """
        names = _check_names(names)
        self._store(names, *self._look_up(names))

    def _store(self, names, raw, index):
        """Store the classes, their texts raw (M, Dt) with the class index (M,) of each, and the distractors."""
        _check_embeddings(names, _class_means(raw, index, len(names)))
        class_texts = {
            text.casefold() for name in names for text in (name, self.source.words(name), *self.source.texts(name))
        }
        words = [w for w in self._all_distractors if not {w.casefold(), self.source.words(w).casefold()} & class_texts]
        distractors = self.source.embed(words, words) if words else raw[:0]
        device = self.mean.device
        self.raw, self.class_index, self.raw_distractors = raw.to(device), index.to(device), distractors.to(device)
        variants = _variant_index(index, len(names))
        self.variant_index = None if variants is None else variants.to(device)
        self.class_names, self._distractors, self._context_cache = names, words, {}

    def forward(self):
        """T' (K, Dt), float32 of unit length, centered and adapted. Gradients flow to the adapter and the context."""
        with self._float32():
            return self._center_and_adapt(
                _class_means(self._embeddings("raw"), self.class_index, len(self.class_names))
            )

    @torch.no_grad()
    def anchors(self):
        """T0 (K, Dt): the centered embeddings without adapter and context, detached."""
        with self._float32():
            return self._center(_class_means(self.raw, self.class_index, len(self.class_names)))

    def definitions(self):
        """All texts of all classes (M, Dt), centered and adapted, and the class index of each (M,)."""
        with self._float32():
            return self._center_and_adapt(self._embeddings("raw")), self.class_index

    def variants(self):
        """The texts of each class, padded to R, the largest number of texts of a class: (K, R, Dt).

        A class with fewer texts repeats its first. None if every class has a single text, which is then its T'.
        """
        if self.variant_index is None:
            return None
        return self.definitions()[0][self.variant_index]

    def distractors(self):
        """The V distractor words, and their embeddings (V, Dt), centered and adapted."""
        with self._float32():
            return list(self._distractors), self._center_and_adapt(self._embeddings("raw_distractors"))

    def _look_up(self, names):
        """Embeddings (M, Dt) of all texts of the classes, and the class index (M,) of each."""
        rows = [(text, name, k) for k, name in enumerate(names) for text in self.source.texts(name)]
        texts, owners, index = zip(*rows)
        return self.source.embed(list(texts), list(owners)), torch.tensor(index)

    def _make_context(self, count):
        if not self.source.context_width:
            raise UserError(
                "MODEL.TEXT.CONTEXT_TOKENS needs a CLIP text tower; leave MODEL.TEXT.EMBEDDINGS empty, or set "
                "CONTEXT_TOKENS to 0."
            )
        context = nn.Embedding(count, self.source.context_width)
        nn.init.normal_(context.weight, std=0.02)  # as CLIP initializes its token embeddings
        return context

    def _embeddings(self, kind):
        """Embeddings of the classes' texts (kind "raw") or of the distractors ("raw_distractors"), (M, Dt).

        With context tokens, the text tower computes them from the current context.
        """
        if self.context_embed is None:
            return getattr(self, kind)
        if kind == "raw_distractors":
            texts = self._distractors
        else:
            texts = [text for name in self.class_names for text in self.source.texts(name)]
        context = self.context_embed.weight
        if torch.is_grad_enabled():
            return self.source.embed_in_context(texts, context)
        # Evaluation needs them for every image, so they are cached until the context changes.
        cached = self._context_cache.get(kind)
        if cached is None or cached[0].device != context.device or not torch.equal(cached[0], context):
            cached = (context.detach().clone(), self.source.embed_in_context(texts, context))
            self._context_cache[kind] = cached
        return cached[1]

    def _center_and_adapt(self, vectors):
        centered = self._center(vectors)
        return self.adapter(centered) if self.adapter is not None else centered

    def _center(self, vectors):
        return F.normalize(vectors - self.mean, dim=1)

    def _float32(self):
        """Disable autocast. T is small, and everything is compared with it, so it is computed in full precision."""
        return torch.autocast(self.mean.device.type, enabled=False)


def _class_means(vectors, class_index, count):
    """Normalized mean over each class's texts: (M, Dt), class index (M,) -> (K, Dt), where K is `count`.

    Every class must have at least one text.
    """
    if count == len(vectors):
        return vectors
    sums = vectors.new_zeros(count, vectors.shape[1]).index_add(0, class_index, vectors)
    return F.normalize(sums, dim=1)


def _variant_index(class_index, count):
    """Positions of each class's texts, padded with the first: class index (M,), sorted -> (K, R), where K is `count`;
    None if every class has a single text."""
    if count == len(class_index):
        return None
    counts = torch.bincount(class_index, minlength=count)
    first = counts.cumsum(0) - counts  # (K,)
    offset = torch.arange(int(counts.max()))  # (R,)
    return first[:, None] + torch.where(offset < counts[:, None], offset, 0)


def _check_names(names):
    """The names as a list of strings; a UserError if the list is empty or has duplicates."""
    names = [str(name) for name in names]
    if not names:
        raise UserError("the list of classes is empty; name at least one class.")
    if len(set(names)) < len(names):
        duplicate = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"class {duplicate!r} is listed more than once; remove the duplicate.")
    return names


def _check_embeddings(names, means):
    """Raise UserError if two classes have identical embeddings (K, Dt)."""
    name_of = {}
    for name, row in zip(names, means):
        first_name = name_of.setdefault(row.numpy().tobytes(), name)
        if first_name != name:
            raise UserError(
                f"classes {first_name!r} and {name!r} have the same text embedding and cannot be distinguished; rename "
                "one of them."
            )
