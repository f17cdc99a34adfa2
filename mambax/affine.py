"""Weights as MLX quantises and packs them, and what a ``config.json`` says about them. Knows no framework.

A matrix (out, in) is cut into groups of 32, 64 or 128 inputs of one row. A weight is ``q * scale + bias`` with a
whole number q of 2, 3, 4, 6 or 8 bits, and the scale and the bias of its group. The whole numbers of a row follow
one another in words of 32 bits, the first in the lowest bits. A layer has three arrays in place of ``weight``:
``weight`` (out, in bits / 32) uint32, ``scales`` and ``biases`` (out, in / group size).

In ``config.json`` mlx-lm writes ``quantization`` with ``bits`` and ``group_size``, and below it the path of a layer
with its own where that differs. Which layers are quantised is seen from their arrays.

Source: ``mlx.core.quantize`` and ``mlx_lm.utils`` (``load_model``, ``quantize_model``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128)

Shape = tuple[int, ...]


class Packing(NamedTuple):
    """How a matrix is packed: bits of a weight, and inputs to a scale."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}"

    def shapes(self, outputs: int, inputs: int) -> dict[str, Shape]:
        """The shapes of the arrays of a matrix (outputs, inputs), of which the group divides the inputs."""
        groups = (outputs, inputs // self.group_size)
        return {"weight": (outputs, inputs * self.bits // 32), "scales": groups, "biases": groups}


@dataclass(frozen=True)
class Affine:
    """How the layers of a model are packed.

    Args:
        default: for the layers that say nothing else.
        own: path -> packing, of those that do.
        layers: path -> packing of every quantised layer; empty until they are known.
    """

    default: Packing
    own: Mapping[str, Packing] = field(default_factory=dict)
    layers: Mapping[str, Packing] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.default} (MLX)"

    def of(self, paths: Iterable[str]) -> Affine:
        """The same, of these layers."""
        return dataclasses.replace(self, layers={path: self.own.get(path, self.default) for path in paths})

    def shapes(self, full: Mapping[str, Shape], where: str) -> dict[str, Shape]:
        """The shapes of all parameters of a model whose own, not quantised, are `full`.

        Raises:
            ValueError: for a layer that is not there, or that the group does not divide.
        """
        expected = dict(full)
        for path, packing in self.layers.items():
            shape = expected.pop(f"{path}.weight", ())
            if len(shape) != 2 or shape[1] % packing.group_size:
                raise ValueError(
                    f"{where}: {path}.scales is there, but {path}.weight is {list(shape)}; expected a matrix whose "
                    f"width is a multiple of the group, {packing.group_size}"
                )
            expected |= {f"{path}.{name}": part for name, part in packing.shapes(*shape).items()}
        return expected

    def to_config(self) -> dict[str, Any]:
        """What stands under ``quantization`` in ``config.json``."""
        own = {path: packing._asdict() for path, packing in self.layers.items() if packing != self.default}
        return {"group_size": self.default.group_size, "bits": self.default.bits, **own}


def from_config(raw: Mapping[str, Any], where: str) -> Affine | None:
    """What a ``config.json`` says under ``quantization``; None when it says nothing.

    Raises:
        ValueError: for bits, a group size or a mode that is not supported, and for a ``quantization_config`` that
            says something else.
    """
    found: Any = raw.get("quantization")
    if not found:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: quantization is {str(found)[:80]}; expected an object")
    if raw.get("quantization_config", found) != found:
        raise ValueError(f"{where}: quantization and quantization_config differ; keep the one that is true")
    own = {path: value for path, value in found.items() if isinstance(value, dict)}
    return Affine(
        _packing(found, f"{where}: quantization"),
        {path: _packing(value, f"{where}: quantization of {path[:80]}") for path, value in own.items()},
    )


def _packing(raw: Mapping[str, Any], where: str) -> Packing:
    if raw.get("mode", "affine") != "affine":
        raise ValueError(f"{where}: mode is {str(raw['mode'])[:80]!r}; only 'affine' is supported")
    try:
        return packing(raw.get("bits"), raw.get("group_size"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def packing(bits: Any, group_size: Any) -> Packing:
    """A packing that there is.

    Raises:
        ValueError: with those that there are.
    """
    for name, value, known in (("bits", bits, BITS), ("group_size", group_size, GROUP_SIZES)):
        if type(value) is not int or value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, known))}")
    return Packing(bits, group_size)


def found_in(shapes: Mapping[str, Shape], full: Mapping[str, Shape]) -> Affine | None:
    """How a model whose parameters have these shapes is packed; None when no layer has ``biases``.

    Args:
        shapes: path -> shape of its parameters.
        full: of the same model, not quantised.
    """
    layers: dict[str, Packing] = {}
    for name in shapes:
        path = name.removesuffix(".biases")
        inputs = full.get(f"{path}.weight", (0, 0))[-1]
        words, groups = (shapes.get(f"{path}.{part}", (0, 0))[-1] for part in ("weight", "scales"))
        if path != name and inputs and groups:
            layers[path] = Packing(32 * words // inputs, inputs // groups)
    if not layers:
        return None
    used = list(layers.values())
    return Affine(max(sorted(set(used)), key=used.count), {}, layers)
