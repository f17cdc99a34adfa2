"""Arguments, a float64 reference and sizes for the tests of the GPU kernels of Mamba-2's scan.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import metal_reference
import numpy as np
from metal_cases import flags_of, narrowed, probes
from reference import sigmoid, softplus

INFINITE = float("inf")


class Case(NamedTuple):
    """Sizes and what is in use, as ``metal_cases.Case``."""

    batch: int
    length: int
    heads: int
    width: int
    groups: int
    states: int
    dtype: str = "float32"
    flags: str = ""
    without: tuple[str, ...] = ()
    softplus: bool = True
    limit: tuple[float, float] = (0.0, INFINITE)

    def __str__(self) -> str:
        words = [f"B{self.batch}", f"L{self.length}", f"H{self.heads}", f"P{self.width}", f"G{self.groups}",
                 f"N{self.states}", self.dtype, self.flags]  # fmt: skip
        words += [f"no_{name}" for name in self.without] + (["limit"] if self.limit != (0.0, INFINITE) else [])
        return "-".join(word for word in words if word)


SSDS = (
    Case(2, 129, 4, 5, 2, 16, flags="mask"),  # three chunks of the gradient, the last of one step
    Case(2, 67, 3, 9, 1, 5, "bfloat16", "boundaries", ("D",), limit=(0.02, 0.3)),
    Case(1, 258, 2, 3, 2, 1, "float16", "mask", ("dt_bias", "initial_state"), softplus=False, limit=(0.0, 0.1)),
    Case(1, 10, 4, 40, 1, 128, "float32", "", ("initial_state",)),  # several blocks; shares of B and C are added up
    Case(2, 1, 6, 7, 3, 256, "bfloat16", "boundaries", ("D", "dt_bias")),  # one step
)


def values_of(case: Case) -> dict[str, np.ndarray]:
    """Arguments of the scan; those along the row in the case's dtype, NaN at masked steps."""
    rng = np.random.default_rng(case.states)
    heads, vector = (case.batch, case.length, case.heads), (case.batch, case.length, case.groups, case.states)
    shapes = {
        "x": (*heads, case.width), "dt": heads, "A": (case.heads,), "B": vector, "C": vector, "D": (case.heads,),
        "dt_bias": (case.heads,), "initial_state": (case.batch, case.heads, case.width, case.states),
    }  # fmt: skip
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    values["A"] = -np.exp(values["A"])
    values["dt"] = values["dt"] - 3 if case.softplus else np.abs(values["dt"]) * 0.1
    return narrowed(values, case, ("x", "dt", "B", "C"))


def options_of(case: Case) -> dict[str, Any]:
    return {"dt_softplus": case.softplus, "dt_limit": case.limit}


def expected(values: dict[str, np.ndarray], case: Case) -> dict[str, np.ndarray]:
    """y, the final state and every gradient in float64: each head as channels of a selective scan of its own."""
    wide = {name: np.float64(array) for name, array in values.items()}
    flags = flags_of(case)
    bias = wide.get("dt_bias", np.zeros(case.heads))
    raw = np.where(flags.get("mask", np.ones(wide["dt"].shape[:2], bool))[..., None], wide["dt"] + bias, 0)
    dt = softplus(raw) if case.softplus else raw
    low, high = case.limit
    slope = ((dt > low) | (low <= 0)) & (dt < high)
    slope = slope * (sigmoid(raw) if case.softplus else 1)
    dt = np.minimum(np.maximum(dt, low) if low > 0 else dt, high)
    state = wide.get("initial_state", np.zeros((case.batch, case.heads, case.width, case.states)))
    skip = wide.get("D", np.zeros(case.heads))
    y, final = np.zeros(wide["x"].shape), np.zeros(state.shape)
    backward = []
    for head in range(case.heads):
        group = head // (case.heads // case.groups)
        y[:, :, head], final[:, head], gradients = metal_reference.scan(
            wide["x"][:, :, head], np.repeat(dt[:, :, head, None], case.width, -1),
            np.full((case.width, case.states), wide["A"][head]), wide["B"][:, :, group], wide["C"][:, :, group],
            np.full(case.width, skip[head]), initial_state=state[:, head], **flags,
        )  # fmt: skip
        backward.append((group, gradients))
    dy, dfinal = (np.float64(probe) for probe in probes(case, y, final))
    found = {name: np.zeros(array.shape) for name, array in {**wide, "D": skip, "initial_state": state}.items()}
    for head, (group, gradients) in enumerate(backward):
        own = gradients(dy[:, :, head], dfinal[:, head])
        found["x"][:, :, head] = own["u"]
        found["dt"][:, :, head] = own["delta"].sum(-1) * slope[:, :, head]
        found["A"][head], found["D"][head] = own["A"].sum(), own["D"].sum()
        found["B"][:, :, group] += own["B"]
        found["C"][:, :, group] += own["C"]
        found["initial_state"][:, head] = own["initial_state"]
    found["dt_bias"] = found["dt"].sum((0, 1))
    return {"y": y, "final state": final, **{name: found[name] for name in values}}
