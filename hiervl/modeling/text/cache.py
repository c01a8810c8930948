"""Cache text embeddings on disk, so that a text tower has to embed each list of names only once.

A file holds the embeddings of one list of texts. Its name is a hash of everything that determines them. Files are
written atomically; one that is damaged or does not fit is computed again.
"""

import hashlib
import json
import logging
import os
import zipfile

import numpy as np
import torch

from ...checkpoint import atomic_write
from ...errors import UserError

logger = logging.getLogger(__name__)


def cache_folder(folder: str = "") -> str:
    """`folder`, or if it is empty, hiervl under XDG_CACHE_HOME (~/.cache if that is not set)."""
    return folder or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "hiervl")


def cached_embeddings(folder: str, identity: list, texts: list[str], compute) -> torch.Tensor:
    """Embeddings (M, Dt) float32 of M texts: read from the cache, or computed and written to it.

    Args:
        folder: cache folder, created if missing.
        identity: JSON-serializable description of the model and settings that embed the texts.
        texts: the M texts.
        compute: function without arguments that returns the embeddings (M, Dt).
    """
    key = hashlib.sha256(json.dumps([identity, texts]).encode()).hexdigest()
    path = os.path.join(folder, f"text-{key[:40]}.npz")
    embeddings = _read(path, texts)
    if embeddings is None:
        embeddings = compute()
        _write(path, texts, embeddings)
    return embeddings


def _read(path, texts):
    """The embeddings of `texts` in the file, or None if it is missing, damaged or does not fit."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            stored_texts, embeddings = [str(text) for text in data["texts"]], torch.from_numpy(data["embeddings"])
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: damaged cache file, computing the text embeddings again (%s)", path, error)
        return None
    fits = stored_texts == texts and embeddings.dim() == 2 and len(embeddings) == len(texts)
    if not fits or not torch.isfinite(embeddings).all():
        logger.warning("%s: cache file does not fit, computing the text embeddings again", path)
        return None
    return embeddings.float()


def _write(path, texts, embeddings):
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, texts=np.array(texts), embeddings=embeddings.numpy())
    except (OSError, UserError) as error:  # the run can continue without the cache
        logger.warning(
            "%s: cannot write the text embedding cache (%s); set MODEL.TEXT.CACHE to another folder",
            path,
            error.__cause__ or error,
        )
