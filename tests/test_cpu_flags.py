"""Masks and boundaries inside the fused CPU kernels: borders of tiles, gradients, and what must not leak.

Dimensions: B batch, L length, D channels, N d_state, K width of the convolution.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import TORCH, TORCH_COMPILES
from mambax_cpu import convolution, scan
from mambax_cpu.tiles import CONV_TILE, WIDTH
from mambax_cpu.tiles import SCAN_TILE as TILE
from test_cpu_kernels import SIZES, SPAN, conv_values, normal, scan_values, torch_leaves
from tolerances import GRADIENT, assert_close, relative_error

SHARES = pytest.mark.parametrize("share", [0.03, 0.5, 1.0])
"""How many of the steps begin a sequence, or exist."""

CONV_SIZES = [(1, 1, 1), (3, 17, 4), (CONV_TILE, WIDTH, 4), (2 * CONV_TILE + 1, 3, 6), (200, 47, 1), (5, 2, 80)]
"""(L, D, K): borders of tiles and of blocks of channels, and a window wider than a tile."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel is to write holds NaN before."""

    def poison(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    for module in (scan, convolution):
        monkeypatch.setattr(module, "room", poison)


def flags_of(batch: int, length: int, share: float) -> np.ndarray:
    """(B, L): at random, at the very first step of row 0, and wherever a tile of either kernel begins or ends."""
    flags = np.random.default_rng(length).random((batch, length)) < share
    flags[0, ::TILE] = True
    flags[-1, TILE - 1 :: TILE] = True
    return flags


@TORCH
@SHARES
@pytest.mark.parametrize("sizes", [*SIZES, (1, 4 * TILE, SPAN + 1, 2)])
def test_the_scan_of_packed_rows_and_its_gradients(sizes, share):
    import torch
    from mambax_torch import ops

    from mambax import scan as algorithms

    values, begins = scan_values(*sizes), flags_of(*sizes[:2], share)
    rng = np.random.default_rng(1)
    dy, dfinal = normal(rng, *sizes[:3]), normal(rng, sizes[0], *sizes[2:])
    given = scan.arguments(**values, delta_softplus=True, boundaries=begins)
    y, final, saved = scan.forward(given, save=True)
    got = scan.backward(given, saved, dy, dfinal)

    leaves = torch_leaves(values)
    want_y, want_final = algorithms.selective_scan(
        ops, **leaves, delta_softplus=True, boundaries=torch.from_numpy(begins)
    )
    ((want_y * torch.from_numpy(dy)).sum() + (want_final * torch.from_numpy(dfinal)).sum()).backward()
    assert_close(y, want_y.detach(), what="y")
    assert_close(final, want_final.detach(), what="final state")
    for name, gradient in got._asdict().items():
        assert_close(gradient, leaves[name].grad.numpy(), what=name, tolerance=GRADIENT["float32"])


@TORCH
@SHARES
@pytest.mark.parametrize("kind", ["mask", "boundaries"])
@pytest.mark.parametrize("sizes", CONV_SIZES)
def test_the_convolution_with_flags_and_its_gradients(sizes, kind, share):
    import torch
    from mambax_torch import ops

    from mambax.convolution import causal_conv1d

    length, channels, width = sizes
    values, flags = conv_values(2, length, channels, width), flags_of(2, length, share)
    real = flags if kind == "mask" else np.ones_like(flags)
    dy = normal(np.random.default_rng(1), 2, length, channels)
    y, final = convolution.causal_conv1d(**values, **{kind: flags})
    got = convolution.backward(convolution.arguments(**values, **{kind: flags}), dy)._asdict()

    leaves = torch_leaves(values)
    want_y, want_final = causal_conv1d(ops, **leaves, **{kind: torch.from_numpy(flags)})
    (want_y * torch.from_numpy(dy * real[..., None])).sum().backward()
    assert np.isfinite(y).all()
    assert_close(y[real], want_y.detach().numpy()[real], what="y")
    np.testing.assert_array_equal(final, want_final.detach())
    for name, leaf in leaves.items():
        want = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        assert_close(got[name], want, what=name, tolerance=GRADIENT["float32"])


@TORCH
@TORCH_COMPILES
@pytest.mark.parametrize("kind", ["mask", "boundaries"])
@pytest.mark.parametrize("length", [2, TILE + 3])
def test_torch_the_final_state_and_its_gradient_compiled_and_not(length, kind):
    import mambax_torch as nn
    import torch
    from mambax_torch import ops

    from mambax.convolution import causal_conv1d

    values, flags = conv_values(3, length, 5, 4), flags_of(3, length, 0.2)
    flags[1] = False

    def loss(x: Any, past: Any, weight: Any, bias: Any, op: Any) -> Any:
        y, final = op(x, weight, bias, initial_state=past, **{kind: torch.from_numpy(flags)})
        shown = torch.from_numpy(flags)[..., None] if kind == "mask" else 1.0
        return (y * shown).square().sum() + (final * torch.arange(3)[:, None]).square().sum()

    def gradients(op: Any, dtype: Any, run: Any) -> list[Any]:
        names = ("x", "initial_state", "weight", "bias")
        leaves = [torch.tensor(values[name], dtype=dtype, requires_grad=True) for name in names]
        run(loss)(*leaves, op).backward()
        return [leaf.grad for leaf in leaves]

    want = gradients(lambda *a, **o: causal_conv1d(ops, *a, **o), torch.float64, lambda f: f)
    compiled = gradients(
        nn.causal_conv1d, torch.float32, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
    )
    for got in (gradients(nn.causal_conv1d, torch.float32, lambda f: f), compiled):
        for gradient, expected in zip(got, want, strict=True):
            assert_close(gradient, expected, tolerance=GRADIENT["float32"])


def test_nothing_crosses_a_boundary():
    length, at = 2 * TILE + 5, TILE + 2
    begins = np.zeros((1, length), bool)
    begins[0, at] = True
    values = scan_values(1, length, WIDTH + 1, 3)
    want = scan.selective_scan(**values, delta_softplus=True, boundaries=begins)
    spoiled = {name: v.copy() for name, v in values.items()}
    for name in ("u", "delta", "B", "C", "z"):
        spoiled[name][:, :at] = np.nan
    spoiled["initial_state"][:] = np.nan
    got = scan.selective_scan(**spoiled, delta_softplus=True, boundaries=begins)
    np.testing.assert_array_equal(got[0][:, at:], want[0][:, at:])
    np.testing.assert_array_equal(got[1], want[1])

    inputs = conv_values(1, length, WIDTH + 1, 4)
    before = convolution.causal_conv1d(**inputs, boundaries=begins)
    inputs["x"][:, :at] = np.nan
    inputs["initial_state"][:] = np.nan
    after = convolution.causal_conv1d(**inputs, boundaries=begins)
    np.testing.assert_array_equal(after[0][:, at:], before[0][:, at:])
    np.testing.assert_array_equal(after[1], before[1])


def test_a_boundary_at_a_single_step_drops_the_initial_state():
    values = scan_values(2, 1, WIDTH + 1, 17)
    fresh = values | {"initial_state": np.zeros_like(values["initial_state"])}
    want = scan.selective_scan(**fresh, delta_softplus=True)
    got = scan.selective_scan(**values, delta_softplus=True, boundaries=np.ones((2, 1), bool))
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])
    assert relative_error(scan.selective_scan(**values, delta_softplus=True)[0], want[0]) > 0.01


