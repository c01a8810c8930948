"""Multi-scale deformable attention: one call, the fastest path this machine has.

``ms_deform_attn`` uses the compiled kernel of the tensor's device when it has been built
(``python -m hiervl.ops.build``) and plain PyTorch otherwise: the same numbers, one warning.
"""

from .function import ms_deform_attn
from .module import MSDeformAttn

__all__ = ["MSDeformAttn", "ms_deform_attn"]
