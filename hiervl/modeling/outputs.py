"""What goes into the network in training, and what it computes."""

from dataclasses import dataclass

import torch

from .query_generator import SelectedClasses
from .spatial_alignment import AlignmentOutput


@dataclass
class NetworkOutput:
    """Everything that the network computes for B images.

    Attributes:
        layers: list of QueryPredictions, one per decoder layer. mask_features: M (B, Cm, H/4, W/4).
        features: the backbone's {name: (B, C, h, w)}.
        selected: of HSQG, aligned: of CMSAM; None without these modules.
    """

    layers: list
    mask_features: torch.Tensor
    features: dict
    selected: SelectedClasses | None
    aligned: AlignmentOutput | None

    def __getitem__(self, images: slice) -> "NetworkOutput":
        """The output of some of the images."""
        return NetworkOutput(
            [layer[images] for layer in self.layers],
            self.mask_features[images],
            {name: x[images] for name, x in self.features.items()},
            self.selected and self.selected[images],
            self.aligned and self.aligned[images],
        )


@dataclass
class TrainingBatch:
    """Training inputs with their targets, which are built once and serve normalizers and losses.

    Attributes:
        inputs: list of dicts (see HierVL), labeled images first.
        kinds: {LABELED or PSEUDO: (slice of the inputs, their Targets)}, of the kinds of images that there are.
    """

    inputs: list
    kinds: dict
