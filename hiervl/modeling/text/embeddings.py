"""Embeddings of names from files, for machines without a text tower.

A file (.npz) holds `names` (M,) and `embeddings` (M, Dt), optionally `texts` (M,), the words that were embedded where
they are not the names ("sidewalk" for "pavement"), and `class_index` (M,): then it holds several texts per class,
in the order of the class list.
"""

import difflib
import zipfile
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import UserError


@dataclass
class _File:
    path: str
    rows: dict[str, int]  # name, or the words that were embedded -> row
    embeddings: torch.Tensor  # (M, Dt)
    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    class_index: np.ndarray | None = None
    model: str = ""


class EmbeddingTable:
    """A source of text embeddings (see ClassText) that looks them up.

    A name is looked for in one file after the other, in each first among `names`, then among `texts`.

    Args:
        path: the data set's embeddings file. extra: further files, for other words of the same space.
        class_names: the classes of a file with `class_index`.
        definitions: {class name: its texts}.
    Raises:
        UserError: a missing or unreadable file, files of different spaces, a class_index that does not fit.
    """

    context_width = 0  # learnable context needs a tower

    def __init__(
        self, path: str, class_names: list[str], extra: tuple[str, ...] = (), definitions: dict[str, list[str]] = None
    ):
        self.files = [_load(path, "MODEL.TEXT.EMBEDDINGS"), *(_load(p, "MODEL.TEXT.EXTRA_EMBEDDINGS") for p in extra)]
        _check_one_space(self.files)
        self.definitions = {**_indexed(self.files[0], class_names), **(definitions or {})}

    @classmethod
    def from_tensor(cls, embeddings: torch.Tensor, names: list[str]) -> "EmbeddingTable":
        """A table of (K, Dt) embeddings, one per name."""
        table = cls.__new__(cls)
        table.files = [_File("embeddings", {name: i for i, name in enumerate(names)}, embeddings.float(), names, names)]
        table.definitions = {}
        return table

    def texts(self, name: str) -> list[str]:
        """The texts that stand for a class."""
        return self.definitions.get(name, [name])

    def words(self, name: str) -> str:
        """The words that were embedded for a name."""
        file, row = self._find(name) or (None, None)
        return file.texts[row] if file else name

    def embed(self, texts: list[str], owners: list[str]) -> torch.Tensor:
        """(M, Dt) of unit length. owners: for each text the name of its class, for errors.

        Raises:
            UserError: a text that no file has, a vector of zeros or NaN.
        """
        found = [self._find(text) for text in texts]
        missing = [i for i, place in enumerate(found) if place is None]
        if missing:
            self._raise_missing([texts[i] for i in missing], owners[missing[0]], len(texts))
        if not texts:
            return torch.zeros(0, self.files[0].embeddings.shape[1])
        rows = torch.stack([file.embeddings[row] for file, row in found])
        for i in (~torch.isfinite(rows).all(dim=1) | (rows.norm(dim=1) < 1e-6)).nonzero().flatten().tolist():
            raise UserError(
                f"{found[i][0].path}: the embedding of {texts[i]!r} is zero or not finite; make the file anew."
            )
        return F.normalize(rows, dim=1)

    def _find(self, text):
        return next(((file, file.rows[text]) for file in self.files if text in file.rows), None)

    def _raise_missing(self, missing, owner, total):
        known = [name for file in self.files for name in file.rows]
        near = difflib.get_close_matches(missing[0], known, n=3)
        text = "" if owner == missing[0] else f", text {missing[0]!r}"
        way_out = ", or without texts of their own set MODEL.TEXT.DEFINITIONS to ''" if text else ""
        raise UserError(
            f"{self.files[0].path}: no text embedding for {owner!r}{text} ({len(missing)} missing of "
            f"{total}; similar: {', '.join(near) or 'none'}); make a file for these names, see "
            f"datasets/README.md, or name one that has them in MODEL.TEXT.EXTRA_EMBEDDINGS{way_out}."
        )


def _indexed(file, class_names):
    """{class: its texts} of a file with class_index."""
    if file.class_index is None:
        return {}
    index = file.class_index
    if set(index.tolist()) != set(range(len(class_names))):
        raise UserError(
            f"{file.path}: class_index names {len(set(index.tolist()))} classes, the data set has {len(class_names)}."
        )
    return {name: [file.names[row] for row in np.flatnonzero(index == k)] for k, name in enumerate(class_names)}


def _check_one_space(files):
    first = files[0]
    for other in files[1:]:
        width, wanted = other.embeddings.shape[1], first.embeddings.shape[1]
        if width != wanted:
            raise UserError(
                f"{other.path}: its embeddings have {width} numbers, those of {first.path} {wanted}; use "
                "files made by one model."
            )
        if first.model and other.model and first.model != other.model:
            raise UserError(
                f"{other.path}: made by {other.model}, {first.path} by {first.model}; use files made by one model."
            )


def _load(path, key):
    try:
        with np.load(path, allow_pickle=False) as data:
            names = [str(name).strip() for name in data["names"]]
            texts = [str(text).strip() for text in data["texts"]] if "texts" in data else names
            embeddings = torch.from_numpy(data["embeddings"].astype(np.float32))
            index = data["class_index"] if "class_index" in data else None
            model = str(data["model"]) if "model" in data else ""
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such embeddings file ({key}); make one as datasets/README.md says, or choose "
            "MODEL.DECODER.CLASSIFIER linear."
        ) from None
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not an embeddings file ({' '.join(str(error).split())}); it needs the arrays "
            "names and embeddings."
        ) from None
    lengths = {len(names), len(texts), len(embeddings), len(names if index is None else index)}
    if embeddings.dim() != 2 or len(lengths) != 1:
        raise UserError(
            f"{path}: embeddings have the shape {tuple(embeddings.shape)}, {len(names)} names need "
            f"({len(names)}, width)."
        )
    # Later entries win: names over texts, and the first of two that are alike.
    rows = {text: i for words in (texts, names) for i, text in reversed(list(enumerate(words)))}
    return _File(path, rows, embeddings, names, texts, index, model)
