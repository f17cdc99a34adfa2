"""The scan of Mamba-2, in MLX."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mambax import scan
from mambax import ssd as duality
from mambax_mlx import ops


def ssd(x: mx.array, *args: Any, impl: str = "auto", **options: Any) -> tuple[mx.array, mx.array]:
    """:func:`mambax.ssd.ssd`; chunked unless named otherwise or for a single token."""
    automatic = "sequential" if x.shape[1] == 1 else "chunked"
    algorithm = scan.choose(impl, automatic, dict.fromkeys(duality.ALGORITHMS, ""))
    return duality.ssd(ops, x, *args, algorithm=algorithm, **options)
