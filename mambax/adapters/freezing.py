"""Which parameters are trained, by patterns of their paths."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mambax.adapters.binding import bound


def freeze(model: Any, patterns: str | Sequence[str]) -> list[str]:
    """Train a model without some of its parameters.

    Args:
        model: of a backend that has gradients. PyTorch's ``requires_grad`` and MLX's ``freeze`` hold what is set.
        patterns: of parameter paths, as of :mod:`fnmatch`: ``"backbone.layers.[01].*"``, ``"*.embeddings.*"``.

    Returns:
        The paths of all parameters that match, in order.

    Raises:
        ValueError: for a pattern that matches no parameter, and for a backend without gradients. Nothing is
            frozen then.
    """
    matched = _matched(model, patterns)
    layers = bound(model)
    layers.set_trainable(model, set(layers.trainable(model)) - set(matched))
    return matched


def unfreeze(model: Any, patterns: str | Sequence[str]) -> list[str]:
    """Train parameters again that were frozen; as :func:`freeze`."""
    matched = _matched(model, patterns)
    layers = bound(model)
    layers.set_trainable(model, set(layers.trainable(model)) | set(matched))
    return matched


def _matched(model: Any, patterns: str | Sequence[str]) -> list[str]:
    names = bound(model).possible(model)
    if not names:
        raise ValueError(f"the {model.nn.name} backend has no gradients: there is nothing to freeze")
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    return sorted({name for pattern in given for name in matching(pattern, names)})


def matching(pattern: str, names: Collection[str]) -> list[str]:
    """The names that a pattern matches.

    Raises:
        ValueError: when there are none.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        some = ", ".join(sorted(names)[:3])
        raise ValueError(f"patterns: {pattern!r} matches no parameter; expected a pattern of such as {some}")
    return found
