"""Which parameters weight decay applies to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

NEVER = ("A_log", "D", "dt_bias", "bias")
"""Last parts of the paths that never decay: ``_no_weight_decay`` in the official package, and biases."""


def decays(name: str, shape: Sequence[int], no_decay: Sequence[str] = ()) -> bool:
    """Whether weight decay applies to a parameter.

    To matrices, tables and convolutions; not to A_log and D (the official package marks them so), biases and the
    weights of norms, nor to what matches a pattern.

    Args:
        name: its path.
        shape: its shape.
        no_decay: patterns of paths, as of :mod:`fnmatch`.
    """
    if name.rpartition(".")[2] in NEVER or len(shape) < 2:
        return False
    return not any(fnmatchcase(name, pattern) for pattern in no_decay)


def decayed_names(shapes: Mapping[str, Sequence[int]], no_decay: Sequence[str] = ()) -> frozenset[str]:
    """The paths of the parameters that decay.

    Args:
        shapes: of the parameters, by path.
        no_decay: patterns of paths that do not.

    Raises:
        ValueError: for a pattern that matches no parameter.
    """
    for pattern in no_decay:
        if not any(fnmatchcase(name, pattern) for name in shapes):
            some = ", ".join(sorted(shapes)[:3])
            raise ValueError(f"no_decay: {pattern!r} matches no parameter; expected a pattern of such as {some}")
    return frozenset(name for name, shape in shapes.items() if decays(name, shape, no_decay))
