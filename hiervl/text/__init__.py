"""Class embeddings T: what the network knows of the classes' names."""
from .adapter import language_loss
from .class_text import ClassText
from .embeddings import EmbeddingTable
from .tower import TextTower

__all__ = ["ClassText", "EmbeddingTable", "TextTower", "language_loss"]
