"""ClassText: class embeddings T (K, Dt) for any list of names.

CLIP's text vectors lie in a narrow cone (cosines of 0.7 to 0.9 between street classes), which leaves a cosine
classifier little room; a fixed mean is subtracted and the result normalized again. The mean belongs to the trained
weights (it defines the space in which they were trained), so it is kept in the checkpoint, with the adapter and the
context tokens; the embeddings are not: they are computed or looked up for the names at hand.
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
    """
    Args:
        source: what gives the embeddings: EmbeddingTable or TextTower. A tensor (K, Dt) is a table of the class names.
        class_names: the classes, "class 0", "class 1", ... by default.
        center: subtract the mean of the first list of classes. With one class there is nothing to tell apart, and the
            mean would be the class itself: it is left at zero.
        adapter: adapt the space, T' = norm(T + gamma A(T)).
        context_tokens: P learnable tokens before every name instead of the prompt templates (needs a TextTower).
        distractors: words that are no class, to learn relevance from; class names among them are left out.
    Raises:
        UserError: a name given twice, without an embedding, or too long for the tower.
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
        self.source, self._all_distractors, self._in_context = source, list(distractors), {}
        names = _check_names(class_names)
        raw, index = self._look_up(names)
        means = _class_means(raw, index, len(names))
        self.register_buffer("mean", means.mean(dim=0) if center and len(names) > 1 else torch.zeros(raw.shape[1]))
        for name in ("raw", "class_index", "raw_distractors"):  # (M, Dt), (M,), (V, Dt)
            self.register_buffer(name, None, persistent=False)
        self._hold(names, raw, index)
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
                "MODEL.TEXT.EXTRA_EMBEDDINGS: goes with MODEL.TEXT.EMBEDDINGS, which is empty; a "
                "text tower embeds any word."
            )
        else:
            source = TextTower(
                options.MODEL, options.PRETRAINED, read_templates(options.TEMPLATES), definitions, options.CACHE
            )
        words = read_lines(options.DISTRACTORS, "MODEL.TEXT.DISTRACTORS") if options.DISTRACTORS else ()
        if options.ABLATION == "random" and options.CONTEXT_TOKENS:
            raise UserError(
                "MODEL.TEXT.ABLATION random takes the tower away that MODEL.TEXT.CONTEXT_TOKENS needs; set "
                "the one to none or the other to 0."
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
        """Dt."""
        return self.mean.shape[0]

    def set_classes(self, names: list[str]) -> None:
        """Another list of names from the same source; mean, adapter and context stay as they are."""
        names = _check_names(names)
        self._hold(names, *self._look_up(names))

    def _hold(self, names, raw, index):
        _check_embeddings(names, _class_means(raw, index, len(names)))
        taken = {
            text.casefold() for name in names for text in (name, self.source.words(name), *self.source.texts(name))
        }
        words = [w for w in self._all_distractors if not {w.casefold(), self.source.words(w).casefold()} & taken]
        distractors = self.source.embed(words, words) if words else raw[:0]
        device = self.mean.device
        self.raw, self.class_index, self.raw_distractors = raw.to(device), index.to(device), distractors.to(device)
        self.class_names, self._distractors, self._in_context = names, words, {}

    def forward(self):
        """T' (K, Dt) float32 of unit length: centerd and adapted. Gradients flow to adapter and context."""
        with self._float32():
            return self._finish(_class_means(self._embeddings("raw"), self.class_index, len(self.class_names)))

    @torch.no_grad()
    def anchors(self):
        """T0 (K, Dt): the same without adapter and context, frozen."""
        with self._float32():
            return self._center(_class_means(self.raw, self.class_index, len(self.class_names)))

    def definitions(self):
        """All texts of all classes (M, Dt), centerd and adapted, and the class of each (M,)."""
        with self._float32():
            return self._finish(self._embeddings("raw")), self.class_index

    def variants(self):
        """The classes' texts as a rectangle (K, R, Dt), R being the most texts of one class; a class with fewer repeats
        its first. None if every class has one text, its T'."""
        texts, index = self.definitions()
        counts = torch.bincount(index, minlength=len(self.class_names))
        if len(texts) == len(counts):
            return None
        first = counts.cumsum(0) - counts  # texts stand class by class
        place = torch.arange(int(counts.max()), device=texts.device)
        return texts[first[:, None] + torch.where(place < counts[:, None], place, 0)]

    def distractors(self):
        """The words that are no class, V of them, and their embeddings (V, Dt), centerd and adapted."""
        with self._float32():
            return list(self._distractors), self._finish(self._embeddings("raw_distractors"))

    def _look_up(self, names):
        pairs = [(text, name, k) for k, name in enumerate(names) for text in self.source.texts(name)]
        texts, owners, index = zip(*pairs)
        return self.source.embed(list(texts), list(owners)), torch.tensor(index)

    def _make_context(self, count):
        if not self.source.context_width:
            raise UserError(
                "MODEL.TEXT.CONTEXT_TOKENS: needs a CLIP text tower; leave MODEL.TEXT.EMBEDDINGS empty, or set it to 0."
            )
        context = nn.Embedding(count, self.source.context_width)
        nn.init.normal_(context.weight, std=0.02)  # as the tower's own token embeddings were
        return context

    def _embeddings(self, kind):
        """Embeddings of the classes' texts ("raw") or of the distractors, in the learnable context if there is one."""
        if self.context_embed is None:
            return getattr(self, kind)
        texts = (
            self._distractors
            if kind == "raw_distractors"
            else [text for name in self.class_names for text in self.source.texts(name)]
        )
        context = self.context_embed.weight
        if torch.is_grad_enabled():
            return self.source.embed_in_context(texts, context)
        # Evaluation asks for every image: the tower runs again only when the context has changed.
        known = self._in_context.get(kind)
        if known is None or known[0].device != context.device or not torch.equal(known[0], context):
            known = self._in_context[kind] = (context.detach().clone(), self.source.embed_in_context(texts, context))
        return known[1]

    def _finish(self, vectors):
        centerd = self._center(vectors)
        return self.adapter(centerd) if self.adapter is not None else centerd

    def _center(self, vectors):
        return F.normalize(vectors - self.mean, dim=1)

    def _float32(self):
        """T is small and everything is compared with it: no autocast."""
        return torch.autocast(self.mean.device.type, enabled=False)


def _class_means(vectors, class_index, count):
    """Texts (M, Dt) of unit length -> `count` classes (K, Dt) of unit length, each with at least one text."""
    if count == len(vectors):
        return vectors
    sums = vectors.new_zeros(count, vectors.shape[1]).index_add(0, class_index, vectors)
    return F.normalize(sums, dim=1)


def _check_names(names):
    names = [str(name) for name in names]
    if not names:
        raise UserError("the list of classes is empty.")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"class {twice!r} is given twice.")
    return names


def _check_embeddings(names, means):
    """Refuse classes that nothing tells apart."""
    seen = {}
    for name, row in zip(names, means):
        other = seen.setdefault(row.numpy().tobytes(), name)
        if other != name:
            raise UserError(f"classes {other!r} and {name!r} have the same text embedding: nothing tells them apart.")
