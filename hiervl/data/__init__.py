"""Data sets, splits, augmentation and loaders. Knows no model."""
