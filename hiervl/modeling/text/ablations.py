"""Texts that mean nothing, for control experiments (MODEL.TEXT.ABLATION): what remains of what language brings?"""

import zlib

import torch
import torch.nn.functional as F

from ...errors import UserError


class RandomTexts:
    """A source of texts like another one; every text has a random unit vector of its own, the same in every run."""

    context_width = 0  # a tower would bring meaning back

    def __init__(self, source):
        self._source, self.texts, self.words = source, source.texts, source.words

    def embed(self, texts, owners):
        """(M, Dt) of unit length."""
        width = self._source.embed(texts, owners).shape[1]
        generators = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
        rows = [torch.randn(width, generator=generator) for generator in generators]
        return F.normalize(torch.stack(rows), dim=1) if rows else torch.zeros(0, width)


class PermutedTexts:
    """A source in which every class has the texts of the next one."""

    def __init__(self, source, class_names):
        self._source, self._other = source, dict(zip(class_names, [*class_names[1:], class_names[0]]))
        self.context_width, self.embed = source.context_width, source.embed
        self.embed_in_context = getattr(source, "embed_in_context", None)

    def texts(self, name):
        return self._source.texts(self._other.get(name, name))

    def words(self, name):
        return self._source.words(self._other.get(name, name))


def ablate_texts(source, control: str, class_names: list):
    """The source itself for "none".

    Raises:
        UserError: an unknown control.
    """
    if control not in ("none", "random", "permuted"):
        raise UserError(f"MODEL.TEXT.ABLATION: {control!r} is not one of none, random, permuted.")
    if control == "random":
        return RandomTexts(source)
    return PermutedTexts(source, list(class_names)) if control == "permuted" else source
