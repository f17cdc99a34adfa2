"""MLX on the CPU: which path is taken where, that the paths agree, and that memory stays bounded.

Dimensions: B batch, L length, D channels, N d_state, K d_conv.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import reference
from harness import build, config_of, run, token_ids
from test_scan import arguments
from tolerances import GRADIENT, assert_close

import mambax
from mambax import convolution, get_backend, scan
from mambax.scan import CHUNK

mx = pytest.importorskip("mlx.core")
import mlx.nn  # noqa: E402
from mambax_mlx import chunked, cpu_convolution, fused, host, ops, products, step  # noqa: E402
from mlx.utils import tree_map  # noqa: E402

nn = get_backend("mlx")
pytestmark = pytest.mark.skipif(host.default_device() != "cpu", reason="MLX's default device is not the CPU")


def normal(*shape: int, seed: int = 0) -> Any:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def scan_arguments(length: int, **options: Any) -> dict[str, Any]:
    return {name: mx.array(value) for name, value in (arguments(length) | options).items()}


# --- which path ------------------------------------------------------------------------------------------------


def test_values_can_be_had_everywhere_but_inside_compile_and_vmap():
    seen = []

    def look(x: Any) -> Any:
        seen.append(host.computable(x * 2))
        return x.sum()

    look(normal(3))
    mx.grad(look)(normal(3))
    mx.compile(look)(normal(3))
    mx.vmap(look)(normal(2, 3))
    assert seen == [True, True, False, False]


@pytest.mark.parametrize(("length", "inside"), [(1, "sequential"), (9, "chunked")])
def test_the_automatic_scan(length, inside, monkeypatch):
    used = []
    algorithm, chunks = scan.selective_scan, chunked.selective_scan
    fused_scan = __import__("mambax_mlx.cpu_ops").cpu_ops

    def counted(name: str, function: Any) -> Any:
        return lambda *args, **options: (used.append(options.get("algorithm", name)), function(*args, **options))[1]

    monkeypatch.setattr(fused.scan, "selective_scan", counted("", algorithm))
    monkeypatch.setattr(fused.chunked, "selective_scan", counted("chunked", chunks))
    monkeypatch.setattr(fused_scan, "selective_scan", counted("cpu", fused_scan.selective_scan))
    values = scan_arguments(length)
    want = reference.scan(**arguments(length), delta_softplus=True)
    for run_it in (lambda f: f, mx.compile):
        got = run_it(lambda v: nn.selective_scan(**v, delta_softplus=True))(values)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)
    assert used == ["cpu", inside]


def test_describe_names_the_path():
    found = nn.describe()
    assert "(CPU)" in found["device"]
    assert found["selective_scan"].startswith("kernels of mambax_cpu (inside mx.compile")


# --- products, convolution, exponentials -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products(dtype, rows):
    x, weight = (normal(*shape).astype(nn.dtype(dtype)) for shape in ((2, rows, 24), (17, 24)))
    want = np.float64(np.array(x.astype(mx.float32))) @ np.float64(np.array(weight.astype(mx.float32))).T
    for path in (products.product, mx.compile(products.product)):
        got = path(x, weight)
        assert got.dtype == x.dtype
        assert_close(got.astype(mx.float32), want, dtype)
    assert products.product(x.astype(mx.float32), weight).dtype == mx.float32


def test_gradients_of_products_of_every_order():
    x, weight, probe = normal(3, 5, 8), normal(6, 8, seed=1), normal(3, 5, 6, seed=2)

    def plain(x: Any, weight: Any) -> Any:
        return x @ weight.T

    def first(product: Any) -> Any:
        return mx.grad(lambda x, w: (product(x, w) ** 2 * probe).sum(), argnums=(0, 1))(x, weight)

    def second(product: Any) -> Any:
        inner = lambda x: (mx.grad(lambda w: (product(x, w) ** 3).sum())(weight) ** 2).sum()  # noqa: E731
        return (mx.grad(inner)(x),)

    def forward(product: Any) -> Any:
        return mx.jvp(product, (x, weight), (x * 2, weight + 1))[1]

    for derivative in (first, second, forward):
        for got, want in zip(derivative(products.product), derivative(plain), strict=True):
            assert_close(got, want, tolerance=1e-5)
    assert_close(mx.vmap(lambda x: products.product(x, weight))(x), plain(x, weight))


def test_exponentials():
    x = mx.array([-200.0, -1.5, 0.0, 3.0, 200.0])
    np.testing.assert_array_equal(np.array(host.exp(x))[[0, 2, 4]], [0, 1, np.inf])
    small = x[1:4]
    for derivative in (
        lambda f: mx.grad(lambda x: (f(x) * x).sum())(small),
        lambda f: mx.grad(lambda x: (mx.grad(lambda x: f(x).sum())(x) ** 2).sum())(small),
        lambda f: mx.jvp(f, (small,), (small,))[1][0],
    ):
        assert_close(derivative(host.exp), derivative(mx.exp), tolerance=1e-6)


FLAGS = {
    "none": {},
    "mask": {"mask": mx.array([[0, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1]]).astype(mx.bool_)},
    "boundaries": {"boundaries": mx.array([[0, 1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0]]).astype(mx.bool_)},
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_the_convolution_and_its_gradients(flags, length):
    x, weight, bias, state = normal(2, length, 8), normal(8, 1, 4), normal(8), normal(2, 3, 8)
    options = {name: flag[:, :length] for name, flag in FLAGS[flags].items()}
    real = options.get("mask", mx.ones((2, length), mx.bool_))[..., None]

    def loss(function: Any) -> Any:
        def of(x: Any, weight: Any, bias: Any, state: Any) -> Any:
            y, after = function(x, weight, bias, initial_state=state, **options)
            return (mx.where(real, y, 0.0) ** 2).sum() + (after**3).sum()

        return mx.value_and_grad(of, argnums=(0, 1, 2, 3))(x, weight, bias, state)

    value, gradients = loss(cpu_convolution.causal_conv1d)
    want, expected = loss(lambda *args, **named: convolution.causal_conv1d(ops, *args, **named))
    assert_close(value, want)
    for got, known in zip(gradients, expected, strict=True):
        assert_close(got, known, tolerance=GRADIENT["float32"])


# --- the chunked scan ------------------------------------------------------------------------------------------


def chunked_loss(values: dict[str, Any], **options: Any) -> Any:
    y, h = chunked.selective_scan(**values, delta_softplus=True, **options)
    return (y * normal(*y.shape, seed=3)).sum() + (h * normal(*h.shape, seed=4)).sum()


def sequential_loss(values: dict[str, Any], **options: Any) -> Any:
    y, h = scan.selective_scan(ops, **values, delta_softplus=True, **options)
    return (y * normal(*y.shape, seed=3)).sum() + (h * normal(*h.shape, seed=4)).sum()


@pytest.mark.parametrize("length", [5, 16, 40, CHUNK + 44])
@pytest.mark.parametrize("flag", ["", "mask", "boundaries"])
def test_gradients_of_chunks_also_compiled(length, flag):
    values = scan_arguments(length)
    known = np.random.default_rng(length).random((2, length)) < 0.1
    options = {flag: mx.array(known if flag == "boundaries" else ~known)} if flag else {}
    want = mx.grad(lambda v: sequential_loss(v, **options))(values)
    gradient = mx.grad(lambda v: chunked_loss(v, **options))
    for got in (gradient(values), mx.compile(gradient)(values)):
        for name, expected in want.items():
            assert_close(got[name], expected, tolerance=GRADIENT["float32"], what=name)


def test_chunks_are_differentiable_twice_and_in_vmap():
    values = scan_arguments(20)
    second = [
        mx.grad(lambda v: (mx.grad(loss)(v)["u"] ** 2).sum())(values)["delta"]  # noqa: B023
        for loss in (chunked_loss, sequential_loss)
    ]
    assert_close(second[0], second[1], tolerance=GRADIENT["float32"])
    rest = {name: values[name] for name in ("delta", "A", "B", "C")}
    both = mx.vmap(lambda u: chunked.selective_scan(u, **rest, delta_softplus=True)[0])(
        mx.stack([values["u"], values["u"] * 2])
    )
    assert_close(both[1], chunked.selective_scan(values["u"] * 2, **rest, delta_softplus=True)[0])


def nodes(array: Any, path: Any) -> int:
    """The operations of the graph behind an array."""
    mx.export_to_dot(str(path), array)
    return path.read_text(encoding="utf-8").count("[label")


def test_the_graph_grows_with_chunks_and_not_with_tokens(tmp_path):
    def size(length: int) -> int:
        values = scan_arguments(length)
        mx.eval(values)
        return nodes(chunked.selective_scan(**values)[0], tmp_path / "graph.dot")

    one, two, three = size(CHUNK), size(2 * CHUNK), size(3 * CHUNK)
    assert abs(size(CHUNK - 16) - one) <= 0.1 * one
    assert three - two == pytest.approx(two - one, rel=0.05)


def peak(function: Any) -> int:
    """The most memory that MLX held more than before, in bytes."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(function())
    return mx.get_peak_memory() - before


