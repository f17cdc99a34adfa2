"""Mamba-2's Triton scan against float64, both ways; on the CPU in Triton's interpreter, in small chunks.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from typing import Any

import pytest
from tolerances import FORWARD, GRADIENT, assert_close, relative_error

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

import torch
from mambax_torch.kernels import ssd, ssd_plan
from mambax_torch.operands import SSDOperands
from triton_scan_cases import DEVICE, compare, flags_of, leaves
from triton_ssd_cases import NAMES, expected, poisoned, results, small, triton_ssd, values_of

__all__ = ["poisoned", "small"]  # fixtures of every test here

CASES = [
    ((1, 1, 1, 1, 1, 1), "plain"), ((2, 3, 2, 1, 1, 2), "mask"), ((1, 4, 2, 3, 2, 1), "boundaries"),
    ((1, 9, 4, 3, 2, 5), "plain"), ((2, 10, 2, 3, 1, 5), "mask"), ((2, 13, 1, 3, 1, 5), "boundaries"),
    ((1, 21, 1, 2, 1, 3), "plain"), ((1, 5, 1, 33, 1, 130), "plain"),
]  # fmt: skip
"""(B, L, H, P, G, N): borders of chunks, segments, intervals, groups; several blocks of P and of N."""


# --- forwards and backwards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "kind"), CASES)
def test_results_and_gradients(sizes, kind):
    values = values_of(sizes) | flags_of(kind, *sizes[:2])
    compare(results(triton_ssd, leaves(values), dt_softplus=True), expected(values, dt_softplus=True))


@pytest.mark.parametrize("left_out", [("D",), ("dt_bias", "initial_state"), NAMES[5:]])
def test_gradients_without_some_arguments(left_out):
    values = {name: x for name, x in values_of((1, 6, 2, 3, 1, 2)).items() if name not in left_out}
    values["dt"] = values["dt"].abs() / 4  # no softplus here
    if "dt_bias" in values:
        values["dt_bias"] = values["dt_bias"].abs()
    compare(results(triton_ssd, leaves(values)), expected(values))


@pytest.mark.parametrize("limit", [(0.1, 0.3), (0.1, float("inf")), (0.0, 0.2)])
def test_limited_steps(limit):
    values = values_of((1, 6, 2, 3, 1, 2))
    options = {"dt_softplus": True, "dt_limit": limit}
    compare(results(triton_ssd, leaves(values), **options), expected(values, **options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_arguments(dtype):
    """Products are of bfloat16, or of float16 as TF32."""
    narrow = getattr(torch, dtype)
    values = values_of((1, 10, 2, 3, 1, 5))
    values |= {name: values[name].to(narrow) for name in ("x", "B", "C", "dt")}
    got = results(triton_ssd, leaves(values), dt_softplus=True)
    assert got[0]["y"].dtype == narrow
    assert got[0]["final"].dtype == torch.float32
    assert {name: x.dtype for name, x in got[1].items()} == {name: x.dtype for name, x in values.items()}
    want = expected(values, dt_softplus=True)
    for found, right in zip(got, want, strict=True):
        for name, x in right.items():
            assert_close(found[name].double().cpu(), x.cpu(), dtype, what=name)
    assert relative_error(got[0]["final"].cpu(), want[0]["final"].cpu()) < 5e-3  # it is not rounded itself


def test_states_beyond_float16():
    values = values_of((1, 6, 1, 3, 1, 2))
    values["initial_state"] *= 1e6
    values["C"] *= 2**-10
    want = expected(values, dt_softplus=True)
    values |= {name: values[name].to(torch.float16) for name in ("x", "B", "C")}
    y, final = triton_ssd(**values, dt_softplus=True)
    assert_close(final.cpu(), want[0]["final"].cpu())
    assert_close(y.double().cpu(), want[0]["y"].cpu(), "float16")


def test_a_step_that_forgets_everything_costs_no_digits():
    """The running sums reach -10,000 inside a chunk; those of float32 would leave errors of 1e-3."""
    values = values_of((1, 8, 2, 3, 1, 2))
    values["dt"] = torch.full_like(values["dt"], 1e-3)
    values["A"] = torch.tensor([-100.0, -2.0], device=DEVICE)
    values["dt"][:, 1] = 100.0
    compare(results(triton_ssd, leaves(values)), expected(values))


@pytest.mark.parametrize(("step", "decay"), [(50.0, 1000.0), (1e-6, 1e-6), (-60.0, 1.0), (50.0, 1e30)])
def test_extremes_are_finite(step, decay):
    values = values_of((1, 5, 1, 2, 1, 2))
    values["A"] = torch.full_like(values["A"], -decay)
    values["dt"] = torch.full_like(values["dt"], step)
    outputs, gradients = results(triton_ssd, leaves(values), dt_softplus=True)
    for name, x in {**outputs, **gradients}.items():
        assert torch.isfinite(x).all(), name


def test_what_stands_at_masked_steps_is_never_read():
    values = values_of((1, 7, 1, 3, 1, 2)) | flags_of("mask", 1, 7)
    want = results(triton_ssd, leaves(values), dt_softplus=True)
    gone = ~values["mask"]
    broken = {name: values[name].clone() for name in ("x", "dt", "B", "C")}
    for x in broken.values():
        x[gone] = float("nan")
    got = results(triton_ssd, leaves(values | broken), dt_softplus=True)
    for found, right in zip(got, want, strict=True):
        assert all(torch.equal(found[name], right[name]) for name in right)
    assert all((got[1][name][gone] == 0).all() for name in broken)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's word on NaN in the interpreter
def test_nan_spreads():
    values = values_of((1, 6, 1, 2, 1, 2))
    values["dt"][0, 2] = float("nan")
    y, final = triton_ssd(**values, dt_softplus=True, dt_limit=(0.1, 0.5))
    assert torch.isnan(y[:, 2:]).all()
    assert torch.isnan(final).all()


def test_parts_of_larger_tensors_are_taken_where_they_are():
    batch, length, heads, width, groups, n = sizes = (2, 3, 2, 2, 2, 4)
    values = values_of(sizes)
    flat = {name: values[name].flatten(2) for name in ("x", "B", "C", "dt")}
    parts = torch.cat(list(flat.values()), 2).split([x.shape[2] for x in flat.values()], 2)
    shapes = ((heads, width), (groups, n), (groups, n), (heads,))
    views = {
        name: part.reshape(batch, length, *shape) for name, part, shape in zip(flat, parts, shapes, strict=True)
    }
    given = ssd_plan.arguments(
        SSDOperands(**values | views, dt_softplus=True, dt_min=0.0, dt_max=1.0, mask=None, boundaries=None)
    )
    for name, view in views.items():
        assert getattr(given, name).data_ptr() == view.data_ptr()
    turned = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in values.items() if x.ndim > 2}
    want = results(triton_ssd, leaves(values), dt_softplus=True)
    for others in (views, turned):
        others = {name: x.detach().requires_grad_() for name, x in (values | others).items()}
        for found, right in zip(results(triton_ssd, others, dt_softplus=True), want, strict=True):
            assert all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.parametrize("kind", ["mask", "boundaries"])
def test_resumed_from_its_own_state(kind):
    values = values_of((1, 14, 2, 3, 1, 2)) | flags_of(kind, 1, 14)
    whole, end = triton_ssd(**values, dt_softplus=True)
    state, outputs = values["initial_state"], []
    for part in (slice(0, 1), slice(1, 7), slice(7, 14)):
        piece = {name: x[:, part] if x.ndim > 1 and x.shape[1] == 14 else x for name, x in values.items()}
        y, state = triton_ssd(**piece | {"initial_state": state}, dt_softplus=True)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1).cpu(), whole.cpu())
    assert_close(state.cpu(), end.cpu())


def test_the_layout_changes_nothing_but_rounding_and_bits_are_the_same_every_time(monkeypatch):
    values = values_of((1, 18, 1, 3, 1, 2)) | flags_of("boundaries", 1, 18)
    want = expected(values, dt_softplus=True)
    found = []
    for cut in ((1, 5), (3, 2), (3, 2)):
        monkeypatch.setattr(ssd_plan, "segments_of", lambda *sizes, cut=cut: cut)
        found.append(results(triton_ssd, leaves(values), dt_softplus=True))
        compare(found[-1], want)
    for one, other in zip(*found[1:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_segments_cover_every_chunk_and_fill_a_gpu():
    for programs in (1, 24, 80, 192, 640):
        for chunks in (1, 2, 7, 32, 512, 15_625):
            segments, per = ssd_plan.segments_of(programs, chunks, 132)
            assert (segments - 1) * per < chunks <= segments * per
            assert segments == 1 or programs < 264
    assert ssd_plan.segments_of(24, 512, 132)[0] * 24 >= 2 * 132


@pytest.mark.parametrize("sizes", [(0, 3, 2, 2, 1, 2), (2, 0, 2, 2, 1, 2), (2, 3, 2, 2, 1, 0)])
def test_nothing_to_do(sizes):
    values = leaves(values_of(sizes))
    outputs, gradients = results(triton_ssd, values, dt_softplus=True)
    assert outputs["y"].shape == values["x"].shape
    assert torch.equal(outputs["final"], values["initial_state"].detach())
    if sizes[1]:
        compare((outputs, gradients), expected(values, dt_softplus=True))
    assert all(gradients[name].shape == x.shape for name, x in values.items())


# --- planted errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plant", ["carry", "rate", "mask", "saved", "decay"])
def test_planted_errors_are_caught(plant, monkeypatch):
    """A state not carried, one per cent in a decay, a mask forgotten, what was saved a little off."""
    values = values_of((1, 14, 1, 2, 1, 2)) | flags_of("mask", 1, 14)
    want = expected(values, dt_softplus=True)
    monkeypatch.setattr(ssd_plan, "segments_of", lambda *sizes: (2, 2))
    if plant == "carry":
        monkeypatch.setattr(ssd, "_carried", lambda *_, **__: None)
    if plant == "rate":
        values["A"] = values["A"] * 1.01
    if plant == "mask":
        values["mask"] = torch.ones_like(values["mask"])
    backward, steps = ssd.backward, ssd._steps
    if plant == "saved":
        monkeypatch.setattr(ssd, "backward", lambda given, saved, *rest: backward(given, saved * 1.01, *rest))
    if plant == "decay":

        def off(*given: Any, **options: Any) -> Any:
            made = steps(*given, **options)
            made.high.mul_(1.01)
            return made

        monkeypatch.setattr(ssd, "_steps", off)
    got = results(triton_ssd, leaves(values), dt_softplus=True)
    with pytest.raises(AssertionError, match=r"relative error|NaN"):
        compare(got, want)
    worst = max(relative_error(x.cpu(), want[1][name].cpu()) for name, x in got[1].items())
    assert worst > 10 * GRADIENT["float32"]
    assert plant == "saved" or relative_error(got[0]["y"].cpu(), want[0]["y"].cpu()) > 10 * FORWARD["float32"]
