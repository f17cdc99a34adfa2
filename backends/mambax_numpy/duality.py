"""The scan of Mamba-2, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from mambax import scan
from mambax import ssd as duality
from mambax_numpy import ops


def ssd(x: np.ndarray, *args: Any, impl: str = "auto", **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """:func:`mambax.ssd.ssd`; chunked up to float32, sequential in float64, which is the reference."""
    automatic = "sequential" if x.shape[1] == 1 or x.dtype == np.float64 else "chunked"
    algorithm = scan.choose(impl, automatic, dict.fromkeys(duality.ALGORITHMS, ""))
    return duality.ssd(ops, x, *args, algorithm=algorithm, **options)
