"""Moved into `watching.py`."""

from sdnb.layers.watching import BranchModules

__all__ = ["BranchModules"]