def test_training_through_chunks_takes_the_memory_of_the_activations():
    length, channels, states = 8 * CHUNK, 64, 16
    values = {
        "u": normal(1, length, channels), "delta": normal(1, length, channels), "A": -mx.ones((channels, states)),
        "B": normal(1, length, states), "C": normal(1, length, states),
    }  # fmt: skip
    mx.eval(values)
    rows = values["u"].nbytes
    found = peak(lambda: mx.grad(chunked_loss)(values))
    stored = peak(lambda: mx.grad(lambda v: sequential_by_pairs(v))(values))
    assert found < 40 * rows  # every state would be 16 times the rows, and there are several such arrays
    assert stored > 4 * found


def sequential_by_pairs(values: dict[str, Any]) -> Any:
    y, h = scan.selective_scan(ops, **values, delta_softplus=True, algorithm="pscan")
    return (y * normal(*y.shape, seed=3)).sum() + (h * normal(*h.shape, seed=4)).sum()


@pytest.mark.parametrize("impl", ["auto", "chunked"])
def test_a_long_prompt_takes_no_more_memory_than_a_short_one(impl):
    model = build(nn, config_of(n_layer=1, scan=impl))

    def read(length: int) -> int:
        prompt = token_ids(1, length)[0]
        return peak(lambda: model.generate(prompt, max_new_tokens=1, eos=()).state.arrays())

    read(100)
    assert read(20_000) < 1.2 * read(2_000)


