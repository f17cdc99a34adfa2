"""The adapters of a backend."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from mambax.lora import Adapters


def bound(model: Any) -> Adapters:
    """The module ``lora`` of a model's backend.

    Raises:
        ValueError: when it has none.
    """
    nn = model.nn
    name = f"{nn.__name__}.lora"
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"the {nn.name} backend has no adapters; use backend='torch', 'mlx' or 'numpy'")
    module: Any = importlib.import_module(name)
    return module
