"""Text embeddings T of the class names: looked up in files or computed by a text tower."""

from .class_text import ClassText
from .embeddings import EmbeddingTable
from .tower import TextTower

__all__ = ["ClassText", "EmbeddingTable", "TextTower"]
