"""Class embeddings T: what the network knows of the classes' names."""
from .embeddings import ClassText, read_embeddings

__all__ = ["ClassText", "read_embeddings"]
