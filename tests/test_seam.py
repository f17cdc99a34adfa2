"""Every backend has the whole seam, and every op of it does what NumPy does."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import reference
from harness import BACKENDS, TORCH_COMPILES, assert_states_close, build, config_of
from tolerances import assert_close

import mambax
from mambax import backend, scan
from mambax.init import Initializer, Placeholder
from mambax.sampling import SamplingParams, sample

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 3)).astype(np.float32) * 3
EXTREME = np.array([-1e4, -200, -90, -30, -17.5, -1, -0.0, 0, 1e-8, 1, 19.9, 20.1, 60, 90, 1e4], np.float32)


def test_every_member_of_the_protocol_exists(nn):
    members = {name for page in (backend.Ops, backend.Backend) for name in vars(page) if not name.startswith("_")}
    assert len(members) >= 40
    assert [name for name in sorted(members) if not hasattr(nn, name)] == []
    assert nn.name in BACKENDS
    assert nn.version()[0].isdigit()


UNARY = {
    "exp": (X, np.exp(np.float64(X))),
    "log": (np.abs(X) + 0.1, np.log(np.float64(np.abs(X) + np.float32(0.1)))),
    "softplus": (X, reference.softplus(np.float64(X))),
    "silu": (X, reference.silu(np.float64(X))),
}


@pytest.mark.parametrize("op", UNARY)
def test_elementwise_ops(nn, op):
    x, want = UNARY[op]
    got = getattr(nn, op)(nn.from_numpy(x))
    assert got.dtype == nn.float32
    assert_close(nn.to_numpy(got), want, what=op)


def test_softplus_and_silu_at_the_extremes_element_by_element(nn):
    x = np.float64(EXTREME)
    for op, function in (("softplus", reference.softplus), ("silu", reference.silu)):
        got, want = nn.to_numpy(getattr(nn, op)(nn.from_numpy(EXTREME))), function(x)
        tiny = 1e-37  # below it float32 runs out of digits, and a framework may flush to zero
        assert (np.abs(got - want) <= 1e-5 * np.abs(want) + tiny).all(), op


def test_time_steps_are_those_of_the_projection(nn):
    weight, bias = RNG.standard_normal((4, 3)).astype(np.float32), np.linspace(-5, 5, 4, dtype=np.float32)
    for held in (bias, None):
        delta, added = nn.time_steps(nn.Linear(weight, held), nn.from_numpy(X))
        got = nn.to_numpy(delta) + (0 if added is None else nn.to_numpy(added))
        assert_close(got, np.float64(X) @ weight.T + (0 if held is None else held))


AXES = pytest.mark.parametrize("axis", [0, 1, 2, -1])


@AXES
def test_reductions_and_orderings(nn, axis):
    x = nn.from_numpy(X)
    for op, want in (
        ("sum", X.sum(axis)),
        ("max", X.max(axis)),
        ("sort", np.sort(X, axis)),
        ("cumulative_sum", np.cumsum(np.float64(X), axis)),
        ("cumulative_logsumexp", np.logaddexp.accumulate(np.float64(X), axis)),
    ):
        got = getattr(nn, op)(x, axis=axis)
        assert got.dtype == nn.float32, op
        assert_close(nn.to_numpy(got), want, what=op)
    for op, want in (("argmax", X.argmax(axis)), ("argsort", X.argsort(axis))):
        np.testing.assert_array_equal(nn.to_numpy(getattr(nn, op)(x, axis=axis)), want)
    assert nn.argmax(x, axis=axis).dtype == nn.int64


def test_cumulative_logsumexp_far_from_zero(nn):
    x = np.array([[-800.0, 700.0, -800.0, 705.0, 90.0]], np.float32)
    got = nn.to_numpy(nn.cumulative_logsumexp(nn.from_numpy(x), axis=1))
    assert_close(got, np.logaddexp.accumulate(np.float64(x), 1))


def test_argmax_takes_the_first_of_equals_and_max_shows_nan(nn):
    x = np.array([[1, 3, 3, 0], [5, 5, 5, 5], [0, 0, 0, 2]], np.float32)
    assert nn.to_numpy(nn.argmax(nn.from_numpy(x), axis=1)).tolist() == [1, 0, 3]
    for place in range(4):
        y = x.copy()
        y[1, place] = np.nan
        assert np.isnan(nn.to_numpy(nn.max(nn.from_numpy(y), axis=1))).tolist() == [False, True, False]


def test_integer_and_bool_arrays(nn):
    mask = X > 0
    steps = nn.arange(5, like=nn.from_numpy(X))
    assert steps.dtype == nn.int64
    assert nn.to_numpy(steps).tolist() == [0, 1, 2, 3, 4]
    m = nn.from_numpy(mask)
    assert m.dtype == nn.bool_
    np.testing.assert_array_equal(nn.to_numpy(nn.astype(m, nn.int64)), mask.astype(np.int64))
    count = nn.cumulative_sum(nn.astype(m, nn.int64), axis=1)
    assert count.dtype == nn.int64
    np.testing.assert_array_equal(nn.to_numpy(count), mask.cumsum(1))
    total = nn.sum(nn.astype(m, nn.int64), axis=1)
    assert total.dtype == nn.int64
    np.testing.assert_array_equal(nn.to_numpy(total), mask.sum(1))
    np.testing.assert_array_equal(nn.to_numpy((m & ~m) | m), mask)


def test_joining_splitting_and_choosing(nn):
    x, y = nn.from_numpy(X), nn.from_numpy(-X)
    np.testing.assert_array_equal(nn.to_numpy(nn.concat([x, y], axis=1)), np.concatenate([X, -X], 1))
    np.testing.assert_array_equal(nn.to_numpy(nn.stack([x, y], axis=1)), np.stack([X, -X], 1))
    parts = nn.unstack(x, axis=1)
    assert len(parts) == 5
    np.testing.assert_array_equal(nn.to_numpy(parts[3]), X[:, 3])
    assert tuple(nn.unstack(x[:, :1], axis=1)[0].shape) == (2, 3)
    chosen = nn.where(x > 0, x, 0.0)
    assert chosen.dtype == nn.float32
    np.testing.assert_array_equal(nn.to_numpy(chosen), np.where(X > 0, X, 0))
    np.testing.assert_array_equal(nn.to_numpy(nn.where(x > 0, x, y)), np.abs(X))
    np.testing.assert_array_equal(nn.to_numpy(nn.maximum(x, 0.5)), np.maximum(X, 0.5))
    indices = np.argsort(X, 1)
    got = nn.take_along_axis(x, nn.from_numpy(indices), axis=1)
    np.testing.assert_array_equal(nn.to_numpy(got), np.sort(X, 1))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64", "int64", "bool"])
def test_the_host_edge_round_trips_every_dtype(nn, name):
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
    array = (X * 100).astype(dtype)
    if name == "float64" and nn.name == "mlx":
        with pytest.raises(ValueError, match=r"float64.*float32"):
            nn.from_numpy(array)
        with pytest.raises(ValueError, match=r"float64.*numpy"):
            nn.dtype("float64")
        return
    for view in (array, array[:, ::2], array.transpose(2, 0, 1), array[:0], array[0, 0, 0:1]):
        back = nn.to_numpy(nn.from_numpy(view))
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, view)
    array.flags.writeable = False
    np.testing.assert_array_equal(nn.to_numpy(nn.from_numpy(array)), array)
    if name != "bool":
        like = nn.from_numpy(array)
        assert like.dtype == nn.dtype(name)
        zeros = nn.zeros((2, 0, 3), nn.dtype(name), like=like)
        assert zeros.dtype == nn.dtype(name)
        assert tuple(zeros.shape) == (2, 0, 3)


def test_devices_and_the_rest_of_the_host_edge(nn):
    array = nn.from_numpy(X, device=nn.devices()[0])
    assert (nn.to_numpy(array) == X).all()
    with pytest.raises((ValueError, RuntimeError), match="abacus"):
        nn.from_numpy(X, device="abacus")
    nn.evaluate()
    nn.evaluate(array, wait=False)
    nn.evaluate(array, wait=True)


def test_no_grad_records_nothing():
    torch = mambax.get_backend("torch")
    model = torch.MambaForCausalLM(config_of())
    with torch.no_grad():
        assert not model([[1, 2]]).logits.requires_grad
    assert model([[1, 2]]).logits.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_linear_keeps_a_wide_bias_wide(nn, dtype):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    bias = rng.standard_normal(4).astype(np.float32) * 1.001
    x = rng.standard_normal((2, 3)).astype(np.float32)
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    layer = nn.Linear(weight, bias)
    assert {k: tuple(v.shape) for k, v in nn.parameters(layer).items()} == {"weight": (4, 3), "bias": (4,)}
    nn.set_parameters(layer, {"weight": nn.from_numpy(weight.astype(narrow))})
    with nn.no_grad():
        got = layer(nn.from_numpy(x.astype(narrow)))
    assert got.dtype == nn.float32
    want = np.float64(x.astype(narrow)) @ np.float64(weight.astype(narrow)).T + bias
    assert_close(nn.to_numpy(got), want, dtype)
    plain = nn.Linear(weight, None)
    assert list(nn.parameters(plain)) == ["weight"]
    with nn.no_grad():
        assert_close(nn.to_numpy(plain(nn.from_numpy(x))), np.float64(x) @ np.float64(weight).T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_takes_its_statistics_in_float32(nn, dtype):
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal(5).astype(np.float32), rng.standard_normal((2, 7, 5)).astype(np.float32)
    x[0, 0], x[0, 1] = 300.0, 1e-4  # the square of 300 is beyond float16 and coarse in bfloat16
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    layer = nn.RMSNorm(weight, 1e-5)
    nn.set_parameters(layer, {"weight": nn.from_numpy(weight.astype(narrow))})
    with nn.no_grad():
        got = layer(nn.from_numpy(x))
    assert got.dtype == nn.dtype(dtype)
    for position in np.ndindex(2, 7):  # one by one: a large row must not hide a small one
        want = reference.rms_norm(np.float64(x[position]), np.float64(weight.astype(narrow)), 1e-5)
        assert_close(np.float64(nn.to_numpy(got))[position], want, dtype)


def test_embedding(nn):
    table = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    layer = nn.Embedding(table)
    ids = np.array([[0, 5], [2, 2]])
    with nn.no_grad():
        np.testing.assert_array_equal(nn.to_numpy(layer(nn.from_numpy(ids))), table[ids])
        assert_close(nn.to_numpy(layer.as_linear(nn.from_numpy(table))), np.float64(table) @ np.float64(table).T)


def test_parameters_can_be_replaced_by_path_and_wrong_paths_are_refused(nn):
    model = nn.MambaForCausalLM(config_of(n_layer=2))
    new = np.full((40,), 7, np.float32)
    nn.set_parameters(model, {"backbone.layers.1.norm.weight": nn.from_numpy(new)})
    assert (nn.to_numpy(nn.parameters(model)["backbone.layers.1.norm.weight"]) == 7).all()
    assert (nn.to_numpy(nn.parameters(model)["backbone.layers.0.norm.weight"]) == 1).all()
    for path in ("nowhere.weight", "backbone.layers.1.norm.bias", "backbone.layers.9.norm.weight"):
        with pytest.raises((KeyError, IndexError)):
            nn.set_parameters(model, {path: nn.from_numpy(new)})


def test_a_placeholder_takes_no_memory_and_computes_nothing_finite(nn):
    config = config_of(d_model=2**14, d_state=4096, n_layer=1, dt_rank=1)  # A_log alone would be 512 MB
    model = nn.MambaForCausalLM(config, init=Initializer(None))
    shapes = {name: tuple(array.shape) for name, array in nn.parameters(model).items()}
    assert shapes["backbone.layers.0.mixer.A_log"] == (2**15, 4096)
    assert Placeholder((3,)).shape == (3,)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(1.3, 0.9, 20)], ids=["greedy", "sampled"])
def test_a_stepper_does_what_the_model_and_sampling_do(nn, params):
    model, uniforms = build(nn, config_of(n_layer=1)), RNG.random((5, 2, 1), dtype=np.float32)
    if "cuda" in nn.devices():
        model.to("cuda")
    state = model.init_state(2)
    tokens = nn.from_numpy(np.array([3, 5]), like=state.tokens_seen)
    seen = nn.from_numpy(np.eye(101, dtype=bool)[[3, 5]], like=tokens) if params.repetition_penalty != 1 else None
    steps = nn.stepper(model, params, state, 100)
    if steps is None:  # each step is computed as it comes
        return
    ours, held = steps.begin(state, tokens, seen)
    for uniform in uniforms:
        with nn.no_grad():
            output = model(tokens[:, None], state, logits_to_keep=1)
            state = output.state
            tokens = sample(nn, output.logits[:, -1], nn.from_numpy(uniform, like=tokens), params, seen)
            if seen is not None:
                seen = seen | (nn.arange(101, like=tokens) == tokens[:, None])
        ours, held = steps.advance(uniform)
        np.testing.assert_array_equal(steps.read(ours), nn.to_numpy(tokens))
    np.testing.assert_array_equal(nn.to_numpy(steps.end(ours)), nn.to_numpy(tokens))
    assert_states_close(held, state)


@TORCH_COMPILES
def test_compile_computes_the_same(nn):
    function = nn.compile(lambda x: nn.softplus(x) * 2)
    assert_close(nn.to_numpy(function(nn.from_numpy(X))), 2 * reference.softplus(np.float64(X)))


def test_scan_implementations_are_named_and_chosen_by_name(nn):
    assert {"sequential", "chunked"} <= nn.ssd_implementations().keys()
    available = nn.scan_implementations()
    assert {"sequential", "pscan", "logcumsumexp"} <= available.keys()
    one = nn.from_numpy(np.ones((1, 1, 1), np.float32))
    minus = nn.from_numpy(-np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match=r"'warp'.*sequential"):
        nn.selective_scan(one, one, minus, one, one, impl="warp")
    for name, reason in available.items():
        if reason:
            with pytest.raises((ValueError, ImportError), match=name):
                nn.selective_scan(one, one, minus, one, one, impl=name)


def test_a_named_implementation_that_cannot_run_says_why():
    with pytest.raises(ValueError, match="'metal' cannot run here: no Apple GPU"):
        scan.choose("metal", "pscan", {"pscan": "", "metal": "no Apple GPU"})
    assert scan.choose("auto", "pscan", {"pscan": ""}) == "pscan"
