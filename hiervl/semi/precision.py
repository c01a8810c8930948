"""Number formats of training: autocast, gradient scaling for float16, and TF32 for what stays in float32."""

import torch

from ..errors import UserError

_LOWEST_SCALE = 1.0  # at this scale, a gradient that is still not finite did not overflow


class MixedPrecision:
    """Autocast and, with float16, gradient scaling (arXiv 1710.03740) of a training run.

    float16 overflows above 65,504 and loses gradients below 6e-8, so the loss is multiplied by a scale that adapts: a
    step whose gradients overflow is skipped and halves the scale. bfloat16 has the range of float32 and needs none.

    Args:
        device: where the network is trained.
        enabled: False trains in float32.
        dtype: "bfloat16", "float16", or "auto": bfloat16 where the device computes in it, float16 elsewhere.
    Attributes:
        dtype: torch.bfloat16, torch.float16, or None for float32.
        skipped: number of skipped steps so far.
    Raises:
        UserError: bfloat16 on a card without it.
    """

    def __init__(self, device: torch.device, enabled: bool, dtype: str):
        self.device = device.type
        self.dtype = _choose(self.device, dtype) if enabled else None
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.dtype == torch.float16)
        self.skipped = 0

    @classmethod
    def from_config(cls, cfg, device):
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = cfg.SOLVER.TF32
            torch.backends.cudnn.allow_tf32 = cfg.SOLVER.TF32
        return cls(device, cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE)

    def autocast(self):
        """Context of the forward pass. The backward pass runs outside, each operation in its forward's format."""
        return torch.autocast(self.device, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self, optimizer, parameters, clip_norm: float) -> torch.Tensor:
        """Clip the gradients and take a step, or skip it after an overflow.

        Returns:
            the norm of the gradients before clipping.
        Raises:
            FloatingPointError: it is not finite, for a reason other than an overflow; no weight was changed.
        """
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=True)
        if not torch.isfinite(norm):
            if not self.scaler.is_enabled() or self.scaler.get_scale() <= _LOWEST_SCALE:
                raise FloatingPointError
            self.skipped += 1
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def counters(self) -> dict:
        """Scalars for the log: nothing without gradient scaling."""
        if not self.scaler.is_enabled():
            return {}
        return {"loss_scale": self.scaler.get_scale(), "skipped_steps": self.skipped}

    def state_dict(self) -> dict:
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state):
        self.skipped = state["skipped"]
        if state["scaler"] and self.scaler.is_enabled():  # empty in a run without float16
            self.scaler.load_state_dict(state["scaler"])


def _choose(device, dtype):
    """The dtype that a name from SOLVER.AMP.DTYPE means on this kind of device."""
    supported = device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not supported:
        raise UserError(
            f"SOLVER.AMP.DTYPE is bfloat16, but {torch.cuda.get_device_name()} does not compute in it; set it to auto "
            "or float16."
        )
    if dtype == "auto":
        return torch.bfloat16 if supported else torch.float16
    return getattr(torch, dtype)
