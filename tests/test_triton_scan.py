"""The Triton scan against float64, forwards and backwards; on the CPU in Triton's interpreter, with small tiles.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import reference
import test_scan
from tolerances import GRADIENT, assert_close, relative_error

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

import torch
from mambax_torch.kernels import devices, scan, tuning
from mambax_torch.operands import ScanOperands
from triton_scan_cases import (
    DEVICE,
    KINDS,
    NAMES,
    compare,
    expected,
    flags_of,
    leaves,
    poisoned,
    probes,
    results,
    small,
    triton_scan,
    values_of,
)

__all__ = ["poisoned", "small"]  # fixtures of every test here

SIZES = [(1, 1, 1, 1), (2, 2, 5, 3), (1, 8, 3, 4), (2, 9, 5, 17), (1, 21, 10, 3)]
"""(B, L, D, N): borders of tiles, windows, intervals, segments, blocks of channels, padded states."""


# --- the suite of every scan, where it is short enough for the interpreter ---------------------------------------


@pytest.mark.skipif(not devices.interpreted(), reason="on a GPU, test_scan.py runs these")
class TestSharedWithEveryScan:
    @pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 21])
    def test_lengths(self, length):
        test_scan.check("torch", "triton", test_scan.arguments(length), delta_softplus=True)

    def test_without_any_optional_argument(self):
        test_scan.test_scan_without_any_optional_argument("torch", "triton")

    @pytest.mark.parametrize("left_out", ["D", "z", "delta_bias", "initial_state"])
    def test_without_one_optional_argument(self, left_out):
        test_scan.test_scan_without_one_optional_argument("torch", "triton", left_out)

    @pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 4), (1, 7, 1)])
    def test_single_channels_and_states(self, sizes):
        test_scan.test_scan_of_single_channels_and_states("torch", "triton", sizes)

    @pytest.mark.parametrize("length", [1, 7])
    def test_masked_steps_do_not_exist(self, length):
        test_scan.test_masked_steps_do_not_exist("torch", "triton", length)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word on the planted NaN
    def test_what_stands_at_masked_steps_is_never_read(self):
        test_scan.test_what_stands_at_masked_steps_is_never_read("torch", "triton")

    def test_float64_is_refused(self):
        test_scan.test_float64_inputs_are_computed_in_float64("torch", "triton")

    @pytest.mark.parametrize(("step", "decay"), [(50, 1000), (50, 1e-3)])
    def test_extreme_steps_and_decays(self, step, decay):
        test_scan.test_extreme_steps_and_decays("torch", "triton", step, decay)

    def test_softplus_of_very_negative_and_very_large_steps(self):
        test_scan.test_softplus_of_very_negative_and_very_large_steps("torch", "triton")


# --- forwards and backwards ---------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("sizes", SIZES)
def test_results_and_gradients(sizes, kind):
    values = values_of(*sizes) | flags_of(kind, *sizes[:2])
    compare(
        results(triton_scan, leaves(values), delta_softplus=True),
        expected(values, delta_softplus=True),
    )


@pytest.mark.parametrize("left_out", [("D",), ("z",), ("delta_bias", "initial_state"), NAMES[5:]])
def test_gradients_without_some_arguments(left_out):
    values = {name: x for name, x in values_of(2, 11, 5, 3).items() if name not in left_out}
    values["delta"] = values["delta"].abs()  # no softplus here
    if "delta_bias" in values:
        values["delta_bias"] = values["delta_bias"].abs()
    compare(results(triton_scan, leaves(values)), expected(values))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_arguments_beside_wide_ones(dtype):
    narrow = getattr(torch, dtype)
    values = values_of(1, 12, 5, 3)
    values |= {name: values[name].to(narrow) for name in ("u", "B", "C", "z")}  # delta is wide, as with a wide bias
    got = results(triton_scan, leaves(values), delta_softplus=True)
    assert got[0]["y"].dtype == narrow
    assert got[0]["final"].dtype == torch.float32
    assert {name: x.dtype for name, x in got[1].items()} == {name: x.dtype for name, x in values.items()}
    want = expected(values, delta_softplus=True)
    assert_close(got[0]["final"].cpu(), want[0]["final"].cpu())
    for name in ("A", "delta", "D", "delta_bias", "initial_state"):  # not even rounded at the end
        assert_close(got[1][name].cpu(), want[1][name].cpu(), what=name, tolerance=GRADIENT["float32"])
    for name in ("u", "B", "C", "z"):
        assert_close(got[1][name].double().cpu(), want[1][name].cpu(), dtype, what=name)
    assert_close(got[0]["y"].double().cpu(), want[0]["y"].cpu(), dtype, what="y")


def test_parts_of_larger_tensors_are_taken_where_they_are(monkeypatch):
    batch, length, channels, n = 2, 9, 5, 3
    values = values_of(batch, length, channels, n)
    xz = torch.cat([values["u"], values["z"]], 2)
    dbc = torch.cat([values["B"], values["C"], values["delta"]], 2)
    parts = {
        "u": xz[..., :channels], "z": xz[..., channels:], "B": dbc[..., :n], "C": dbc[..., n : 2 * n],
        "delta": dbc[..., 2 * n :],
    }  # fmt: skip
    given = scan.arguments(ScanOperands(**values | parts, delta_softplus=True, mask=None, boundaries=None))
    for name, part in parts.items():
        assert getattr(given, name).data_ptr() == part.data_ptr()
    far = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in values.items() if x.ndim == 3}
    reversed_axes = {name: x.mT.contiguous().mT for name, x in values.items() if x.ndim == 3}
    want = results(triton_scan, leaves(values), delta_softplus=True)
    for others in (parts, far, reversed_axes):
        given = {name: x.detach().requires_grad_() for name, x in (values | others).items()}
        got = results(triton_scan, given, delta_softplus=True)
        for found, right in zip(got, want, strict=True):
            assert all(torch.equal(found[name], right[name]) for name in right)


@KINDS
def test_resumed_from_its_own_state(kind):
    values = values_of(1, 21, 5, 3) | flags_of(kind, 1, 21)
    whole, end = triton_scan(**values, delta_softplus=True)
    state, outputs = values["initial_state"], []
    for part in (slice(0, 1), slice(1, 12), slice(12, 21)):
        piece = {name: x[:, part] if x.ndim > 1 and x.shape[1] == 21 else x for name, x in values.items()}
        y, state = triton_scan(**piece | {"initial_state": state}, delta_softplus=True)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1).cpu(), whole.cpu())
    assert_close(state.cpu(), end.cpu())


def test_the_same_bits_every_time():
    values = values_of(2, 11, 5, 3)
    first, second = (results(triton_scan, leaves(values), delta_softplus=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_layout_changes_nothing_but_rounding(monkeypatch):
    values = values_of(1, 17, 9, 3) | flags_of("boundaries", 1, 17)
    want = expected(values, delta_softplus=True)
    cuts = [tuning.Segments(4, 1, 17), tuning.Segments(8, 5, 4), tuning.Segments(4, 3, 7)]
    for cut, resident in zip(cuts, (1, 3, 50), strict=True):
        monkeypatch.setattr(tuning, "segments_of", lambda *sizes, cut=cut: cut)
        monkeypatch.setattr(tuning, "layout_of", lambda *sizes, n=resident: tuning.Layout(resident=n))
        compare(results(triton_scan, leaves(values), delta_softplus=True), want)


@pytest.mark.parametrize(("step", "decay"), [(50.0, 1000.0), (1e-6, 1e-6), (50.0, 1e-3), (-60.0, 1.0)])
def test_gradients_at_extremes_are_finite(step, decay):
    values = values_of(1, 10, 5, 3)
    values["A"] = torch.full_like(values["A"], -decay)
    values["delta"] = torch.full_like(values["delta"], step)
    outputs, gradients = results(triton_scan, leaves(values), delta_softplus=True)
    for name, x in {**outputs, **gradients}.items():
        assert torch.isfinite(x).all(), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word on infinity in the interpreter
def test_an_infinite_state_ends_with_its_sequence():
    values = values_of(1, 12, 5, 3)
    values["B"][:, 4] = float("inf")
    begins = torch.zeros(1, 12, dtype=torch.bool, device=DEVICE)
    begins[:, 6] = True
    y, final = triton_scan(**values, boundaries=begins, delta_softplus=True)
    alone = {name: x[:, 6:] if x.ndim == 3 and x.shape[1] == 12 else x for name, x in values.items()}
    want = reference.scan(
        **{name: x.cpu().numpy() for name, x in alone.items() if name != "initial_state"}, delta_softplus=True
    )
    assert not torch.isfinite(y[:, 4:6]).all()
    assert_close(y[:, 6:].cpu(), want[0])
    assert_close(final.cpu(), want[1])
    _, gradients = results(triton_scan, leaves(values) | {"boundaries": begins}, delta_softplus=True)
    for name in ("u", "delta", "C", "z"):
        assert torch.isfinite(gradients[name][:, 6:]).all(), name


@pytest.mark.parametrize("sizes", [(0, 3, 5, 2), (2, 0, 5, 2), (2, 3, 0, 2)])
def test_nothing_to_do(sizes):
    values = leaves(values_of(*sizes))
    outputs, gradients = results(triton_scan, values, delta_softplus=True)
    assert outputs["y"].shape == values["u"].shape
    if sizes[1] == 0:
        assert torch.equal(outputs["final"], values["initial_state"].detach())
        assert torch.equal(gradients["initial_state"], probes(values)[1].float())
    assert all(gradients[name].shape == x.shape for name, x in values.items())


@pytest.mark.parametrize("n", [1, 16])
def test_blocks_of_channels_that_share_their_sums(n, monkeypatch):
    """A program adds to the sums over channels that it has stored for the block before."""
    monkeypatch.setattr(tuning, "groups_of", lambda *sizes: 1)
    channels = 20 if devices.interpreted() else 300
    values = values_of(1, 12, channels, n)
    compare(results(triton_scan, leaves(values), delta_softplus=True), expected(values, delta_softplus=True))


# --- planted errors -----------------------------------------------------------------------------------------------


PLANTED = 18 if devices.interpreted() else 80
"""Steps: more than one interval, of 8 here and of 64 on a GPU."""


@cache
def right_results() -> Any:
    return expected(values_of(1, PLANTED, 5, 3) | flags_of("mask", 1, PLANTED), delta_softplus=True)


@pytest.mark.parametrize("plant", ["carry", "rate", "mask", "place", "saved"])
def test_planted_errors_are_caught(plant, monkeypatch):
    """A state not carried, one per cent in a decay, a mask forgotten, what was saved misplaced or a little off."""
    values = values_of(1, PLANTED, 5, 3) | flags_of("mask", 1, PLANTED)
    if plant == "carry":
        monkeypatch.setattr(scan, "_carry", lambda ends, *_, **__: ends.zero_())
    if plant == "rate":
        values["A"] = values["A"] * 1.01
    if plant == "mask":
        values["mask"] = torch.ones_like(values["mask"])
    backward = scan.backward
    if plant == "place":
        monkeypatch.setattr(scan, "backward", lambda given, saved, *rest: backward(given, saved.roll(1, 1), *rest))
    if plant == "saved":
        monkeypatch.setattr(scan, "backward", lambda given, saved, *rest: backward(given, saved * 1.01, *rest))
    got, want = results(triton_scan, leaves(values), delta_softplus=True), right_results()
    with pytest.raises(AssertionError, match=r"relative error|NaN"):
        compare(got, want)
    worst = max(relative_error(x.cpu(), want[1][name].cpu()) for name, x in got[1].items())
    assert worst > 30 * GRADIENT["float32"]
