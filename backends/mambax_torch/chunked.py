"""The scan in torch ops with bounded memory, for devices that have no kernels: MPS, and CUDA in float64.

Dimensions: B batch, L length, D channels, N d_state, T chunk length.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambax import scan
from mambax_torch import ops


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    boundaries: Tensor | None = None,
    algorithm: str,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`mambax.scan.selective_scan` by an algorithm, its gradient with the states of one chunk in memory.

    For a gradient, each chunk is computed again from the state before it, which is all that is kept: (B, D, N) for
    every T steps, in place of several arrays of (B, T, D, N). Within torch.func transforms, forward-mode
    differentiation and ``torch.compile``, which do not take recomputation, the algorithm runs as it is.

    Raises:
        ValueError: for a shape that does not fit, and for a mask together with boundaries.
    """
    chunk, length = scan.ALGORITHMS[algorithm][1], u.shape[1]
    with torch.autocast(u.device.type, enabled=False):  # its products of states stay in float32
        run = partial(scan.selective_scan, ops, algorithm=algorithm, **options)
        if length <= chunk or not _may_recompute():
            return run(u, delta, A, B, C, D, z=z, initial_state=initial_state, mask=mask, boundaries=boundaries)
        scan.check_shapes(
            u, A, delta=delta, B=B, C=C, D=D, z=z, initial_state=initial_state, mask=mask, boundaries=boundaries
        )
        scan.refuse_mask_with_boundaries("selective_scan", mask, boundaries)
        outputs: list[Tensor] = []
        state: Any = initial_state
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            gate, exists, begins = (None if x is None else x[:, part] for x in (z, mask, boundaries))
            y, state = checkpoint(
                run, u[:, part], delta[:, part], A, B[:, part], C[:, part], D,
                z=gate, initial_state=state, mask=exists, boundaries=begins, use_reentrant=False,
            )  # fmt: skip
            outputs.append(y)
        return torch.cat(outputs, 1), state


def _may_recompute() -> bool:
    """Whether a gradient may be asked for, and PyTorch can compute it by running parts again."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not ops.inside_transform()
