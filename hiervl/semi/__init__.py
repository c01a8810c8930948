"""Semi-supervised training: trainer, EMA teacher, pseudo-labels and their filters (DESIGN section 3)."""
