"""Texts without the right meaning, to measure what language contributes (MODEL.TEXT.ABLATION)."""

import zlib

import torch
import torch.nn.functional as F

from ...errors import UserError


class RandomTexts:
    """Wraps a text source and replaces every text's embedding by a random unit vector, the same in every run."""

    context_width = 0  # no learnable context, as embeddings from a text tower would restore the meaning

    def __init__(self, source):
        self._source, self.texts, self.words = source, source.texts, source.words

    def embed(self, texts, owners):
        """M texts and the class of each -> (M, Dt) of unit length. Texts unknown to the source are refused."""
        width = self._source.embed(texts, owners).shape[1]
        generators = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
        rows = [torch.randn(width, generator=generator) for generator in generators]
        return F.normalize(torch.stack(rows), dim=1) if rows else torch.zeros(0, width)


class PermutedTexts:
    """Wraps a text source and gives every class the texts of the next class in the list."""

    def __init__(self, source, class_names):
        self._source = source
        self._next_class = dict(zip(class_names, [*class_names[1:], class_names[0]]))
        self.context_width, self.embed = source.context_width, source.embed
        self.embed_in_context = getattr(source, "embed_in_context", None)

    def texts(self, name):
        """The texts of the next class; those of the name itself if it is not one of the classes."""
        return self._source.texts(self._next_class.get(name, name))

    def words(self, name):
        """The embedded words of the next class; those of the name itself if it is not one of the classes."""
        return self._source.words(self._next_class.get(name, name))


def ablate_texts(source, ablation: str, class_names: list):
    """Wrap a text source for MODEL.TEXT.ABLATION; "none" returns the source itself.

    Args:
        source: EmbeddingTable or TextTower.
        ablation: "none", "random" or "permuted".
        class_names: the classes to permute.
    Raises:
        UserError: an unknown ablation.
    """
    if ablation == "none":
        return source
    if ablation == "random":
        return RandomTexts(source)
    if ablation == "permuted":
        return PermutedTexts(source, list(class_names))
    raise UserError(f"MODEL.TEXT.ABLATION: {ablation!r} is not one of none, random, permuted.")
