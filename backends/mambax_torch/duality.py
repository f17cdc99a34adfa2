"""The scan of Mamba-2, in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambax import scan
from mambax import ssd as duality
from mambax_torch import ops


def ssd(x: Tensor, *args: Any, impl: str = "auto", **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`mambax.ssd.ssd`; chunked unless named otherwise or for a single token."""
    automatic = "sequential" if x.shape[1] == 1 else "chunked"
    algorithm = scan.choose(impl, automatic, dict.fromkeys(duality.ALGORITHMS, ""))
    with torch.autocast(x.device.type, enabled=False):  # its products of states stay in float32
        return duality.ssd(ops, x, *args, algorithm=algorithm, **options)
