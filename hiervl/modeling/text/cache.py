"""Text embeddings on disk, so that a text tower reads each list of names once.

A file holds the embeddings of one list of texts, under a hash of everything that decides them. Files are written
whole or not at all; one that cannot be read or does not fit is made anew.
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
    """`folder`, or hiervl under XDG_CACHE_HOME (~/.cache when that is not set)."""
    return folder or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "hiervl")


def cached_embeddings(folder: str, identity: list, texts: list[str], compute) -> torch.Tensor:
    """(M, Dt) float32: read from the cache, or `compute()`d and written to it.

    identity: JSON-able description of what embeds the texts.
    """
    key = hashlib.sha256(json.dumps([identity, texts]).encode()).hexdigest()
    path = os.path.join(folder, f"text-{key[:40]}.npz")
    embeddings = _read(path, texts)
    if embeddings is None:
        embeddings = compute()
        _write(path, texts, embeddings)
    return embeddings


def _read(path, texts):
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            stored, embeddings = [str(text) for text in data["texts"]], torch.from_numpy(data["embeddings"])
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: a damaged file of the cache is made anew (%s)", path, error)
        return None
    fits = stored == texts and embeddings.dim() == 2 and len(embeddings) == len(texts)
    if not fits or not torch.isfinite(embeddings).all():
        logger.warning("%s: a file of the cache that does not fit is made anew", path)
        return None
    return embeddings.float()


def _write(path, texts, embeddings):
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, texts=np.array(texts), embeddings=embeddings.numpy())
    except (OSError, UserError) as error:  # the run can go on without it
        logger.warning(
            "%s: text embeddings cannot be kept (%s); name another folder in MODEL.TEXT.CACHE",
            path,
            error.__cause__ or error,
        )
