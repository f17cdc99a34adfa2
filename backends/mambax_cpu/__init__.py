"""Fused kernels for arrays in host memory, written in Numba; used by every backend of mambax on the CPU.

Importing this package loads nothing: Numba comes with :mod:`mambax_cpu.scan` and :mod:`mambax_cpu.convolution`,
which a backend imports at its first call. They take NumPy arrays of float32, or narrower, and compute in float32.

Compiled code is kept on disk, beside the package or, where that cannot be written, in Numba's cache of the user
(``NUMBA_CACHE_DIR`` names another place).
"""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def missing() -> str:
    """Why the kernels cannot run in this installation; empty when they can."""
    return "" if importlib.util.find_spec("numba") else "it needs Numba: pip install numba"
