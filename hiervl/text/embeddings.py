"""Class embeddings T (K, Dt), of unit length, read from an embeddings file.

CLIP's text vectors lie in a narrow cone (cosines of 0.7 to 0.9 between street classes), which leaves a cosine
classifier little room; a fixed mean is subtracted and the result normalised again. The mean belongs to the trained
weights (it defines the space in which they were trained), so it is kept in the checkpoint; T is not.
"""
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from ..errors import UserError


class ClassText(nn.Module):
    """Holds T for a list of class names.

    Args:
        embeddings: (K, Dt) float, one row per class.
        center: subtract the mean of the embeddings. With one class there is nothing to tell apart, and the mean
            would be the class itself: it is left at zero.
    """

    @configurable
    def __init__(self, embeddings: torch.Tensor, *, center: bool = True):
        super().__init__()
        embeddings = F.normalize(embeddings.float(), dim=1)
        mean = embeddings.mean(dim=0) if center and len(embeddings) > 1 else torch.zeros(embeddings.shape[1])
        self.register_buffer("mean", mean)
        self.register_buffer("raw", embeddings, persistent=False)

    @classmethod
    def from_config(cls, cfg, class_names):
        if not cfg.MODEL.TEXT.EMBEDDINGS:
            raise UserError("MODEL.TEXT.EMBEDDINGS is empty: name an .npz file of text embeddings, or choose "
                            "MODEL.DECODER.CLASSIFIER linear.")
        return {"embeddings": read_embeddings(cfg.MODEL.TEXT.EMBEDDINGS, class_names),
                "center": cfg.MODEL.TEXT.CENTER}

    @property
    def dim(self) -> int:
        return self.raw.shape[1]

    def forward(self):
        """Return T (K, Dt), centred, of unit length."""
        return F.normalize(self.raw - self.mean, dim=1)


def read_embeddings(path: str, class_names: list[str]) -> torch.Tensor:
    """Read the rows of `class_names` from an .npz file with `names` (M,) and `embeddings` (M, Dt).

    With `class_index` (M,) the file holds several texts per class (definitions), listed in the order of
    `class_names`; their normalised mean is returned.

    Raises:
        UserError: a missing or unreadable file, a class without an embedding, a vector of zeros or NaN.
    """
    names, vectors, class_index = _load(path)
    vectors = F.normalize(torch.from_numpy(vectors.astype(np.float32)), dim=1)
    if class_index is None:
        row = {name: i for i, name in reversed(list(enumerate(names)))}
        missing = [name for name in class_names if name not in row]
        if missing:
            raise UserError(f"{path}: no text embedding for class {missing[0]!r} ({len(missing)} missing of "
                            f"{len(class_names)}); make a file for these names, see datasets/README.md.")
        rows = vectors[[row[name] for name in class_names]]
    else:
        if len(set(class_index.tolist())) != len(class_names) or class_index.max() >= len(class_names):
            raise UserError(f"{path}: class_index names {len(set(class_index.tolist()))} classes, the data set has "
                            f"{len(class_names)}.")
        rows = torch.stack([vectors[torch.from_numpy(class_index == k)].mean(0) for k in range(len(class_names))])
    if not torch.isfinite(rows).all() or (rows.norm(dim=1) < 1e-6).any():
        raise UserError(f"{path}: an embedding is zero or not finite; make the file anew.")
    return F.normalize(rows, dim=1)


def _load(path):
    try:
        with np.load(path, allow_pickle=False) as data:
            return ([str(name) for name in data["names"]], data["embeddings"],
                    data["class_index"] if "class_index" in data else None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such embeddings file (MODEL.TEXT.EMBEDDINGS); make one as datasets/README.md "
                        "says, or choose MODEL.DECODER.CLASSIFIER linear.") from None
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an embeddings file ({' '.join(str(error).split())}); it needs the arrays "
                        "names and embeddings.") from None
