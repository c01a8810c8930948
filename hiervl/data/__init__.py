"""Datasets, splits, augmentation and loaders; independent of the model."""