def test_flags_in_any_layout():
    values, begins = scan_values(2, 40, 5, 3), flags_of(2, 40, 0.2)
    want = scan.selective_scan(**values, boundaries=begins)[0]
    for same in (np.asfortranarray(begins), np.repeat(begins, 2, 1)[:, ::2], begins.astype(np.int64)):
        np.testing.assert_array_equal(scan.selective_scan(**values, boundaries=same)[0], want)
    mask = np.ones((1, 40), bool)
    everything = scan.selective_scan(**values, mask=np.broadcast_to(mask, (2, 40)))[0]
    np.testing.assert_array_equal(everything, scan.selective_scan(**values)[0])


def test_a_mask_with_boundaries_and_other_shapes_are_refused():
    flags = np.ones((2, 9), bool)
    for op, values in ((scan.selective_scan, scan_values(2, 9, 3, 2)), (convolution.causal_conv1d, None)):
        values = conv_values(2, 9, 3, 4) if values is None else values
        with pytest.raises(ValueError, match="a mask and boundaries; expected one of them"):
            op(**values, mask=flags, boundaries=flags)
        for kind in ("mask", "boundaries"):
            with pytest.raises(ValueError, match=rf"{kind} must be of shape \(2, 9\).*\(9, 2\)"):
                op(**values, **{kind: flags.T})
