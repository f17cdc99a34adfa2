"""Arguments, comparisons and sizes for the tests of the GPU kernels, on the harness and on a real GPU alike.

Dimensions: B batch, L length, D channels, N d_state, K width of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import metal_reference
import numpy as np
from metal_harness import numpy_dtype, to_mlx, to_numpy
from tolerances import FORWARD, GRADIENT, assert_close


class Case(NamedTuple):
    """Sizes and what is in use: ``flags`` is "", "mask" or "boundaries", ``without`` names what is left out."""

    batch: int
    length: int
    channels: int
    states: int  # or the width of the convolution
    dtype: str = "float32"
    flags: str = ""
    without: tuple[str, ...] = ()
    softplus: bool = True  # or SiLU

    def __str__(self) -> str:
        words = [f"B{self.batch}", f"L{self.length}", f"D{self.channels}", f"{self.states}", self.dtype, self.flags]
        return "-".join(word for word in [*words, *(f"no_{name}" for name in self.without)] if word)


SCANS = (
    Case(2, 129, 37, 16, flags="mask"),  # three chunks, the last of one step; two blocks of channels
    Case(2, 67, 5, 5, "bfloat16", "boundaries", ("D",)),
    Case(1, 70, 3, 1, "float16", "mask", ("z", "delta_bias", "initial_state"), softplus=False),
    Case(2, 64, 35, 2, flags="boundaries"),  # one chunk exactly
    Case(1, 33, 9, 256, flags="boundaries", without=("z",)),  # the widest; shares of B and C are added up
    Case(1, 66, 4, 33, "bfloat16", "", ("initial_state", "D")),
    Case(2, 19, 3, 100, "float32", "mask"),
    Case(3, 1, 34, 16, "bfloat16", "mask"),  # one step
    Case(2, 1, 3, 7, "float32", "boundaries", ("z", "D", "delta_bias")),
    Case(1, 1, 2, 200, "float16", "", ("initial_state",)),
)
CONVOLUTIONS = (
    Case(2, 131, 5, 4, flags="mask"),
    Case(2, 131, 3, 4, "bfloat16", "boundaries"),
    Case(1, 66, 130, 1, "float16", "", ("initial_state",)),
    Case(2, 1, 3, 4, "float32", "", ()),  # one step
    Case(2, 3, 2, 8, "float32", "mask", ("bias",), softplus=False),  # shorter than its past
    Case(1, 65, 2, 8, "float32", "boundaries", ("initial_state",)),
    Case(2, 130, 2, 2, "bfloat16", "mask"),
)


def flags_of(case: Case) -> dict[str, np.ndarray]:
    """Masks with holes, padded rows and a long gap; boundaries in succession, at the ends, and far apart."""
    if not case.flags:
        return {}
    rng = np.random.default_rng(case.length)
    flags = rng.random((case.batch, case.length)) < (0.6 if case.flags == "mask" else 0.05)
    if case.flags == "mask":
        flags[0, case.length // 8 : -case.length // 8] = False
        flags[-1, : case.length // 3] = False
    elif case.length > 3:
        flags[0, 0] = flags[0, 1] = flags[0, -1] = True
        flags[-1, :] = False
        flags[-1, case.length // 2] = True
    else:
        flags[0, 0] = True
    return {case.flags: flags}


def scan_values(case: Case) -> dict[str, np.ndarray]:
    """Arguments of the scan; those along the row in the case's dtype, NaN at masked steps."""
    rng = np.random.default_rng(case.states)
    rows, vector = (case.batch, case.length, case.channels), (case.batch, case.length, case.states)
    shapes = {
        "u": rows, "delta": rows, "A": (case.channels, case.states), "B": vector, "C": vector,
        "D": (case.channels,), "z": rows, "delta_bias": (case.channels,),
        "initial_state": (case.batch, case.channels, case.states),
    }  # fmt: skip
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    values["A"] = -np.exp(values["A"])
    values["delta"] = values["delta"] - 3 if case.softplus else np.abs(values["delta"]) * 0.1
    return narrowed(values, case, ("u", "delta", "B", "C", "z"))


def convolution_values(case: Case) -> dict[str, np.ndarray]:
    """Arguments of the convolution, in the case's dtype, NaN at masked positions."""
    rng = np.random.default_rng(case.states)
    shapes = {
        "x": (case.batch, case.length, case.channels), "weight": (case.channels, 1, case.states),
        "bias": (case.channels,), "initial_state": (case.batch, case.states - 1, case.channels),
    }  # fmt: skip
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return narrowed(values, case, ("x", "weight", "initial_state"))


def narrowed(values: dict[str, np.ndarray], case: Case, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    mask = flags_of(case).get("mask")
    for name in names:
        values[name] = values[name].astype(numpy_dtype(case.dtype))
        if mask is not None and values[name].shape[:2] == mask.shape and name != "weight":
            values[name][~mask] = np.nan
    return {name: value for name, value in values.items() if name not in case.without}


def probes(case: Case, y: Any, final: Any) -> tuple[np.ndarray, np.ndarray]:
    """Gradients given to y and to the final state."""
    rng = np.random.default_rng(1)
    dy = rng.standard_normal(y.shape).astype(numpy_dtype(case.dtype))
    return dy, rng.standard_normal(final.shape).astype(np.float32)


def run(op: Callable[..., Any], values: dict[str, np.ndarray], case: Case, **options: Any) -> dict[str, np.ndarray]:
    """y, the final state and every gradient of an op of MLX, by name."""
    import mlx.core as mx

    flags = {name: mx.array(flag) for name, flag in flags_of(case).items()}

    def forward(*arrays: Any) -> list[Any]:
        return list(op(**dict(zip(values, arrays, strict=True)), **flags, **options))

    arrays = [to_mlx(value) for value in values.values()]
    y, final = forward(*arrays)
    dy, dfinal = probes(case, y, final)
    cotangents = [to_mlx(dy), mx.array(dfinal).astype(final.dtype)]
    _, gradients = mx.vjp(forward, arrays, cotangents)
    found = {"y": y, "final state": final, **dict(zip(values, gradients, strict=True))}
    mx.eval(list(found.values()))
    return {name: to_numpy(x) for name, x in found.items()}


def expected(kind: str, values: dict[str, np.ndarray], case: Case) -> dict[str, np.ndarray]:
    """The same in float64."""
    options: Any = {"activation": "silu" if case.softplus else None}
    if kind == "scan":
        options = {"delta_softplus": case.softplus}
    y, final, gradients = getattr(metal_reference, kind)(**values, **flags_of(case), **options)
    dy, dfinal = probes(case, y, final)
    if kind == "convolution":
        dfinal = dfinal.astype(numpy_dtype(case.dtype))
    found = gradients(dy, dfinal)
    return {"y": y, "final state": final, **{name: found[name] for name in values}}


def compare(got: dict[str, np.ndarray], want: dict[str, np.ndarray], values: dict[str, Any], case: Case) -> None:
    """Every number of a case: the right dtype, the right value. An empty or wholly zero one must be so too."""
    assert got.keys() == want.keys()
    for name, array in want.items():
        if name in values:
            assert got[name].dtype == values[name].dtype
            narrow = str(got[name].dtype)
            tolerance = GRADIENT["float32"] if narrow == "float32" else FORWARD[narrow]
        else:
            tolerance = FORWARD["float32" if name == "final state" else case.dtype]
        if not np.any(array):
            assert not np.any(got[name]), name
            assert got[name].shape == array.shape
        else:
            assert_close(np.float64(got[name]), array, what=name, tolerance=tolerance)
