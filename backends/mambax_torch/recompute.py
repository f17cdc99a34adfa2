"""Gradients by computing again what the forward pass did not keep, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(module: torch.nn.Module) -> Callable[..., Any]:
    """The module as a function that keeps its inputs alone for the backward pass."""
    return partial(checkpoint, module, use_reentrant=False) if torch.is_grad_enabled() else module


def summed_over_chunks(
    module: torch.nn.Module, function: Callable[..., tuple[Tensor, ...]], arrays: Sequence[Tensor], rows: int
) -> tuple[Tensor, ...]:
    """The sum of ``function(*chunk)`` over chunks of rows, one chunk in memory at a time, in both directions."""
    run = partial(checkpoint, function, use_reentrant=False) if torch.is_grad_enabled() else function
    totals: tuple[Tensor, ...] | None = None
    for chunk in zip(*(array.split(rows) for array in arrays), strict=True):
        parts = run(*chunk)
        totals = parts if totals is None else tuple(map(torch.add, totals, parts))
    if totals is None:
        raise ValueError("summed_over_chunks: the arrays have no rows; expected at least one")
    return totals