def test_a_prompt_of_a_hundred_thousand_tokens():
    config = config_of(d_model=16, n_layer=2)
    model, numpy = build(nn, config), build(get_backend("numpy"), config)
    prompt = token_ids(1, 100_000)[0]
    spent = peak(lambda: model.generate(prompt, max_new_tokens=1, eos=()).state.arrays())
    assert spent < 16 * 2**20
    got, want = (m.generate(prompt, max_new_tokens=4, eos=()) for m in (model, numpy))
    assert got.tokens == want.tokens
    assert_close(got.state.layers[1].ssm, want.state.layers[1].ssm, tolerance=1e-4)


# --- one token, compiled ---------------------------------------------------------------------------------------


def one_token(model: Any, compiled: bool) -> tuple[Any, Any]:
    """Hidden states and layer states after a token that follows others."""
    state = model(token_ids(2, 7)).state
    hidden = model.backbone.embeddings(mx.array([[3], [5]]))
    if compiled:
        return step.compiled_step(model.backbone.layers, hidden, state.layers)
    after = []
    for layer, layer_state in zip(model.backbone.layers, state.layers, strict=True):
        hidden, layer_state = layer(hidden, layer_state)
        after.append(layer_state)
    return hidden, after


def test_the_compiled_step_is_the_step():
    model = build(nn, config_of(d_model=64, n_layer=1))
    for change in (lambda: None, lambda: None, lambda: nn.quantize(model, 4), lambda: scale_weights(model)):
        change()
        got, want = one_token(model, True), one_token(model, False)
        assert_close(got[0], want[0])
        for a, b in zip(got[1], want[1], strict=True):
            assert type(a) is type(b)
            assert_close(a.conv, b.conv)
            assert_close(a.ssm, b.ssm)


def scale_weights(model: Any) -> None:
    model.update({"backbone": {"layers": [{"norm": {"weight": mx.full((64,), 0.7)}}]}})


