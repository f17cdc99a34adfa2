"""Where a step writes the state after it, when whoever calls the model says so.

A decode graph reads one set of buffers and writes another. A model's definition makes new states; within
:func:`written_into` the one-token kernels make them in the given buffers, so that nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_targets: ContextVar[Mapping[int, Tensor] | None] = ContextVar("targets", default=None)


@contextmanager
def written_into(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within, a step from a state writes the state after into the other tensor of its pair.

    Args:
        pairs: (state before, where the state after goes), of one shape and dtype each.
    """
    token = _targets.set({before.data_ptr(): after for before, after in pairs if before.numel()})
    try:
        yield
    finally:
        _targets.reset(token)


def target_of(before: Tensor | None) -> Tensor | None:
    """Where the state after `before` goes; None when nobody said."""
    targets = _targets.get()
    if targets is None or before is None:
        return None
    after = targets.get(before.data_ptr())
    fits = after is not None and after.shape == before.shape and after.dtype == before.dtype
    return after if fits else None
