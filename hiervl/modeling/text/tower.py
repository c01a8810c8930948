"""Embeddings of names from an open_clip text tower: frozen, with a prompt ensemble or learnable context tokens."""

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
    """A source of text embeddings (see ClassText) that computes them.

    No nn.Module on purpose: the tower is frozen and told by its hash, so it belongs in no checkpoint, optimizer or
    copy of the network. It is loaded when it is first needed: not at all if every list of names is in the cache.

    Args:
        model, pretrained: see hiervl.modeling.clip.
        templates: sentences with {} for the text; a text's embedding is the normalized mean over them.
        definitions: {class name: its texts}. cache: folder, "" for the user's cache.
    Raises:
        UserError: weights that cannot be had (once they are needed), a text that is too long.
    """

    def __init__(
        self,
        model: str,
        pretrained: str,
        templates: tuple[str, ...] = ("a photo of a {}",),
        definitions: dict[str, list[str]] = None,
        cache: str = "",
    ):
        bad = [t for t in templates if "{}" not in t]
        if bad or not templates:
            raise UserError(
                f"MODEL.TEXT.TEMPLATES: {bad[0]!r} has no {{}} for the name."
                if bad
                else "MODEL.TEXT.TEMPLATES: there is none."
            )
        self.model, self.pretrained = model, pretrained
        self.templates, self.definitions = tuple(templates), definitions or {}
        self.cache = cache_folder(cache)

    def __deepcopy__(self, memo):
        return self

    def texts(self, name: str) -> list[str]:
        """The texts that stand for a class."""
        return self.definitions.get(name, [name])

    def words(self, name: str) -> str:
        """The words that are embedded for a name."""
        return name

    @cached_property
    def _clip(self):
        network = load_clip(self.model, self.pretrained, "MODEL.TEXT")
        del network.visual
        return network

    @property
    def _tokenizer(self):
        return _get_tokenizer(self.model)

    @property
    def _token_embedding(self):
        """The embedding of tokens, None for towers that are not open_clip's own."""
        return getattr(getattr(self._clip, "text", self._clip), "token_embedding", None)

    @property
    def context_width(self) -> int:
        """Width of a context token; 0: this tower takes none."""
        own = isinstance(self._tokenizer, open_clip.SimpleTokenizer) and self._token_embedding is not None
        return self._token_embedding.embedding_dim if own else 0

    def embed(self, texts: list[str], owners: list[str]) -> torch.Tensor:
        """(M, Dt) of unit length, from the cache if it has them. owners: each text's class, for errors."""
        identity = [self._fingerprint, self.templates]
        return cached_embeddings(self.cache, identity, texts, lambda: self._ensemble(texts, owners))

    @cached_property
    def _fingerprint(self):
        return clip_fingerprint(self.model, self.pretrained, "MODEL.TEXT")

    @torch.no_grad()
    def _ensemble(self, texts, owners):
        sentences = [template.format(text) for text in texts for template in self.templates]
        owners = [owner for owner in owners for _ in self.templates]
        tokens = self._tokens(sentences, owners, self._clip.context_length)
        with torch.autocast(next(self._clip.parameters()).device.type, enabled=False):  # what is cached is float32
            vectors = torch.cat([self._encode(chunk).cpu() for chunk in tokens.split(_CHUNK)])
        if not torch.isfinite(vectors).all():
            raise UserError(
                f"{self.pretrained}: the text tower {self.model} gives embeddings that are not finite; get "
                "its weights anew (MODEL.TEXT.PRETRAINED)."
            )
        vectors = vectors.unflatten(0, (len(texts), len(self.templates))).mean(dim=1)  # (M·t, Dt) -> (M, Dt)
        return F.normalize(vectors, dim=1)

    def embed_in_context(self, texts: list[str], context: torch.Tensor) -> torch.Tensor:
        """(M, Dt) of unit length of the sentences [context tokens] + text + ".", differentiable in the context.

        context: (P, width), on the device on which the tower is to run.
        """
        if not texts:
            return context.new_zeros(0, self.dim)
        self._clip.to(context.device)
        length = self._clip.context_length - len(context)
        tokens = self._tokens([f"{text}." for text in texts], texts, length).to(context.device)
        # A stand-in for each context token, behind the start token; the hook puts the context in its place.
        tokens = torch.cat((tokens[:, :1].expand(-1, 1 + len(context)), tokens[:, 1:]), dim=1)
        handle = self._token_embedding.register_forward_hook(lambda module, inputs, out: _insert(out, context))
        try:
            return torch.cat([self._encode(chunk) for chunk in tokens.split(_CHUNK)])
        finally:
            handle.remove()

    @property
    def dim(self) -> int:
        """Dt."""
        projection = getattr(self._clip, "text", self._clip).text_projection
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    def _encode(self, tokens):
        return self._clip.encode_text(tokens.to(next(self._clip.parameters()).device), normalize=True).float()

    def _tokens(self, sentences, owners, length):
        """(M, length) token ids; a sentence that would be cut is an error that names the class."""
        longest = max(len(sentence.encode()) for sentence in sentences)
        # No text has more tokens than bytes, and the towers' special tokens are few: these rows end in padding.
        wide = self._tokenizer(sentences, context_length=length + longest + 8)
        used = (wide[:, :-1] != wide[:, -2:-1]).int().cumsum(1).argmax(1) + 1  # (M,) tokens up to the padding
        for i in (used > length).nonzero().flatten().tolist():
            raise UserError(
                f"MODEL.TEXT: class {owners[i]!r}: {sentences[i]!r} has {int(used[i])} tokens, the tower "
                f"reads {length}; shorten it."
            )
        return self._tokenizer(sentences, context_length=length)


@lru_cache
def _get_tokenizer(model):
    """Its vocabulary takes longer to read than most lists of names to embed."""
    return open_clip.get_tokenizer(model)


def _insert(embedded, context):
    """Put the context (P, W) behind the start token of (M, L, W)."""
    context = context.to(embedded.dtype).expand(len(embedded), -1, -1)
    return torch.cat((embedded[:, :1], context, embedded[:, 1 + context.shape[1] :]), dim=1)
