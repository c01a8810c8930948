"""Compute text embeddings with a frozen open_clip text tower, from prompt templates or learnable context tokens."""

from functools import cached_property, lru_cache

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from ..clip import clip_fingerprint, load_clip
from ...errors import UserError
from .cache import cache_folder, cached_embeddings

_CHUNK = 256  # sentences per pass of the tower


class TextTower:
    """A source of text embeddings for ClassText that computes them.

    Deliberately not an nn.Module: the tower is frozen and fully determined by the config, so it does not belong in
    checkpoints, in the optimizer or in copies of the network. It is loaded on first use, and never if the cache has the
    embeddings of every list of names.

    Args:
        model, pretrained: see hiervl.modeling.clip.
        templates: sentences with {} for the text. A text's embedding is the normalized mean over all templates.
        definitions: {class name: its texts}.
        cache: cache folder, "" for the user's cache folder.
    Raises:
        UserError: a template without {}. On first use: weights that are unavailable, or a text that is too long.
    """

    def __init__(
        self,
        model: str,
        pretrained: str,
        templates: tuple[str, ...] = ("a photo of a {}",),
        definitions: dict[str, list[str]] = None,
        cache: str = "",
    ):
        if not templates:
            raise UserError('MODEL.TEXT.TEMPLATES is empty; set at least one template, for example "a photo of a {}".')
        for template in templates:
            if "{}" not in template:
                raise UserError(f"MODEL.TEXT.TEMPLATES: {template!r} has no {{}} for the name; add it.")
        self.model, self.pretrained = model, pretrained
        self.templates, self.definitions = tuple(templates), definitions or {}
        self.cache = cache_folder(cache)

    def __deepcopy__(self, memo):
        return self  # student and teacher share the tower

    def texts(self, name: str) -> list[str]:
        """The texts that describe a class; the name itself if it has no definitions."""
        return self.definitions.get(name, [name])

    def words(self, name: str) -> str:
        """The words that are embedded for a name: the name itself."""
        return name

    @cached_property
    def _clip(self):
        """The CLIP model without its image tower."""
        network = load_clip(self.model, self.pretrained, "MODEL.TEXT")
        del network.visual
        return network

    @property
    def _tokenizer(self):
        return _get_tokenizer(self.model)

    @property
    def _token_embedding(self):
        """The token embedding layer; None for text towers that open_clip takes from another library."""
        return getattr(getattr(self._clip, "text", self._clip), "token_embedding", None)

    @property
    def context_width(self) -> int:
        """Width of a context token; 0 if this tower does not support context tokens."""
        supported = isinstance(self._tokenizer, open_clip.SimpleTokenizer) and self._token_embedding is not None
        return self._token_embedding.embedding_dim if supported else 0

    def embed(self, texts: list[str], owners: list[str]) -> torch.Tensor:
        """Embeddings (M, Dt) of unit length of M texts, from the cache if available.

        Args:
            texts: the M texts.
            owners: the name of each text's class, for error messages.
        Raises:
            UserError: a text that is too long, or weights that are unavailable or give embeddings that are not finite.
        """
        identity = [self._fingerprint, self.templates]
        return cached_embeddings(self.cache, identity, texts, lambda: self._ensemble(texts, owners))

    @cached_property
    def _fingerprint(self):
        return clip_fingerprint(self.model, self.pretrained, "MODEL.TEXT")

    @torch.no_grad()
    def _ensemble(self, texts, owners):
        """Normalized mean over the prompt templates: M texts -> (M, Dt)."""
        sentences = [template.format(text) for text in texts for template in self.templates]
        owners = [owner for owner in owners for _ in self.templates]
        tokens = self._tokens(sentences, owners, self._clip.context_length)
        with torch.autocast(next(self._clip.parameters()).device.type, enabled=False):  # cached in float32
            vectors = torch.cat([self._encode(chunk).cpu() for chunk in tokens.split(_CHUNK)])
        if not torch.isfinite(vectors).all():
            raise UserError(
                f"{self.pretrained}: the embeddings of the text tower {self.model} are not finite; download its "
                "weights again (MODEL.TEXT.PRETRAINED)."
            )
        vectors = vectors.unflatten(0, (len(texts), len(self.templates))).mean(dim=1)  # (M*t, Dt) -> (M, Dt)
        return F.normalize(vectors, dim=1)

    def embed_in_context(self, texts: list[str], context: torch.Tensor) -> torch.Tensor:
        """Embeddings (M, Dt) of unit length of the sentences [context tokens] + text + ".", differentiable with
        respect to the context.

        Args:
            texts: the M texts.
            context: (P, width), the context tokens. The tower runs on their device.
        Raises:
            UserError: a text that is too long.
        """
        if not texts:
            return context.new_zeros(0, self.dim)
        self._clip.to(context.device)
        length = self._clip.context_length - len(context)
        tokens = self._tokens([f"{text}." for text in texts], texts, length).to(context.device)
        # Reserve P positions after the start token; the hook replaces their embeddings by the context.
        tokens = torch.cat((tokens[:, :1].expand(-1, 1 + len(context)), tokens[:, 1:]), dim=1)
        handle = self._token_embedding.register_forward_hook(lambda module, inputs, out: _insert(out, context))
        try:
            return torch.cat([self._encode(chunk) for chunk in tokens.split(_CHUNK)])
        finally:
            handle.remove()

    @property
    def dim(self) -> int:
        """Dt, the width of the text embeddings."""
        projection = getattr(self._clip, "text", self._clip).text_projection
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    def _encode(self, tokens):
        """Token ids (M, L) -> embeddings (M, Dt) of unit length, float32."""
        return self._clip.encode_text(tokens.to(next(self._clip.parameters()).device), normalize=True).float()

    def _tokens(self, sentences, owners, length):
        """Token ids (M, length) of the sentences.

        Raises:
            UserError: a sentence of more than `length` tokens, which the tokenizer would truncate silently.
        """
        max_bytes = max(len(sentence.encode()) for sentence in sentences)
        # A text has at most as many tokens as bytes, plus a few special ones: every row of this width ends in padding.
        untruncated = self._tokenizer(sentences, context_length=length + max_bytes + 8)
        # Tokens before the padding: the position of the last token that differs from the padding, plus 1.
        num_tokens = (untruncated[:, :-1] != untruncated[:, -2:-1]).int().cumsum(1).argmax(1) + 1  # (M,)
        too_long = (num_tokens > length).nonzero().flatten().tolist()
        if too_long:
            i = too_long[0]
            raise UserError(
                f"MODEL.TEXT: class {owners[i]!r}: {sentences[i]!r} has {int(num_tokens[i])} tokens, but the tower "
                f"accepts {length}; shorten it."
            )
        return self._tokenizer(sentences, context_length=length)


@lru_cache
def _get_tokenizer(model):
    """The tokenizer, cached because reading its vocabulary takes longer than embedding most lists of names."""
    return open_clip.get_tokenizer(model)


def _insert(embedded, context):
    """Replace the P embeddings after the start token of (M, L, W) by the context (P, W)."""
    context = context.to(embedded.dtype).expand(len(embedded), -1, -1)
    return torch.cat((embedded[:, :1], context, embedded[:, 1 + context.shape[1] :]), dim=1)
