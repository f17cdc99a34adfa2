"""What the tests of the Triton scan share: small tiles for the interpreter, arguments, and right results.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tolerances import FORWARD, GRADIENT, assert_close

from mambax import scan as algorithms

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

import mambax_torch as nn
import torch
import triton
from mambax_torch import ops
from mambax_torch.kernels import (
    devices,
    scan,
    scan_adjoint,
    scan_backward,
    scan_forward,
    scan_steps,
    tuning,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
KINDS = pytest.mark.parametrize("kind", ["plain", "mask", "boundaries"])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: intervals of 8 steps, windows of 4, segments of 4 or more, blocks of few channels, each
    thread with two of them.

    Functions that kernels call become plain Python, as the interpreter prepares each call for a millisecond.
    """
    if not devices.interpreted():
        return
    monkeypatch.setattr(scan, "interval_of", lambda *sizes: 8)
    monkeypatch.setattr(scan_backward, "WINDOW", triton.language.constexpr(4))
    monkeypatch.setattr(scan, "ROWS", 2)
    monkeypatch.setattr(scan, "LANES", 4)
    monkeypatch.setattr(tuning, "SHORTEST", 4)
    monkeypatch.setattr(tuning, "processors", lambda device: 1)
    blocks = tuning.block_of
    monkeypatch.setattr(tuning, "block_of", lambda cells, D, N: min(8, blocks(cells, D, N)))
    interpreted = type(scan_steps.row)
    for module in (scan_steps, scan_forward, scan_adjoint, scan_backward):
        for name, function in vars(module).copy().items():
            if type(function) is interpreted and not name.endswith("_kernel"):
                monkeypatch.setattr(module, name, function.rewrite())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel is to write holds NaN before: nothing can be left out, or read before it is written."""

    def poison(*shape: int, like: Any, dtype: Any = torch.float32) -> Any:
        return torch.full(shape, float("nan"), dtype=dtype, device=like.device)

    monkeypatch.setattr(scan, "room", poison)


def values_of(batch: int, length: int, channels: int, n: int, seed: int = 0) -> dict[str, Any]:
    """Every floating argument, float32; states live for tens of steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(DEVICE)

    return {
        "u": normal(batch, length, channels), "delta": normal(batch, length, channels) - 2,
        "A": -torch.exp(normal(channels, n)), "B": normal(batch, length, n), "C": normal(batch, length, n),
        "D": normal(channels), "z": normal(batch, length, channels), "delta_bias": normal(channels),
        "initial_state": normal(batch, channels, n),
    }  # fmt: skip


def flags_of(kind: str, batch: int, length: int) -> dict[str, Any]:
    """A mask with a row masked to its middle, or boundaries of which two follow each other."""
    rng = np.random.default_rng(length)
    if kind == "plain":
        return {}
    flags = rng.random((batch, length)) < (0.7 if kind == "mask" else 0.2)
    if kind == "mask":
        flags[0, : length // 2] = False
    else:
        flags[-1, length // 3 : length // 3 + 2] = True
    return {kind: torch.tensor(flags, device=DEVICE)}


def leaves(values: dict[str, Any], dtype: Any = None) -> dict[str, Any]:
    return {
        name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_() if x.is_floating_point() else x
        for name, x in values.items()
    }


def probes(values: dict[str, Any]) -> tuple[Any, Any]:
    """What the loss weighs y and the final state with; the first exact in every dtype."""
    batch, length, channels = values["u"].shape
    rng = np.random.default_rng(1)
    y, final = rng.standard_normal((batch, length, channels)), rng.standard_normal((batch, *values["A"].shape))
    return torch.tensor(np.round(y * 32) / 32, device=DEVICE), torch.tensor(final, device=DEVICE)


def results(function: Any, given: dict[str, Any], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """y (zero where masked) and the final state; the gradient of everything that is a leaf."""
    y, final = function(**given, **options)
    if given.get("mask") is not None:
        y = torch.where(given["mask"][..., None], y, 0.0)
    of_y, of_final = probes(given)
    ((y.double() * of_y).sum() + (final.double() * of_final).sum()).backward()
    gradients = {name: x.grad for name, x in given.items() if x is not None and x.requires_grad}
    return {"y": y.detach(), "final": final.detach()}, gradients


def expected(values: dict[str, Any], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same by the array algorithm in float64, of which test_gradients.py makes sure."""
    return results(
        lambda **given: algorithms.selective_scan(ops, **given), leaves(values, torch.float64), **options
    )


def compare(
    got: tuple[dict[str, Any], dict[str, Any]],
    want: tuple[dict[str, Any], dict[str, Any]],
    forward: float = FORWARD["float32"],
    gradient: float = GRADIENT["float32"],
) -> None:
    for found, right, limit in ((got[0], want[0], forward), (got[1], want[1], gradient)):
        assert found.keys() == right.keys()
        for name, x in right.items():
            assert_close(found[name].double().cpu(), x.cpu(), what=name, tolerance=limit)


def triton_scan(**given: Any) -> tuple[Any, Any]:
    return nn.selective_scan(**given, impl="triton")
