"""Brings downloaded datasets into the layout that HierVL reads; the scripts are datasets/prepare_*.py."""
