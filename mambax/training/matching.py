"""Checking that arrays which come from a file are those that are needed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def check_arrays(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, np.ndarray], what: str) -> None:
    """Refuse arrays that are not exactly the expected ones.

    Args:
        expected: shapes by name.
        found: arrays by name.
        what: they are, for the message.

    Raises:
        ValueError: naming the first that differs.
    """
    shapes = {name: tuple(array.shape) for name, array in found.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ValueError(
                f"{what} of the checkpoint: {name} is {shapes.get(name, 'missing')}, expected "
                f"{expected.get(name, 'none of this name')}; is it a checkpoint of this model?"
            )
