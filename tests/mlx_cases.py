"""Arguments and measures for the tests of MLX."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import numpy as np
from test_scan import arguments


def normal(*shape: int, seed: int = 0) -> Any:
    """Standard normal numbers."""
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def scan_arguments(length: int, **options: Any) -> dict[str, Any]:
    """Arguments of a selective scan."""
    return {name: mx.array(value) for name, value in (arguments(length) | options).items()}


def peak(function: Any) -> int:
    """The most memory that MLX held more than before, in bytes."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(function())
    return mx.get_peak_memory() - before