def test_the_compiled_step_keeps_no_model_alive_and_is_not_copied():
    model = build(nn, config_of(n_layer=1))
    one_token(model, True)
    other = copy.deepcopy(model)
    assert_close(one_token(other, True)[0], one_token(model, False)[0])
    held = weakref.ref(model.backbone.layers[0])
    del model
    gc.collect()
    assert held() is None


def test_the_whole_model_with_the_compiled_step(monkeypatch):
    model = build(nn, config_of(n_layer=1))
    want = model.generate([1, 2, 3], max_new_tokens=12, eos=())
    monkeypatch.setattr(step, "default_device", lambda: "gpu")
    got = model.generate([1, 2, 3], max_new_tokens=12, eos=())
    assert "_compiled_step" in vars(model.backbone.layers[0])
    assert got.tokens == want.tokens
    assert_close(run(model, [[4]], got.state)[0], run(model, [[4]], want.state)[0])


def test_weights_are_not_kept_in_a_cache_between_chunks():
    x = normal(300, 300) + 1
    mx.eval(x)
    del x
    assert mx.get_cache_memory() > 0
    nn.evaluate(normal(1))
    assert mx.get_cache_memory() < 2**16


def test_training_goes_down_on_the_kernels():
    """One descent on the eager path, whose gradients are those of the kernels."""
    model = mambax.from_config(config_of(n_layer=1), backend="mlx")
    ids = mx.array(token_ids(4, 20))

    def loss(model: Any) -> Any:
        logits = model(ids).logits
        return mlx.nn.losses.cross_entropy(logits[:, :-1], ids[:, 1:], reduction="mean")

    gradient = mlx.nn.value_and_grad(model, loss)
    before, gradients = gradient(model)
    model.update(tree_map(lambda p, g: p - 0.1 * g, model.trainable_parameters(), gradients))
    assert gradient(model)[0].item() < before.item()


# --- one token, by NumPy's blocks ------------------------------------------------------------------------------


def host_step(model: Any) -> Any:
    """Hidden states and layer states after a token that follows others; None where the blocks have to do it."""
    state = model(token_ids(2, 7)).state
    hidden = model.backbone.embeddings(mx.array([[3], [5]]))
    with nn.no_grad():
        return step.decode_step(model.backbone.layers, hidden, state.layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [None, 4, 8, "int4"])
def test_numpys_blocks_compute_the_token(kind, dtype):
    model = build(nn, config_of(d_model=64), dtype=dtype)
    if kind is not None:
        nn.quantize(model, kind)
    got, want = host_step(model), one_token(model, False)
    assert got[0].dtype == want[0].dtype
    assert_close(got[0].astype(mx.float32), want[0].astype(mx.float32), dtype)
    for a, b in zip(got[1], want[1], strict=True):
        assert a.conv.dtype == b.conv.dtype
        assert_close(a.conv.astype(mx.float32), b.conv.astype(mx.float32), dtype)
        assert_close(a.ssm, b.ssm, dtype)


def test_numpys_blocks_see_every_change_of_the_weights():
    """An array that is changed in place stays the same Python object."""
    model = build(nn, config_of(d_model=64))
    mixers = [layer.mixer for layer in model.backbone.layers]

    def in_place() -> None:
        mixers[1].in_proj.weight[3] = 7.0

    def added() -> None:
        mixers[0].D += 1

    for change in (lambda: None, in_place, added, lambda: scale_weights(model), lambda: nn.quantize(model, 8)):
        change()
        assert_close(host_step(model)[0], one_token(model, False)[0])


def test_where_numpys_blocks_do_not_step_in():
    plain = build(nn, config_of())
    state, hidden = plain.init_state(1).layers, plain.backbone.embeddings(mx.array([[3]]))
    assert step.decode_step(plain.backbone.layers, hidden, state) is None  # a gradient may be wanted
    seen = []

    def inside(hidden: Any) -> Any:
        with nn.no_grad():
            seen.append(step.decode_step(plain.backbone.layers, hidden, state))
        return hidden

    mx.compile(inside)(hidden)
    assert seen == [None]
    assert host_step(build(nn, config_of(scan="sequential"))) is None
    assert host_step(nn.quantize(build(nn, config_of(d_model=64)), 2)) is None
    plain.backbone.layers[1].mixer.out_proj = mlx.nn.Linear(80, 40)
    assert host_step(plain) is None
