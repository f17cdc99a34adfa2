"""One token by the Triton kernels against float64; on the CPU in Triton's interpreter.

Dimensions: B batch, D channels, K width of the convolution, N d_state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from tolerances import assert_close

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
scan_ops = pytest.importorskip("mambax_torch.kernels.scan_ops")
step = pytest.importorskip("mambax_torch.kernels.step")
targets = pytest.importorskip("mambax_torch.kernels.step_targets")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, dtype: Any = None) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(
        DEVICE, dtype or torch.float32
    )


def array(x: Any) -> np.ndarray:
    return x.double().cpu().numpy()


def scan_arguments(channels: int, states: int, dtype: Any = None) -> dict[str, Any]:
    """As a model has them: u and z parts of one array, B and C parts of another."""
    xz, bc = normal(3, 1, 2 * channels, dtype=dtype), normal(3, 1, 2 * states, dtype=dtype)
    return {
        "u": xz[..., :channels], "delta": 5 * normal(3, 1, channels, dtype=dtype) - 2,
        "A": -normal(channels, states).exp(), "B": bc[..., :states], "C": bc[..., states:], "D": normal(channels),
        "z": xz[..., channels:], "delta_bias": normal(channels), "initial_state": normal(3, channels, states),
    }  # fmt: skip


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("channels", [1, 20, 300])
def test_convolution(width, channels):
    x = normal(3, 2 * channels)[:, :channels]
    weight, bias, state = normal(channels, 1, width), normal(channels), normal(3, width - 1, channels)
    y, after = step.conv_step(x, weight, bias, state)
    want, last = reference.convolution(*map(array, (x[:, None], weight, bias)), initial_state=array(state))
    assert_close(array(y), want[:, 0])
    np.testing.assert_array_equal(array(after), last)
    y, _ = step.conv_step(x, weight, None, state, None)
    want, _ = reference.convolution(*map(array, (x[:, None], weight)), initial_state=array(state), activation=None)
    assert_close(array(y), want[:, 0])


@pytest.mark.parametrize("states", [1, 5, 16, 64])
@pytest.mark.parametrize("channels", [1, 20, 70])
def test_scan(states, channels):
    given = scan_arguments(channels, states)
    y, after = step.scan_step(**given, delta_softplus=True)
    wide = {name: array(x) for name, x in given.items()}
    want, last = reference.scan(**wide, delta_softplus=True)
    assert_close(array(y), want, what="y")
    assert_close(array(after), last, what="state")
    bare = {name: given[name] for name in ("u", "delta", "A", "B", "C")}
    y, after = step.scan_step(**bare)
    want, last = reference.scan(**{name: wide[name] for name in bare})
    assert_close(array(y), want, what="y")
    assert_close(array(after), last, what="state")


def test_narrow_arguments_and_a_float32_state():
    given = scan_arguments(20, 16, torch.bfloat16)
    y, after = step.scan_step(**given, delta_softplus=True)
    want, last = reference.scan(**{name: array(x) for name, x in given.items()}, delta_softplus=True)
    assert y.dtype == torch.bfloat16
    assert after.dtype == torch.float32
    assert_close(array(y), want, "bfloat16")
    assert_close(array(after), last)


def test_softplus_is_exact_for_every_time_step():
    """With A = 0, B = C = u = 1 the output is softplus(delta)."""
    delta = torch.tensor(
        [-80.0, -60, -30, -17, -16, -10, -3, -1, -1e-3, 0, 1e-3, 1, 5, 19, 20, 21, 80], device=DEVICE
    )
    count = len(delta)
    ones = torch.ones(1, 1, count, device=DEVICE)
    y, _ = step.scan_step(
        ones, delta[None, None], torch.zeros(count, 1, device=DEVICE), ones[..., :1], ones[..., :1],
        delta_softplus=True,
    )  # fmt: skip
    want = np.logaddexp(0, array(delta))
    assert (np.abs(array(y)[0, 0] - want) <= 1e-6 * want).all()
    y, _ = step.scan_step(
        ones, ones * float("nan"), torch.zeros(count, 1, device=DEVICE), ones[..., :1], ones[..., :1],
        delta_softplus=True,
    )  # fmt: skip
    assert y.isnan().all()


@pytest.mark.parametrize("states", [5, 16])
def test_the_scan_takes_one_position_in_one_launch(states, monkeypatch):
    """Which of no mask, no boundary and no gradient wanted is all there is; the state goes where it belongs."""
    given = {**scan_arguments(20, states), "delta_softplus": True}
    wide = {name: x if isinstance(x, bool) else array(x) for name, x in given.items()}
    want, last = reference.scan(**wide)
    room = torch.full_like(given["initial_state"], float("nan"))
    with targets.written_into([(given["initial_state"], room)]):
        y, after = scan_ops.selective_scan(**given)
    assert after is room
    assert_close(array(y), want, what="y")
    assert_close(array(after), last, what="state")
    many = torch.stack([normal(20), normal(20)], 1)
    apart = {**given, "D": many[:, 0], "delta_bias": many[:, 1], "A": given["A"].T.contiguous().T}
    for name in ("D", "delta_bias", "A"):
        wide[name] = array(apart[name])
    assert_close(array(scan_ops.selective_scan(**apart)[0]), reference.scan(**wide)[0], what="parts of others")
    taken = []
    monkeypatch.setattr(scan_ops, "scan_step", lambda *a, **k: taken.append(1) or (a[0], None))
    scan_ops.selective_scan(**{**given, "initial_state": None})
    assert len(taken) == 1
    exists = torch.ones(3, 1, dtype=torch.bool, device=DEVICE)
    for other in ({"mask": exists}, {"boundaries": exists}, {"u": given["u"].clone().requires_grad_()}):
        scan_ops.selective_scan(**{**given, **other})
    assert len(taken) == 1


def test_a_log_is_the_matrix():
    given = scan_arguments(20, 16)
    want = step.scan_step(**given, delta_softplus=True)
    rows = {
        name: None if x is None else x[:, 0] for name, x in given.items() if name in ("u", "delta", "B", "C", "z")
    }
    after = torch.full_like(given["initial_state"], float("nan"))
    y = step.scan_step_into(
        rows["u"], rows["delta"], given["A"].neg().log(), rows["B"], rows["C"], given["D"], rows["z"],
        given["delta_bias"], True, given["initial_state"], after, A_is_log=True,
    )  # fmt: skip
    assert_close(array(y), array(want[0][:, 0]))
    assert_close(array(after), array(want[1]))


def test_the_state_after_may_take_the_place_of_the_state_before():
    given = scan_arguments(20, 16)
    want, last = step.scan_step(**given, delta_softplus=True)
    state, x = given["initial_state"].clone(), normal(3, 20)
    with targets.written_into([(state, state)]):
        y, after = step.scan_step(**{**given, "initial_state": state}, delta_softplus=True)
    assert after is state
    assert torch.equal(y, want)
    assert torch.equal(state, last)
    weight, past = normal(20, 1, 4), normal(3, 3, 20)
    want, last = step.conv_step(x, weight, None, past)
    with targets.written_into([(past, past)]):
        y, after = step.conv_step(x, weight, None, past)
    assert after is past
    assert torch.equal(y, want)
    assert torch.equal(past, last)


def test_targets_are_those_of_the_state_alone():
    state, other, place = normal(3, 3, 20), normal(3, 3, 20), torch.empty(3, 3, 20, device=DEVICE)
    with targets.written_into([(state, place)]):
        assert targets.target_of(state) is place
        assert targets.target_of(other) is None
        assert targets.target_of(state[:2]) is None  # the same place, another shape
    assert targets.target_of(state) is None


def test_torch_finds_nothing_wrong_with_the_operators():
    x, weight, state = normal(3, 20), normal(20, 1, 4), normal(3, 3, 20)
    torch.library.opcheck(torch.ops.mambax.triton_conv_step.default, (x, weight, None, state, "silu"))
    given = scan_arguments(8, 4)
    rows = [given[name][:, 0] if name in ("u", "delta", "B", "C", "z") else given[name] for name in given]
    operator = torch.ops.mambax.triton_scan_step.default
    torch.library.opcheck(operator, (*rows[:8], True, given["initial_state"]))
    torch.library.opcheck(operator, (*rows[:5], None, None, None, False, None))


def test_what_does_not_fit_is_refused():
    given = scan_arguments(20, 16)
    with pytest.raises(ValueError, match=r"scan_step: B is \(3, 15\); expected \(3, 16\)"):
        step.scan_step(**{**given, "B": given["B"][..., :15]})
    with pytest.raises(ValueError, match=r"conv_step: before is \(3, 2, 20\); expected \(3, 3, 20\)"):
        step.conv_step(normal(3, 20), normal(20, 1, 4), None, normal(3, 2, 20))
    half = given["initial_state"].half()
    rows = [given[name][:, 0] for name in ("u", "delta", "B", "C")]
    with pytest.raises(ValueError, match=r"states must be float32 and contiguous, found torch\.float16"):
        step.scan_step_into(rows[0], rows[1], given["A"], rows[2], rows[3], None, None, None, False, half, half)
