"""Modules over NumPy arrays: attributes are parameters and children, found by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mambax.init import Initial, Placeholder

examined: WeakKeyDictionary[Module, Any] = WeakKeyDictionary()
"""What was found out about modules and what is in them; forgotten as soon as an attribute of any module changes."""

_stamp = object()  # another one after every change


def stamp() -> object:
    """An object that is another one after an attribute of any module has changed."""
    return _stamp


def _changed() -> None:
    global _stamp
    _stamp = object()
    examined.clear()


class Module:
    """Base of every layer. A float array attribute is a parameter; modules and lists of modules are children."""

    forward: Callable[..., Any]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        _changed()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        _changed()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
        """(dotted path, array) of every parameter below this module."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value.named_parameters(f"{prefix}{name}.")
            elif isinstance(value, ModuleList):
                for i, child in enumerate(value):
                    yield from child.named_parameters(f"{prefix}{name}.{i}.")


class ModuleList(list[Any]):
    """A list of child modules."""

    def __init__(self, modules: Sequence[Any]) -> None:
        super().__init__(modules)


def Parameter(value: Initial) -> np.ndarray:
    """An array from initial values. A placeholder becomes NaN everywhere, in no memory, until it is set."""
    if isinstance(value, Placeholder):
        return np.broadcast_to(np.float32(np.nan), value.shape)
    return value


def parameters(module: Module) -> dict[str, np.ndarray]:
    """Every parameter by dotted path."""
    return dict(module.named_parameters())


def set_parameters(module: Module, values: Mapping[str, np.ndarray]) -> None:
    """Replace parameters by dotted path, without copying.

    Raises:
        KeyError: for a path that leads nowhere.
    """
    for path, value in values.items():
        owner: Any = module
        *parents, name = path.split(".")
        for parent in parents:
            owner = owner[int(parent)] if isinstance(owner, ModuleList) else vars(owner)[parent]
        if name not in vars(owner):
            raise KeyError(path)
        setattr(owner, name, value)
