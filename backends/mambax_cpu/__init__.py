"""Fused kernels for arrays in host memory, written in Numba; used by every backend of mambax on the CPU.

Importing this package loads nothing; a backend imports :mod:`mambax_cpu.scan` and the others at its first call, and
Numba is imported when something has to be compiled. They take NumPy arrays of float32, or narrower, and compute in
float32.

Compiled code is kept on disk, in the user's folder for caches (``NUMBA_CACHE_DIR`` names another place), so that
later starts need no Numba; see :mod:`mambax_cpu.object_files`.
"""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def missing() -> str:
    """Why the kernels cannot run in this installation; empty when they can."""
    return "" if importlib.util.find_spec("numba") else "it needs Numba: pip install numba"
