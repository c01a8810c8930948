"""The best class of every pixel and its score.

torch.max over the first dimension does not use the CPU's vector instructions: for 19 classes and 2048x1024 pixels it
took most of the evaluation's time. Here the maximum is found first, and then, class by class, where it was reached.
"""

import numpy as np
import torch

_BLOCK = 1 << 15  # pixels at a time: the intermediate results stay in the cache


def top_class(scores: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """
    Args:
        scores: (K, H, W) float, on any device.

    Returns:
        confidence (H, W) on the device of `scores`, NaN where a score is; and prediction (H, W) uint8, or int16 for
        more than 256 classes: of equal scores the first class.
    """
    dtype = np.uint8 if len(scores) <= 256 else np.int16
    if scores.device.type != "cpu":
        confidence, top = scores.max(0)
        return confidence, top.to(torch.uint8 if dtype is np.uint8 else torch.int16).cpu().numpy()
    flat = scores.detach().float().flatten(1).numpy()  # (K, H*W)
    confidence, reached = np.empty(flat.shape[1], flat.dtype), np.zeros(flat.shape[1], dtype)
    for start in range(0, flat.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        best = np.max(flat[:, block], axis=0, out=confidence[block])
        # Ranks count down, so that of equal scores the first class has the highest.
        for rank, row in zip(range(len(flat) - 1, 0, -1), flat):
            np.maximum(reached[block], (row[block] == best) * dtype(rank), out=reached[block])
    prediction = dtype(len(flat) - 1) - reached
    return torch.from_numpy(confidence).view(scores.shape[1:]), prediction.reshape(scores.shape[1:])
