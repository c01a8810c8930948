"""Class embeddings T: what the network knows of the classes' names."""

from .class_text import ClassText
from .embeddings import EmbeddingTable
from .tower import TextTower

__all__ = ["ClassText", "EmbeddingTable", "TextTower"]
