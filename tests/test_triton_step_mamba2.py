"""One token through a mixer of Mamba-2 by the Triton kernels, against float64; on the CPU in Triton's interpreter.

Dimensions: B batch, L length, D d_inner = H P, H heads, P head_dim, G groups, N d_state, K d_conv, C channels of
the convolution.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from decode_steps import mamba2_model
from tolerances import FORWARD, assert_close

from mambax import get_backend
from mambax.blocks import LayerState
from mambax.mamba2 import gated_rms_norm

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
kernels = pytest.importorskip("mambax_torch.kernels.step_mamba2")
gated_norm = pytest.importorskip("mambax_torch.kernels.gated_norm")
targets = pytest.importorskip("mambax_torch.kernels.step_targets")

nn, numpy = get_backend("torch"), get_backend("numpy")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPES: list[dict[str, Any]] = [
    {"n_heads": 3, "head_dim": 37, "d_state": 33, "n_groups": 1, "d_conv": 1},
    {"n_heads": 4, "head_dim": 10, "d_state": 12, "n_groups": 2, "d_conv": 4, "dt_limit": (0.5, 0.7)},
    {"n_heads": 2, "head_dim": 1, "d_state": 1, "n_groups": 2, "d_conv": 2, "use_conv_bias": False},
    {"n_heads": 2, "head_dim": 64, "d_state": 128, "n_groups": 1, "d_conv": 4, "norm_epsilon": 0.3},
    {"n_heads": 1, "head_dim": 20, "d_state": 300, "n_groups": 1, "d_conv": 3, "dt_limit": (0.0, 0.2)},
    {"n_heads": 6, "head_dim": 5, "d_state": 16, "n_groups": 3, "d_conv": 5, "dt_limit": (0.9, float("inf"))},
]
"""Sizes that are powers of two and others; one program to a head, and several; heads that share B and C."""

GATED = ("gate_first", "norm_first", "none")


# --- between the projections ----------------------------------------------------------------------------------


def operands(batch: int, dtype: str, shape: dict[str, Any]) -> tuple[Any, Any, np.ndarray, Any]:
    """A mixer and the same in float64, what in_proj gave (B, D + C + H) and the state before, exact in the dtype.

    Time steps of -9 to 9 before their bias, inputs and states of the size of one.
    """
    mixer = mamba2_model(nn, dtype, n_layer=1, **shape).to(DEVICE).backbone.layers[0].mixer
    exact = mamba2_model(numpy, "float64", n_layer=1, **shape).backbone.layers[0].mixer
    numpy.set_parameters(exact, {name: np.float64(nn.to_numpy(x)) for name, x in nn.parameters(mixer).items()})
    options, rng = mixer.options, np.random.default_rng(batch)
    channels = options.conv_channels
    projected = rng.standard_normal((batch, options.d_inner + channels + options.n_heads))
    projected[:, -options.n_heads :] *= 3
    past = rng.standard_normal((batch, options.d_conv - 1, channels))
    held = rng.standard_normal((batch, options.n_heads, options.head_dim, options.d_state))
    kind = getattr(torch, dtype)
    given = [torch.tensor(x).to(DEVICE, kind) for x in (projected, past)]
    state = LayerState(given[1], torch.tensor(held, dtype=torch.float32, device=DEVICE))
    return mixer, exact, given[0], state


def mixed(mixer: Any, projected: Any, state: Any) -> tuple[Any, Any]:
    """By the kernels, the states in rooms that held NaN."""
    after = LayerState(*(torch.full_like(held, float("nan")) for held in state))
    weight = None if mixer.options.gated_norm == "none" else mixer.norm.weight
    with torch.no_grad():
        y = kernels.mixed(
            mixer.options, projected, mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_bias, mixer.A_log, mixer.D,
            weight, tuple(state), tuple(after),
        )  # fmt: skip
    return y, after


def exactly(mixer: Any, projected: Any, state: Any) -> tuple[np.ndarray, Any]:
    """By the definition, in float64."""
    wide = [x.double().cpu().numpy() for x in (projected[:, None], *state)]
    y, after = mixer.mix(wide[0], LayerState(*wide[1:]), None, None)
    return y[:, 0], after


def check(batch: int, dtype: str, shape: dict[str, Any]) -> None:
    mixer, exact, projected, state = operands(batch, dtype, shape)
    before = [held.clone() for held in state]
    (y, after), (want, want_after) = mixed(mixer, projected, state), exactly(exact, projected, state)
    assert y.dtype == projected.dtype
    # to bfloat16 Triton's interpreter cuts off where a GPU rounds: twice the error, at every rounding
    limit = FORWARD[dtype] * (2 if dtype == "bfloat16" and DEVICE == "cpu" else 1)
    assert_close(y.double().cpu(), want, what="y", tolerance=limit)
    assert_close(after.ssm.cpu(), want_after.ssm, what="state", tolerance=limit)
    np.testing.assert_array_equal(after.conv.double().cpu(), want_after.conv)
    assert all(map(torch.equal, state, before))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_against_float64(batch, shape):
    check(batch, "float32", {"gated_norm": GATED[SHAPES.index(shape) % 3], **shape})


@pytest.mark.parametrize("gated_norm", GATED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_values(dtype, gated_norm):
    check(2, dtype, {**SHAPES[1], "gated_norm": gated_norm})


@pytest.mark.parametrize("gated_norm", GATED)
def test_rows_side_by_side_or_not(gated_norm):
    """What in_proj gave may be a part of something wider, or transposed; each row is the same alone."""
    mixer, _, projected, state = operands(2, "float32", {**SHAPES[1], "gated_norm": gated_norm})
    want, after = mixed(mixer, projected, state)
    wider = torch.cat([projected, projected], 1)[:, : projected.shape[1]]
    for other in (wider, projected.T.contiguous().T):
        assert other.stride() != projected.stride()
        got, held = mixed(mixer, other, state)
        assert_close(got.cpu(), want.cpu(), tolerance=1e-6)
        assert_close(held.ssm.cpu(), after.ssm.cpu(), tolerance=1e-6)
    for row in (slice(0, 1), slice(1, 2)):
        got, held = mixed(mixer, projected[row], LayerState(*(x[row].contiguous() for x in state)))
        assert_close(got.cpu(), want[row].cpu(), tolerance=1e-6)
        assert_close(held.ssm.cpu(), after.ssm[row].cpu(), tolerance=1e-6)


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.5)])
def test_what_is_no_number_stays_none(limit):
    """Where a limit might take its place."""
    mixer, _, projected, state = operands(1, "float32", {**SHAPES[1], "dt_limit": limit})
    projected[0, -1] = float("nan")
    _, after = mixed(mixer, projected, state)
    assert after.ssm[0, -1].isnan().all()
    assert not after.ssm[0, :-1].isnan().any()


# --- outside of a stack --------------------------------------------------------------------------------------


def normal(*shape: int, dtype: Any = None) -> Any:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return found.to(DEVICE, dtype or torch.float32)


def array(x: Any) -> np.ndarray:
    return x.double().cpu().numpy()


def scan_arguments(sizes: tuple[int, ...], dtype: Any = None) -> dict[str, Any]:
    """As a mixer has them: x, B and C parts of one array."""
    batch, heads, width, groups, states = sizes
    inner, wide = heads * width, groups * states
    xBC = normal(batch, 1, inner + 2 * wide, dtype=dtype)
    B, C = (part.reshape(batch, 1, groups, states) for part in xBC[..., inner:].split(wide, -1))
    return {
        "x": xBC[..., :inner].reshape(batch, 1, heads, width), "dt": 3 * normal(batch, 1, heads, dtype=dtype),
        "A": -normal(heads).exp(), "B": B, "C": C, "D": normal(heads), "dt_bias": normal(heads + 1)[:-1],
        "initial_state": normal(batch, heads, width, states),
    }  # fmt: skip


def scan_exactly(given: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return numpy.ssd(**{name: array(x) for name, x in given.items()}, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("sizes", "limit"),
    [((1, 2, 64, 1, 128), (0.0, float("inf"))), ((3, 4, 5, 2, 7), (0.1, 0.9)), ((2, 2, 1, 2, 1), (0.2, 9.0))],
    ids=str,
)
def test_scan_of_one_position(sizes, limit, dtype):
    given = scan_arguments(sizes, getattr(torch, dtype))
    options = {"dt_softplus": True, "dt_limit": limit}
    room = torch.full_like(given["initial_state"], float("nan"))
    with targets.written_into([(given["initial_state"], room)]):
        y, after = kernels.ssd_step(**given, **options)
    want, want_after = scan_exactly(given, **options)
    assert after is room
    assert y.dtype == given["x"].dtype
    assert_close(array(y), want, what="y", tolerance=FORWARD[dtype])
    assert_close(array(after), want_after, what="state")
    bare = {name: given[name] for name in ("x", "dt", "A", "B", "C")}
    bare["dt"] = bare["dt"].abs()
    y, after = kernels.ssd_step(**bare)
    want, want_after = scan_exactly(bare)
    assert_close(array(y), want, what="bare y", tolerance=FORWARD[dtype])
    assert_close(array(after), want_after, what="bare state")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated_norm_of_many_positions(dtype, norm_first):
    kind = getattr(torch, dtype)
    y, z, weight = normal(2, 3, 30, dtype=kind), normal(2, 3, 70, dtype=kind)[..., :30], normal(30, dtype=kind)
    got = gated_norm.normed(y, z, weight, 2, 0.1, norm_first=norm_first)
    want = gated_rms_norm(numpy, *map(array, (y, z, weight)), 2, 0.1, norm_first=norm_first)
    assert got.dtype == kind
    assert_close(array(got), want, tolerance=FORWARD[dtype])


def test_what_does_not_fit_is_refused():
    given = scan_arguments((1, 4, 5, 2, 7))
    with pytest.raises(ValueError, match=r"ssd: C is \(1, 1, 2, 6\); expected \(1, 1, 2, 7\)"):
        kernels.ssd_step(**{**given, "C": given["C"][..., :6]})
    two = {name: torch.cat([given[name]] * 2, 1) for name in ("x", "dt", "B", "C")}
    with pytest.raises(ValueError, match=r"one position, found x of \(1, 2, 4, 5\)"):
        kernels.ssd_step(**{**given, **two})
    y, weight = normal(2, 3, 30), normal(30)
    with pytest.raises(ValueError, match=r"z is \(2, 3, 29\) and weight \(30,\); expected \(2, 3, 30\)"):
        gated_norm.normed(y, y[..., 1:], weight, 2, 0.1)
    with pytest.raises(ValueError, match="30 channels do not divide into 4 equal groups"):
        gated_norm.normed(y, y, weight, 4, 0.1)
    with pytest.raises(ValueError, match="z is on meta and y on"):
        gated_norm.normed(y, y.to("meta"), weight, 2, 0.1)


@pytest.mark.skipif(DEVICE == "cuda", reason="as if there were a GPU")
def test_the_seam_takes_them_on_a_gpu(monkeypatch):
    """Where no gradient is wanted, and nothing is masked or begun."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    for module in (kernels, gated_norm):
        monkeypatch.setattr(module, "on_device_of", lambda x: contextlib.nullcontext())
    taken, step, norm = [], kernels.ssd_step, gated_norm.normed
    monkeypatch.setattr(kernels, "ssd_step", lambda *a, **k: taken.append("scan") or step(*a, **k))
    recorded = gated_norm.gated_norm
    monkeypatch.setattr(gated_norm, "gated_norm", lambda *a: taken.append("with a gradient") or recorded(*a))
    monkeypatch.setattr(gated_norm, "normed", lambda *a, **k: taken.append("norm") or norm(*a, **k))
    given, exists = scan_arguments((2, 4, 5, 2, 7)), torch.ones(2, 1, dtype=torch.bool)
    given, initial = {k: v for k, v in given.items() if k != "initial_state"}, given["initial_state"]
    for options in ({}, {"mask": None, "boundaries": None, "initial_state": initial}):
        y, after = nn.ssd(**given, **options)
        want, want_after = scan_exactly({**given, **{k: v for k, v in options.items() if v is not None}})
        assert_close(array(y), want)
        assert_close(array(after), want_after)
    assert taken == ["scan", "scan"]
    for options in ({"mask": exists}, {"boundaries": exists}, {"impl": "sequential"}):
        nn.ssd(**given, **options)
    nn.ssd(**{**given, "D": given["D"].clone().requires_grad_()})
    assert taken == ["scan", "scan"]
    y, weight = normal(2, 3, 30), normal(30)
    want = gated_rms_norm(numpy, *map(array, (y, y, weight)), 2, 0.1)
    assert_close(array(nn.gated_rms_norm(y, y, weight, 2, 0.1)), want)
    assert taken == ["scan", "scan", "norm"]
    nn.gated_rms_norm(y, y, weight.clone().requires_grad_(), 2, 0.1)
    nn.gated_rms_norm(y.double(), y.double(), weight.double(), 2, 0.1)
    assert taken == ["scan", "scan", "norm", "with a gradient", "norm"]
