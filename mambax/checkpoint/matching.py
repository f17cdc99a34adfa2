"""Fitting the tensors of a checkpoint to the parameters of a model, before any of them is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mambax.checkpoint.layouts import CAUSAL_LM, Description, parameter_name
from mambax.checkpoint.tensors import FLOATS, TensorFile, TensorInfo
from mambax.families import named

TABLE, HEAD = "backbone.embeddings.weight", "lm_head.weight"
KEPT_IN_FLOAT32 = (".A_log", ".D", ".dt_proj.bias", ".dt_bias", ".e_score_correction_bias")
"""Ends of the names of parameters that are not stored narrower: the recurrence, or a choice, is too sensitive."""

SHARED = "backbone.shared_blocks."
"""Begin of the names of parameters that are used at several places, and that files may store at each of them."""

SCALES = (".scales", ".biases")
"""Ends of the names of what goes with packed weights (see :mod:`mambax.affine`): never rounded, to lose nothing."""

_PROBLEMS = ("missing", "unexpected", "of another shape", "of another dtype")
_LISTED = 8

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """A tensor of a checkpoint that is a parameter.

    Args:
        parameter: path in the model.
        file, name: where it is.
        info: its dtype in the file, and its shape in the model.
    """

    parameter: str
    file: TensorFile
    name: str
    info: TensorInfo

    def read(self) -> np.ndarray:
        """Its values."""
        return self.file.read(self.name).reshape(self.info.shape)

    def view(self) -> np.ndarray:
        """Its values as they lie in the file, or else read."""
        values = self.file.view(self.name)
        return self.read() if values is None else values.reshape(self.info.shape)


def match(
    tensors: Mapping[str, TensorFile],
    expected: Mapping[str, Shape],
    described: Description,
    where: str,
    packed: Mapping[str, np.dtype],
) -> tuple[list[Found], list[Found]]:
    """Find the tensor of every parameter.

    Args:
        tensors: tensor name -> file.
        expected: parameter path -> shape.
        described: what the checkpoint's config.json says.
        where: the checkpoint, for messages.
        packed: the dtypes of those parameters that are quantised; all others are floats.

    Returns:
        The parameters, the largest first; and tensors that the checkpoint repeats, which have to be equal to those
        of the same parameter: the head of a model whose head is the table of embeddings, and :data:`SHARED`.

    Raises:
        ValueError: listing what is missing, what is too much, and what has another shape or dtype.
    """
    problems: dict[str, list[str]] = {kind: [] for kind in _PROBLEMS}
    family = named(described.layout or str(described.config.family))
    found: dict[str, Found] = {}
    repeats: list[Found] = []
    present: set[str] = set()
    for name, file in tensors.items():
        parameter, stored = parameter_name(name, described), file.tensors[name]
        tied = parameter == HEAD and HEAD not in expected and described.architecture == CAUSAL_LM
        shape = expected.get(TABLE if tied else parameter)
        if shape is None or (parameter in present and not parameter.startswith(SHARED)):
            problems["unexpected"].append(f"{name} {list(stored.shape)}")
        elif not _fits(parameter, stored.shape, shape):
            problems["of another shape"].append(f"{name}: expected {list(shape)}, found {list(stored.shape)}")
        elif stored.shape != shape and family.folded_by_mlx_lm:
            raise ValueError(
                f"{file.path}: {name} is laid out as mlx-lm does it, which multiplies the factors in config.json "
                f"into the weights of {family.title} and leaves them there too; use the checkpoint it was made from"
            )
        elif stored.dtype not in ([packed[parameter]] if parameter in packed else FLOATS.values()):
            wanted = packed[parameter].name if parameter in packed else "a float dtype"
            problems["of another dtype"].append(f"{name}: expected {wanted}, found {stored.dtype.name}")
        elif tied or parameter in present:
            repeats.append(Found(TABLE if tied else parameter, file, name, TensorInfo(stored.dtype, shape)))
        else:
            found[parameter] = Found(parameter, file, name, TensorInfo(stored.dtype, shape))
        present.add(parameter)
    problems["missing"] = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in present]
    if any(problems.values()):
        raise ValueError(_report(problems, where))
    return sorted(found.values(), key=lambda item: -item.info.nbytes), repeats


def _fits(parameter: str, shape: Shape, expected: Shape) -> bool:
    """Whether a stored shape is the parameter's. MLX stores the convolution's (D, 1, K) as (D, K, 1)."""
    if shape == expected:
        return True
    return parameter.endswith(".conv1d.weight") and shape == (expected[0], expected[2], expected[1])


def _report(problems: Mapping[str, list[str]], where: str) -> str:
    parts = []
    for kind, lines in problems.items():
        if lines:
            more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
            parts.append(f"{len(lines)} {kind}: " + "; ".join(lines[:_LISTED]) + more)
    hint = ""
    if problems["missing"] and problems["missing"][0].startswith(HEAD):
        hint = " If the head is the table of embeddings, set tie_word_embeddings to true."
    return (
        f"{where}: the weights are not those that config.json describes.\n  "
        + "\n  ".join(parts)
        + f"\nIs it the config.json of these weights?{hint}"
    )


def main_dtype(infos: Iterable[tuple[str, np.dtype]]) -> str:
    """The name of the one dtype that holds all weights without loss, :data:`KEPT_IN_FLOAT32` aside.

    Args:
        infos: (parameter path, dtype).
    """
    used = {dtype.name for name, dtype in infos if not name.endswith(KEPT_IN_FLOAT32 + SCALES)}
    if used == {"float16", "bfloat16"}:
        return "float32"
    return max(used, key=lambda name: (FLOATS[name].itemsize, name))


def parameter_dtype(parameter: str, dtype: str, stored: np.dtype | None = None) -> np.dtype:
    """The dtype of a parameter in a model of this dtype.

    :data:`KEPT_IN_FLOAT32` are float32 at least, and :data:`SCALES` at least as wide as they are stored.
    """
    if stored is not None and parameter.endswith(SCALES):
        return np.promote_types(FLOATS[dtype], stored)
    narrow = FLOATS[dtype].itemsize < 4
    return FLOATS["float32"] if narrow and parameter.endswith(KEPT_IN_FLOAT32) else FLOATS[dtype]
