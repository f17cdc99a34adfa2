"""Fused kernels for arrays in host memory; used by every backend of mambax on the CPU.

Importing this package loads nothing; a backend imports :mod:`mambax_cpu.scan` and the others at its first call.
They take NumPy arrays of float32, or narrower, and compute in float32. Kernels are Python functions, compiled by
LLVM at the first call of each; see :mod:`mambax_cpu.compilation`.

Compiled code is kept on disk, in the user's folder for caches (``MAMBAX_CACHE_DIR`` names another place), so that
later starts have nothing to compile; see :mod:`mambax_cpu.object_files`.
"""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def missing() -> str:
    """Why the kernels cannot run in this installation; empty when they can."""
    return "" if importlib.util.find_spec("llvmlite") else "it needs llvmlite: pip install llvmlite"
