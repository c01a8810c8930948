"""HierVL: semi-supervised semantic segmentation with a mask transformer that knows its classes by name."""
