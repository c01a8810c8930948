"""Look up text embeddings in files, for machines without a text tower.

A file (.npz) holds `names` (M,) and `embeddings` (M, Dt). Optional arrays are:

    texts (M,): the words that were embedded, if they are not the names ("sidewalk" for "pavement").
    class_index (M,): for files with several texts per class, each row's position in the dataset's list of classes.
    model: the name of the model that computed the embeddings.
"""

import difflib
import zipfile
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import UserError
from ...paths import find_file


@dataclass
class _File:
    """The content of one embeddings file."""

    path: str
    rows: dict[str, int]  # row of each name and of each text
    embeddings: torch.Tensor  # (M, Dt)
    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    class_index: np.ndarray | None = None
    model: str = ""


class EmbeddingTable:
    """A source of text embeddings for ClassText that looks them up in files.

    The files are searched in order, in each file first `names`, then `texts`.

    Args:
        path: the dataset's embeddings file.
        class_names: the dataset's classes, to which `class_index` refers.
        extra: more files with embeddings of other words, made by the same model.
        definitions: {class name: its texts}; takes precedence over `class_index`.
    Raises:
        UserError: a missing or unreadable file, files made by different models, or a class_index that does not fit.
    """

    context_width = 0  # no learnable context, which needs a text tower

    def __init__(
        self, path: str, class_names: list[str], extra: tuple[str, ...] = (), definitions: dict[str, list[str]] = None
    ):
        self.files = [_load(path, "MODEL.TEXT.EMBEDDINGS"), *(_load(p, "MODEL.TEXT.EXTRA_EMBEDDINGS") for p in extra)]
        _check_same_model(self.files)
        self.definitions = {**_definitions_from_index(self.files[0], class_names), **(definitions or {})}

    @classmethod
    def from_tensor(cls, embeddings: torch.Tensor, names: list[str]) -> "EmbeddingTable":
        """A table with one embedding per name: (K, Dt) and K names."""
        table = cls.__new__(cls)
        table.files = [_File("embeddings", {name: i for i, name in enumerate(names)}, embeddings.float(), names, names)]
        table.definitions = {}
        return table

    def texts(self, name: str) -> list[str]:
        """The texts that describe a class; the name itself if it has no definitions."""
        return self.definitions.get(name, [name])

    def words(self, name: str) -> str:
        """The words that were embedded for a name; the name itself if it is in no file."""
        match = self._find(name)
        if match is None:
            return name
        file, row = match
        return file.texts[row]

    def embed(self, texts: list[str], owners: list[str]) -> torch.Tensor:
        """Embeddings (M, Dt) of unit length of M texts.

        Args:
            texts: the M texts.
            owners: the name of each text's class, for error messages.
        Raises:
            UserError: a text that is in no file, or an embedding that is zero or not finite.
        """
        matches = [self._find(text) for text in texts]
        missing = [i for i, match in enumerate(matches) if match is None]
        if missing:
            self._raise_missing([texts[i] for i in missing], owners[missing[0]], len(texts))
        if not texts:
            return torch.zeros(0, self.files[0].embeddings.shape[1])
        rows = torch.stack([file.embeddings[row] for file, row in matches])
        invalid = ~torch.isfinite(rows).all(dim=1) | (rows.norm(dim=1) < 1e-6)  # (M,)
        if invalid.any():
            i = int(invalid.nonzero()[0])
            raise UserError(
                f"{matches[i][0].path}: the embedding of {texts[i]!r} is zero or not finite; create the file again."
            )
        return F.normalize(rows, dim=1)

    def _find(self, text):
        """(file, row) of a name or text in the first file that has it, or None."""
        return next(((file, file.rows[text]) for file in self.files if text in file.rows), None)

    def _raise_missing(self, missing, owner, total):
        available = [name for file in self.files for name in file.rows]
        similar = difflib.get_close_matches(missing[0], available, n=3)
        text = "" if owner == missing[0] else f", text {missing[0]!r}"
        no_definitions = ", or set MODEL.TEXT.DEFINITIONS to '' to use the class names alone" if text else ""
        raise UserError(
            f"{self.files[0].path}: no text embedding for {owner!r}{text} ({len(missing)} of {total} missing; similar: "
            f"{', '.join(similar) or 'none'}); create a file with these names (datasets/README.md), or add a file that "
            f"has them to MODEL.TEXT.EXTRA_EMBEDDINGS{no_definitions}."
        )


def _definitions_from_index(file, class_names):
    """{class name: its texts} from the class_index of a file; empty if the file has none."""
    if file.class_index is None:
        return {}
    index = file.class_index
    if set(index.tolist()) != set(range(len(class_names))):
        raise UserError(
            f"{file.path}: class_index refers to {len(set(index.tolist()))} classes, but the dataset has "
            f"{len(class_names)}; use the file made for this dataset."
        )
    return {name: [file.names[row] for row in np.flatnonzero(index == k)] for k, name in enumerate(class_names)}


def _check_same_model(files):
    """Raise UserError if the files' embeddings differ in width or come from different models."""
    first = files[0]
    for extra in files[1:]:
        width, expected = extra.embeddings.shape[1], first.embeddings.shape[1]
        if width != expected:
            raise UserError(
                f"{extra.path}: the embeddings have width {width}, but those of {first.path} have width {expected}; "
                "use files made by the same model."
            )
        if first.model and extra.model and first.model != extra.model:
            raise UserError(
                f"{extra.path}: made by {extra.model}, but {first.path} was made by {first.model}; use files made by "
                "the same model."
            )


def _load(path, key):
    """Read an embeddings file that the config key names."""
    try:
        with np.load(find_file(path), allow_pickle=False) as data:
            names = [str(name).strip() for name in data["names"]]
            texts = [str(text).strip() for text in data["texts"]] if "texts" in data else names
            embeddings = torch.from_numpy(data["embeddings"].astype(np.float32))
            index = data["class_index"] if "class_index" in data else None
            model = str(data["model"]) if "model" in data else ""
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such embeddings file ({key}); create one as described in datasets/README.md, or set "
            "MODEL.DECODER.CLASSIFIER to linear."
        ) from None
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not an embeddings file ({' '.join(str(error).split())}); it needs the arrays "
            "names and embeddings."
        ) from None
    lengths = {len(names), len(texts), len(embeddings), len(names if index is None else index)}
    if embeddings.dim() != 2 or len(lengths) != 1:
        raise UserError(
            f"{path}: embeddings have the shape {tuple(embeddings.shape)}, but {len(names)} names need "
            f"({len(names)}, width), and texts and class_index need {len(names)} entries; create the file again."
        )
    # Names take precedence over texts, and the first of two equal entries over the second: later entries overwrite
    # earlier ones, so the order of insertion is reversed.
    rows = {}
    for words in (texts, names):
        for row in reversed(range(len(words))):
            rows[words[row]] = row
    return _File(path, rows, embeddings, names, texts, index, model)
