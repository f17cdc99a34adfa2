"""What the tests of Mamba-2's Triton scan share: small chunks for the interpreter, arguments, and right results.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from triton_scan_cases import DEVICE, leaves

from mambax import ssd as algorithms

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

import mambax_torch as nn
import torch
from mambax_torch import ops
from mambax_torch.kernels import devices, ssd, ssd_backward, ssd_forward, ssd_plan, ssd_states, ssd_steps

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: chunks of 4 steps, saved intervals of 8, segments of 2 chunks or more.

    Functions that kernels call become plain Python, as the interpreter prepares each call for a millisecond.
    """
    if not devices.interpreted():
        return
    monkeypatch.setattr(ssd_plan, "chunk_of", lambda width, states, work: 4)
    monkeypatch.setattr(ssd, "INTERVAL", 8)
    monkeypatch.setattr(ssd, "processors", lambda device: 1)
    monkeypatch.setattr(ssd, "CARRY", {"ROWS": 2, "BC": 256})
    interpreted = type(ssd_steps.tile)
    for module in (ssd_steps, ssd_states, ssd_forward, ssd_backward):
        for name, function in vars(module).copy().items():
            if type(function) is interpreted and not name.endswith("_kernel"):
                monkeypatch.setattr(module, name, function.rewrite())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel is to write holds NaN before: nothing can be left out, or read before it is written."""

    def poison(*shape: int, like: Any, dtype: Any = torch.float32) -> Any:
        return torch.full(shape, float("nan"), dtype=dtype, device=like.device)

    monkeypatch.setattr(ssd, "room", poison)


def values_of(sizes: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    """Every floating argument for (B, L, H, P, G, N), float32, exact in bfloat16; states live for tens of steps."""
    batch, length, heads, width, groups, states = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(torch.bfloat16).float().to(DEVICE)

    return {
        "x": normal(batch, length, heads, width), "dt": normal(batch, length, heads) - 2,
        "A": -torch.exp(normal(heads)), "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states), "D": normal(heads), "dt_bias": normal(heads),
        "initial_state": normal(batch, heads, width, states),
    }  # fmt: skip


def results(function: Any, given: dict[str, Any], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """y (zero where masked) and the final state; the gradient of everything that is a leaf."""
    y, final = function(**given, **options)
    if given.get("mask") is not None:
        y = torch.where(given["mask"][..., None, None], y, 0.0)
    rng = np.random.default_rng(1)
    of_y = torch.tensor(np.round(rng.standard_normal(y.shape) * 8) / 8, device=DEVICE)  # exact in every dtype
    of_final = torch.tensor(rng.standard_normal(final.shape), device=DEVICE)
    ((y.double() * of_y).sum() + (final.double() * of_final).sum()).backward()
    gradients = {name: x.grad for name, x in given.items() if x is not None and x.requires_grad}
    return {"y": y.detach(), "final": final.detach()}, gradients


def expected(values: dict[str, Any], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same by the definition, one step after another in float64."""

    def definition(**given: Any) -> Any:
        return algorithms.ssd(ops, **given, algorithm="sequential")

    return results(definition, leaves(values, torch.float64), **options)


def triton_ssd(**given: Any) -> tuple[Any, Any]:
    return nn.ssd(**given, impl="triton")
