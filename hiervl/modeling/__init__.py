"""The network: backbones, pixel decoder, language modules, query decoder, and what puts them together."""

from .meta_arch import HierVL

__all__ = ["HierVL"]
