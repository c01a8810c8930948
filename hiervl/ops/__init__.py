"""Multi-scale deformable attention, on the fastest implementation available.

``ms_deform_attn`` uses the compiled kernel for the tensor's device if it has been built
(``python -m hiervl.ops.build``). Otherwise it warns once and uses plain PyTorch, with the same results.
"""

from .function import ms_deform_attn
from .module import MSDeformAttn

__all__ = ["MSDeformAttn", "ms_deform_attn"]
