"""Semi-supervised training: trainer, EMA teacher, pseudo-labels and their filters (docs/how-it-works.md)."""
