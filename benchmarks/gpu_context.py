"""What the parts of one run of the GPU benchmark have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_plans import Plan
from benchmarks.gpu_rivals import Arena


@dataclass(frozen=True)
class Context:
    """What every part gets.

    Args:
        plan: sizes.
        arena: where rivals meet.
        peers: the folder of ``--peers``, or None for what is installed.
    """

    plan: Plan
    arena: Arena
    peers: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The plan's dtype."""
        return getattr(torch, self.plan.dtype)
