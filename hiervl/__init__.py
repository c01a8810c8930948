"""HierVL: semi-supervised semantic segmentation with a mask transformer that knows its classes by name.

Importing the package registers its datasets in Detectron2's catalogs, and its backbones and meta-architecture in
Detectron2's registries.
"""

from .data import datasets as _datasets  # noqa: F401
from .modeling import HierVL
from .predictor import Prediction, Predictor
from .version import __version__

__all__ = ["HierVL", "Prediction", "Predictor", "__version__"]
