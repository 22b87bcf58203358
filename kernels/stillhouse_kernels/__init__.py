"""Kernels of distillation's hot paths: torch, and triton where it is installed.

The package knows nothing of `stillhouse`. Each operation is a folder with its truth
(`reference.py`), its CPU path (`streaming.py`) and its GPU kernel (`kernel.py`); every public
function is exported from here. No operation has landed yet.
"""
