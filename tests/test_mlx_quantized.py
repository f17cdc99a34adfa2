"""Quantised models on MLX, and folders that go to and fro between mambax and mlx-lm.

A quantised model must be the model of the weights that its bits stand for, and the folder that one package writes
must give equal logits in the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from harness import backend_params, build, config_of, rounded, run, token_ids, weights_of
from tolerances import FORWARD, assert_close

import mambax
from mambax import MambaLMConfig, get_backend, quantization
from mambax.affine import Affine, Packing
from mambax.cli.info import info

pytest.importorskip("mlx.core")

import mlx.core as mx
import mlx.nn

nn = get_backend("mlx")
TIED = pytest.mark.parametrize("tied", [True, False])
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
IDS = token_ids(2, 40)
BOTH_ROUND = {"float32": FORWARD["float32"], "bfloat16": 2 * FORWARD["bfloat16"]}
"""Between two packages, each of which may be as far as its dtype allows from the exact logits."""


def wide_config(tied: bool = True, **changes: Any) -> MambaLMConfig:
    """Widths that groups of 32 and 64 divide, but dt_proj, as in the public models."""
    return config_of(**({"d_model": 64, "n_layer": 2, "tie_embeddings": tied} | changes))


def mlx_lm_load(folder: Path) -> Any:
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    return utils.load_model(folder)[0]


def mlx_lm_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(ids)).astype(mx.float32))


def dequantized(model: Any) -> dict[str, np.ndarray]:
    """Every weight of a quantised model as the bits give it, float64."""
    held = nn.parameters(model)
    modules = dict(model.named_modules())
    values = {name: nn.to_numpy(array).astype(np.float64) for name, array in held.items()}
    for path in [name.removesuffix(".scales") for name in held if name.endswith(".scales")]:
        parts = [held[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
        parts[1:] = [part.astype(mx.float32) for part in parts[1:]]
        layer = modules[path]
        full = mx.dequantize(*parts, group_size=layer.group_size, bits=layer.bits)
        values[f"{path}.weight"] = np.array(full).astype(np.float64)
        del values[f"{path}.scales"], values[f"{path}.biases"]
    return values


@TIED
@BITS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_model_is_that_of_the_weights_its_bits_stand_for(tied, bits, dtype):
    config = wide_config(tied)
    model = nn.quantize(build(nn, config, dtype=dtype), bits, 32)
    exact = dequantized(model)
    for length in (1, 5, 40):
        got = run(model, IDS[:, :length])[0]
        assert_close(got, reference.logits(exact, IDS[:, :length]), tolerance=1e-3 if dtype == "float32" else 0.03)
        if dtype == "float32":
            assert_close(got, reference.logits(exact, IDS[:, :length]))
    kept = {path for path, array in nn.parameters(model).items() if array.dtype != mx.uint32}
    assert {"backbone.layers.0.mixer.dt_proj.weight", "backbone.layers.1.mixer.conv1d.weight"} <= kept


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_layers_that_the_group_does_not_divide_stay(group_size):
    model = nn.quantize(build(nn, wide_config()), 4, group_size)
    packed = {n.removesuffix(".scales").rpartition(".")[2] for n in nn.parameters(model) if n.endswith(".scales")}
    wide = {"x_proj", "out_proj"}  # 128 inputs; the others have 64
    assert packed == (wide if group_size == 128 else wide | {"in_proj", "embeddings"})
    assert {m.bits for p, m in model.named_modules() if p.endswith("x_proj")} == {8}
    with pytest.raises(ValueError, match="no layer has a width that is a multiple of the group, 128"):
        nn.quantize(build(nn, wide_config(d_model=33)), 4, 128)


def test_bad_input_leaves_the_model_as_it_was():
    model, want = build(nn, wide_config()), run(build(nn, wide_config()), IDS)[0]
    for kind, group_size, words in (
        (5, 32, "bits is 5; expected one of 2, 3, 4, 6, 8"),
        (True, 32, "bits is True"),
        (4, 48, "group_size is 48; expected one of 32, 64, 128"),
        ("int3", 32, "quantize is 'int3'; expected one of 'int8', 'int4'"),
        ("int4", 128, "group_size is 128; expected one of 32, 64"),
    ):
        with pytest.raises(ValueError, match=words):
            nn.quantize(model, kind, group_size)
    np.testing.assert_array_equal(run(model, IDS)[0], want)
    with pytest.raises(ValueError, match=r"lm_head has 40 inputs, which is no multiple of the group, 32"):
        nn.quantize(build(nn, config_of()), "int4", 32)
    broken = build(nn, wide_config())
    broken.backbone.layers[1].mixer.out_proj.weight = mx.full((64, 128), float("nan"))
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.out_proj has weights that are NaN"):
        nn.quantize(broken, 4)
    nn.quantize(model, 4)
    with pytest.raises(ValueError, match="quantised already"):
        nn.quantize(model, 4)


@TIED
@pytest.mark.parametrize(("kind", "group_size"), [("int8", 32), ("int4", 32), ("int4", 64)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_of_the_other_backends_are_the_same_ones(tied, kind, group_size, dtype, tmp_path):
    """Chosen here or read from a checkpoint that NumPy wrote: the same weights to the last bit."""
    config = wide_config(tied)
    numpy = get_backend("numpy")
    model = numpy.quantize(build(numpy, config, dtype=dtype), kind, group_size)
    want, expected = run(model, IDS)[0], {}
    for path, layer in rounded(weights_of(config), dtype).items():
        name = path.split(".")[-2] if path.endswith(".weight") else ""
        if name in quantization.LAYERS or (tied and name == "embeddings"):
            chosen = quantization.quantize(layer, quantization.kind_of(name, kind), group_size)
            expected[path] = quantization.dequantize(chosen)
    model.save_pretrained(tmp_path)
    for ours in (
        mambax.load(tmp_path, backend="mlx"),
        nn.quantize(build(nn, config, dtype=dtype), kind, group_size),
    ):
        found = dequantized(ours)
        for path, weight in expected.items():
            # the whole numbers and scales are the same; MLX adds the bias in float32
            assert_close(found[path], weight, tolerance=1e-7 if kind == "int8" or "x_proj" in path else 1e-12)
        assert_close(run(ours, IDS)[0], want, dtype)
    ours.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(run(mambax.load(tmp_path / "again", backend="mlx"), IDS)[0], run(ours, IDS)[0])


@TIED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [None, 2, 4, 8])
def test_mlx_lm_reads_what_mambax_saves(tied, dtype, bits, tmp_path):
    config = wide_config(tied)
    mambax.save_pretrained(build(nn, config, dtype=dtype), tmp_path / "full")
    model = mambax.load(tmp_path / "full", backend="mlx", quantize=bits, group_size=32 if bits else 64)
    model.save_pretrained(tmp_path / "saved")
    raw = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    if bits:
        own = {"bits": 8, "group_size": 32}
        layers = {} if bits == 8 else {f"backbone.layers.{i}.mixer.x_proj": own for i in range(2)}
        assert raw["quantization"] == {"bits": bits, "group_size": 32, **layers}
    want = mlx_lm_logits(mlx_lm_load(tmp_path / "saved"), IDS)
    again = mambax.load(tmp_path / "saved", backend="mlx")
    np.testing.assert_array_equal(run(again, IDS)[0], run(model, IDS)[0])
    assert_close(run(again, IDS)[0], want, tolerance=BOTH_ROUND[dtype])


@TIED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("rank", [5, 32])
def test_mambax_reads_what_mlx_lm_saves(tied, dtype, bits, rank, tmp_path):
    """With dt_proj quantised as well, where its rank lets mlx-lm do it, and the convolution as (D, K, 1)."""
    mambax.save_pretrained(build(nn, wide_config(tied, dt_rank=rank), dtype=dtype), tmp_path / "full")
    model, utils = mlx_lm_load(tmp_path / "full"), pytest.importorskip("mlx_lm.utils")
    config = json.loads((tmp_path / "full" / "config.json").read_text(encoding="utf-8"))
    if bits:
        model, config = utils.quantize_model(model, config, 32, bits)
        assert isinstance(model.layers[0].mixer.dt_proj, mlx.nn.QuantizedLinear) == (rank == 32)
    utils.save_model(tmp_path / "theirs", model)
    utils.save_config(config, tmp_path / "theirs" / "config.json")
    want = mlx_lm_logits(model, IDS)
    ours = mambax.load(tmp_path / "theirs", backend="mlx")
    assert_close(run(ours, IDS)[0], want, tolerance=BOTH_ROUND[dtype])
    ours.save_pretrained(tmp_path / "back")
    assert_close(mlx_lm_logits(mlx_lm_load(tmp_path / "back"), IDS), want, tolerance=BOTH_ROUND[dtype])
    info(str(tmp_path / "theirs"), None, True)
    for backend in backend_params(("numpy", "torch")):
        if not isinstance(backend, str):
            continue
        if bits:
            with pytest.raises(ValueError, match=f"as MLX packs them, {bits} bits in groups of 32, which the mlx"):
                mambax.load(tmp_path / "theirs", backend=backend, device="cpu")
        else:
            logits = run(mambax.load(tmp_path / "theirs", backend=backend, device="cpu"), IDS)[0]
            assert_close(logits, want, tolerance=BOTH_ROUND[dtype])


def test_a_table_that_is_not_the_head_may_be_quantized_too(tmp_path):
    model = build(nn, wide_config(False))
    mlx.nn.quantize(model, group_size=32, bits=4)
    model.save_pretrained(tmp_path)
    again = mambax.load(tmp_path, backend="mlx")
    np.testing.assert_array_equal(run(again, IDS)[0], run(model, IDS)[0])
    assert np.isnan(run(again, mx.array([[1, 101]]))[0][0, 1]).all()
    with pytest.raises(ValueError, match="the checkpoint is quantised already: 4 bits in groups of 32"):
        mambax.load(tmp_path, backend="mlx", quantize=4)


def test_bad_packed_checkpoints(tmp_path):
    nn.quantize(build(nn, wide_config()), 4, 32).save_pretrained(tmp_path)
    place = tmp_path / "config.json"
    raw = json.loads(place.read_text(encoding="utf-8"))
    plain = {"bits": 4, "group_size": 32}
    for change, words in (
        ({"bits": 5, "group_size": 32}, "quantization: bits is 5"),
        ({"bits": 4, "group_size": 16}, "group_size is 16"),
        (plain | {"mode": "mxfp4"}, "mode is 'mxfp4'; only 'affine' is supported"),
        ([4, 32], r"quantization is \[4, 32\]; expected an object"),
        (plain, "x_proj.weight: expected .*found"),
        (plain | {"backbone.embeddings": {"bits": 4}}, "quantization of backbone.embeddings: group_size is None"),
        ({"bits": 4, "group_size": 128}, r"expected a matrix whose width is a multiple of the group, 128"),
        (None, "of another shape"),
    ):
        place.write_text(json.dumps(raw | {"quantization": change}), encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            mambax.load(tmp_path, backend="mlx")
    differ = {"quantization_config": {"bits": 8, "group_size": 32}}
    place.write_text(json.dumps(raw | differ), encoding="utf-8")
    with pytest.raises(ValueError, match="quantization and quantization_config differ"):
        mambax.load(tmp_path, backend="mlx")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_kernels_and_mlx_agree(bits):
    """Few rows by the kernels, many by NumPy, inside mx.compile by MLX; and the gradient of x."""
    from mambax_mlx.products import quantized_product

    rng = np.random.default_rng(0)
    weight = mx.array(rng.standard_normal((37, 96)).astype(np.float32))
    packed = mx.quantize(weight, group_size=32, bits=bits)
    full = np.array(mx.dequantize(*packed, group_size=32, bits=bits)).astype(np.float64)

    def product(x: Any) -> Any:
        return quantized_product(x, *packed, group_size=32, bits=bits)

    for rows in (1, 3, 33):
        x = mx.array(rng.standard_normal((rows, 96)).astype(np.float32))
        want = np.array(x).astype(np.float64) @ full.T
        assert_close(product(x), want)
        assert_close(mx.compile(product)(x), want)
        assert_close(product(x.astype(mx.bfloat16)).astype(mx.float32), want, "bfloat16")
        dy = mx.array(rng.standard_normal((rows, 37)).astype(np.float32))
        (gradient,) = mx.vjp(product, [x], [dy])[1]
        assert_close(gradient, np.array(dy).astype(np.float64) @ full, tolerance=FORWARD["float32"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group_size", "inputs"), [(32, 32), (32, 160), (64, 704), (128, 384)])
def test_the_kernels_at_every_size_of_groups(monkeypatch, bits, group_size, inputs):
    """Whole vectors of words and what is left of one; weights and x that do not lie row after row."""
    from mambax_mlx import cpu_affine

    rng = np.random.default_rng(1)
    weight = mx.array(rng.standard_normal((26, inputs)).astype(np.float32))
    parts = mx.quantize(weight, group_size=group_size, bits=bits)
    full = np.array(mx.dequantize(*parts, group_size=group_size, bits=bits)).astype(np.float64)
    matrix = cpu_affine.packed(*(part[::2] for part in parts), bits)
    x = rng.standard_normal((inputs, 2, 3)).astype(np.float32).transpose(1, 2, 0)
    monkeypatch.setattr(cpu_affine.np, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))
    assert_close(cpu_affine.product(x, matrix), x.astype(np.float64) @ full[::2].T)


def test_bits_are_stored_in_their_place():
    assert Packing(4, 32).shapes(7, 64) == {"weight": (7, 8), "scales": (7, 2), "biases": (7, 2)}
    assert str(Affine(Packing(3, 64))) == "3 bits in groups of 64 (MLX)"
