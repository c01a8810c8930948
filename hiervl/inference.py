"""From queries to class probabilities per pixel, and the two ways to cover an image with them."""
import torch
import torch.nn.functional as F
from torch import nn


class ClassScores(nn.Module):
    """Evidence u_k(x) = w * sum_n softmax(class)_k * sigmoid(mask)(x), and p_k = u_k / (epsilon + sum_j u_j).

    w and epsilon are learnable and positive; epsilon is the evidence a pixel must gather before it can be sure.
    Without it the scores of a mask transformer are no probabilities, and no confidence threshold means anything.
    """

    def __init__(self, epsilon: float = 0.03):
        super().__init__()
        self.log_instance_weight = nn.Parameter(torch.zeros(()))
        self.log_epsilon = nn.Parameter(torch.tensor(float(epsilon)).log())

    @property
    def epsilon(self) -> torch.Tensor:
        return self.log_epsilon.exp()

    def forward(self, class_logits, mask_logits):
        """class logits (..., N, K+1), mask logits (..., N, P) -> evidence (..., K, P)."""
        classes = class_logits.float().softmax(-1)[..., :-1]
        evidence = torch.einsum("...nk,...np->...kp", classes, mask_logits.float().sigmoid())
        return self.log_instance_weight.exp() * evidence

    def normalize(self, evidence):
        """(B, K, H, W) evidence -> probabilities; they sum to less than 1 where evidence is thin."""
        return evidence / (self.epsilon + evidence.sum(dim=1, keepdim=True))


def pad_to_multiple(images: torch.Tensor, divisor: int) -> torch.Tensor:
    """Pad (B, 3, H, W) at the right and bottom with zeros to multiples of `divisor`."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % divisor, 0, -height % divisor))


def sliding_window(images, predict, window, stride):
    """Average `predict` over overlapping windows.

    Args:
        images: (B, 3, H, W). predict: (B, 3, h, w) -> (B, K, h, w). window, stride: (h, w) in pixels; an image
        smaller than the window is one window.
    """
    height, width = images.shape[-2:]
    total = count = None
    for top in _starts(height, window[0], stride[0]):
        for left in _starts(width, window[1], stride[1]):
            area = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            part = predict(images[area])
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
                count = part.new_zeros(height, width)
            total[area] += part
            count[area] += 1
    return total / count


def _starts(length, window, stride):
    """Window starts that cover `length`; the last window ends at the border."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]
