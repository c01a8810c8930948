"""Converts downloaded datasets to the layout that HierVL reads. The scripts are datasets/prepare_*.py."""
