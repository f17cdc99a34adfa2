"""MLX on the CPU: which path is taken where, and memory that does not grow with a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import reference
from harness import build, config_of, token_ids
from test_scan import arguments
from tolerances import assert_close

import mambax
from mambax import get_backend, scan

pytest.importorskip("mlx.core")

import mlx.core as mx
import mlx.nn
from mambax_mlx import chunked, fused, host
from mlx.utils import tree_map
from mlx_cases import normal, peak, scan_arguments

nn = get_backend("mlx")
pytestmark = pytest.mark.skipif(host.default_device() != "cpu", reason="MLX's default device is not the CPU")


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
    fused_scan = __import__("mambax_mlx.cpu_scan").cpu_scan

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


# --- whole models -----------------------------------------------------------------------------------------------


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
