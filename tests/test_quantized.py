"""Models whose linear layers run on the few-row kernels, with plain and with quantised weights.

A quantised model must be the model of the weights that its bits stand for; how good those are is not decided here.
"""

from __future__ import annotations

import copy
import importlib
import json
from typing import Any

import numpy as np
import pytest
import reference
from harness import TORCH_COMPILES, assign, backend_params, build, config_of, rounded, run, token_ids, weights_of
from mambax_cpu import linear
from tolerances import FORWARD, assert_close, relative_error

import mambax
from mambax import MambaLMConfig, get_backend, quantization
from mambax.cli.info import info

HOST = ("numpy", "torch")
BY_BACKEND = pytest.mark.parametrize("name", backend_params(HOST))
KINDS = pytest.mark.parametrize(("kind", "group_size"), [("int8", 32), ("int4", 32), ("int4", 64)])
TIED = pytest.mark.parametrize("tied", [True, False])


def wide_config(tied: bool = False, **changes: Any) -> MambaLMConfig:
    """Odd sizes, and large enough for the kernels."""
    fields = {"d_model": 130, "n_layer": 2, "vocab_size": 301, "tie_embeddings": tied}
    return config_of(**(fields | changes))


def quantizer(name: str) -> Any:
    return importlib.import_module(f"mambax_{name}.quantized")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kind of weights of every product that the kernels do."""
    seen: list[str] = []

    def counted(weights: Any, *args: Any, **options: Any) -> None:
        seen.append(weights.kind)
        product(weights, *args, **options)

    product = linear.product
    monkeypatch.setattr(linear, "product", counted)
    if get_backend_or_none("torch"):
        monkeypatch.setattr(importlib.import_module("mambax_torch.linear_ops"), "product", counted)
    return seen


def get_backend_or_none(name: str) -> Any:
    try:
        return get_backend(name)
    except ImportError:
        return None


@BY_BACKEND
@TIED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 1), (8, 1), (1, 7), (4, 8), (3, 20)])
def test_logits_of_few_rows(name, tied, dtype, batch, length, calls):
    nn, config = get_backend(name), wide_config(tied)
    weights = weights_of(config)
    model, ids = build(nn, config, weights, dtype), token_ids(batch, length, 301)
    exact = {key: value.astype(np.float64) for key, value in rounded(weights, dtype).items()}
    assert_close(run(model, ids)[0], reference.logits(exact, ids), dtype)
    if 1 < batch * length <= 16 or (name, dtype, batch * length) == ("numpy", "bfloat16", 1):
        assert calls == [dtype] * len(calls)
        blocks = 0 if length == 1 else 3 * config.n_layer - 1  # one token is a call of its own; x_proj may be small
        assert len(calls) >= max(1, blocks)


@BY_BACKEND
@TIED
@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_model_is_that_of_the_weights_its_bits_stand_for(name, tied, kind, group_size, dtype, calls):
    nn, config = get_backend(name), wide_config(tied)
    weights = rounded(weights_of(config), dtype)
    model = quantizer(name).quantize(assign(nn, nn.MambaForCausalLM(config), weights), kind, group_size)
    want = assign(nn, nn.MambaForCausalLM(config), dequantized(weights, kind, group_size, tied))
    for length in (1, 5, 40):
        ids = token_ids(1, length, 301)
        calls.clear()
        got, exact = run(model, ids)[0], run(want, ids)[0]
        assert_close(got, exact, tolerance=1e-5 if dtype == "float32" else FORWARD[dtype])
        assert got.dtype == np.float32
    ids = token_ids(2, 3, 301)
    calls.clear()
    run(model, ids)
    counts = {each: calls.count(each) for each in ("int8", "int4")}
    x_proj, others = config.n_layer, 2 * config.n_layer + 1  # x_proj has 8 bits at least
    assert counts == ({"int8": x_proj + others, "int4": 0} if kind == "int8" else {"int8": x_proj, "int4": others})


def dequantized(weights: dict[str, np.ndarray], kind: str, group_size: int, tied: bool) -> dict[str, np.ndarray]:
    """The weights as they come back, float32 where they were quantised."""
    values = dict(weights)
    for path, weight in weights.items():
        layer = path.split(".")[-2] if path.endswith(".weight") else ""
        if layer in quantization.LAYERS or (tied and layer == "embeddings"):
            chosen = quantization.quantize(weight, quantization.kind_of(layer, kind), group_size)
            values[path] = quantization.dequantize(chosen).astype(weight.dtype)
    return values


@BY_BACKEND
@KINDS
def test_what_stays_and_what_it_takes(name, kind, group_size):
    nn, config = get_backend(name), wide_config(True, d_model=256, dt_rank=16)
    model = build(nn, config)
    before = {path: nn.to_numpy(array) for path, array in nn.parameters(model).items()}
    quantizer(name).quantize(model, kind, group_size)
    kept = {path: nn.to_numpy(array) for path, array in nn.parameters(model).items() if path in before}
    for path, array in before.items():
        if path.endswith((".A_log", ".D", ".bias")) or any(part in path for part in ("conv1d", "dt_proj", "norm")):
            np.testing.assert_array_equal(kept[path], array)
    bits = {"int8": 8.5, "int4": 4 + 16 / group_size}[kind]
    head = model.backbone.embeddings
    size = sum(nn.to_numpy(part).nbytes for part in (head.weight, head.scales))
    assert size <= 301 * 256 * bits / 8
    assert not any(
        path.startswith("backbone.embeddings") and array.dtype == np.float32 for path, array in kept.items()
    )


@BY_BACKEND
def test_backends_agree_token_by_token(name):
    config = wide_config(True)
    weights, ids = weights_of(config), token_ids(2, 9, 301)
    logits = []
    for each in ("numpy", name):
        model = quantizer(each).quantize(build(get_backend(each), config, weights), "int4")
        whole, _ = run(model, ids)
        state, parts = None, []
        for t in range(9):
            part, state = run(model, ids[:, t : t + 1], state)
            parts.append(part)
        assert_close(np.concatenate(parts, 1), whole)
        logits.append(whole)
    assert_close(logits[1], logits[0])


@BY_BACKEND
def test_bad_input_leaves_the_model_as_it_was(name):
    nn, config, quantize = get_backend(name), wide_config(True), quantizer(name).quantize
    model, ids = build(nn, config), token_ids(1, 4, 301)
    want = run(model, ids)[0]
    with pytest.raises(ValueError, match="quantize is 'int3'; expected one of 'int8', 'int4'"):
        quantize(model, "int3")
    with pytest.raises(ValueError, match="group_size is 48; expected one of 32, 64"):
        quantize(model, "int4", 48)
    broken = {path: nn.to_numpy(array).copy() for path, array in nn.parameters(model).items()}
    broken["backbone.layers.1.mixer.out_proj.weight"][3, 3] = np.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.out_proj has weights that are NaN"):
        quantize(assign(nn, nn.MambaForCausalLM(config), broken), "int8")
    np.testing.assert_array_equal(run(model, ids)[0], want)
    with pytest.raises(ValueError, match="is float64; expected float32, float16 or bfloat16"):
        quantize(build(nn, config, dtype="float64"), "int8")
    quantize(model, "int8")
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, "int4")


class TestTorch:
    """What is PyTorch's own."""

    @pytest.fixture(autouse=True)
    def _torch(self) -> None:
        pytest.importorskip("torch")

    def model(self, kind: str | None = "int4", tied: bool = True) -> Any:
        model = build(get_backend("torch"), wide_config(tied)).eval()
        return model if kind is None else quantizer("torch").quantize(model, kind)

    def test_state_dict_deepcopy_and_dtype(self):
        import torch

        model, ids = self.model(), token_ids(1, 5, 301)
        want = run(model, ids)[0]
        np.testing.assert_array_equal(run(copy.deepcopy(model), ids)[0], want)
        other = build(get_backend("torch"), wide_config(True), weights_of(wide_config(True), seed=5))
        quantizer("torch").quantize(other, "int4")
        assert relative_error(run(other, ids)[0], want) > 0.1
        other.load_state_dict(model.state_dict())
        np.testing.assert_array_equal(run(other, ids)[0], want)
        narrow = model.to(torch.bfloat16)
        assert narrow.backbone.layers[0].mixer.in_proj.scales.dtype == torch.bfloat16
        assert narrow.backbone.layers[0].mixer.x_proj.scales.dtype == torch.float32
        assert narrow.backbone.embeddings(torch.tensor([1])).dtype == torch.bfloat16
        assert_close(run(narrow, ids)[0], want, "bfloat16")

    def test_gradients_go_through_to_the_inputs(self):
        import torch

        for rows in (3, linear.FEW_ROWS + 9):
            model = self.model()
            layer = model.backbone.layers[0].mixer.in_proj
            x = torch.randn(2, rows, 130, requires_grad=True)
            y = layer(x)
            packed, scales = (get_backend("torch").to_numpy(part) for part in (layer.weight, layer.scales))
            weight = torch.from_numpy(quantization.dequantize(quantization.Quantized(packed, scales, 130)))
            dy = torch.randn_like(y)
            dx, dbias = torch.autograd.grad(y, (x, layer.bias), dy)
            assert_close(dx, dy @ weight)
            assert_close(dbias, dy.sum((0, 1)))

    @pytest.mark.parametrize("kind", [None, "int4"])
    @TORCH_COMPILES
    def test_compile(self, kind):
        import torch

        model, ids = self.model(kind), torch.tensor(token_ids(2, 3, 301))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert_close(compiled(ids).logits, model(ids).logits)
        torch.compiler.reset()

    @pytest.mark.parametrize("kind", ["cpu_linear", "quantized_linear", "quantized_rows"])
    def test_operators(self, kind):
        import torch

        names = ("quantized_ops", "linear_ops")
        ops, linear_ops = (importlib.import_module(f"mambax_torch.{name}") for name in names)
        x, bias = torch.randn(2, 3, 70), torch.randn(9)
        quantized = quantization.quantize(torch.randn(9, 70).numpy(), "int4")
        nn = get_backend("torch")
        packed = (nn.from_numpy(quantized.weight), nn.from_numpy(quantized.scales))
        case = {
            "cpu_linear": (linear_ops._linear, (x, torch.randn(9, 70), bias)),
            "quantized_linear": (ops._linear, (x.clone().requires_grad_(), *packed, bias.requires_grad_(), 70)),
            "quantized_rows": (ops._rows, (*packed, torch.tensor([[1, 8]]), 70, torch.bfloat16)),
        }[kind]
        torch.library.opcheck(*case, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
    def test_the_kernels_stay_out_of_the_way(self, calls):
        """Where a gradient is wanted, under autocast and in transforms PyTorch's own product is used."""
        import torch

        layer, x = self.model(None).backbone.layers[0].mixer.in_proj, torch.randn(2, 130)
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        with torch.no_grad():
            torch.func.vmap(layer)(x)
            torch.func.jvp(layer, (x,), (x,))
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
            assert calls == []
            want = torch.nn.functional.linear(x, layer.weight, layer.bias)
            assert_close(layer(x), want)
            assert calls == ["float32"]
            with pytest.raises(RuntimeError):
                layer(torch.randn(2, 131))

    def test_another_device(self, monkeypatch):
        import torch

        ops = importlib.import_module("mambax_torch.quantized_ops")
        assert "none for 'mps'" in ops.why_not(torch.device("mps"))
        model = self.model()
        layer = model.backbone.layers[0].mixer.in_proj
        with pytest.raises(ValueError, match="beside the weights on cpu, found them on meta"):
            layer(torch.empty(1, 130, device="meta"))
        monkeypatch.setattr(ops, "why_not", lambda device: "no kernels" if device.type == "meta" else "")
        with pytest.raises(ValueError, match=r"cannot run on meta: no kernels\. Use 'cpu', or the full weights"):
            layer(torch.empty(1, 130, device="meta"))
        for whole in (model, model.backbone, self.model(tied=False)):
            with pytest.raises(ValueError, match="cannot run on meta"):
                whole.to("meta")
            assert not any(tensor.is_meta for tensor in (*whole.parameters(), *whole.buffers()))
        full = self.model(None).to("meta")
        with pytest.raises(ValueError, match="cannot run on meta"):
            quantizer("torch").quantize(full, "int8")
        assert type(full.backbone.layers[0].mixer.in_proj).__name__ == "Linear"

    def test_what_a_layer_is_given(self):
        import torch

        layer = self.model().backbone.layers[0].mixer.in_proj
        with pytest.raises(ValueError, match=r"expected float32, bfloat16 or float16, found float64.*model\.float"):
            layer(torch.zeros(1, 130, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"inputs \(\.\.\., 130\).*found \(2, 131\)"):
            layer(torch.zeros(2, 131))
        assert layer(torch.zeros(0, 130)).shape == (0, layer.out_features)

    def test_autocast_and_transforms(self):
        import torch

        layer = self.model().backbone.layers[0].mixer.in_proj
        packed, scales = (get_backend("torch").to_numpy(part) for part in (layer.weight, layer.scales))
        weight = torch.from_numpy(quantization.dequantize(quantization.Quantized(packed, scales, 130)))
        x = torch.randn(3, 130, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        (dx,) = torch.autograd.grad(y.float().sum(), x)
        assert dx.dtype == torch.float32
        assert_close(dx, weight.sum(0).expand(3, 130), "bfloat16")
        want = torch.nn.functional.linear(x, weight, layer.bias).detach()
        assert_close(torch.func.vmap(layer)(x).detach(), want)
        tangent = torch.randn(3, 130)
        got = torch.func.jvp(layer, (x.detach(),), (tangent,))[1]
        assert_close(got.detach(), tangent @ weight.T)

    def test_placeholders_take_no_memory(self):
        model = quantizer("torch").quantize(self.model(None).to("meta"), "int4")
        layer = model.backbone.layers[0].mixer.in_proj
        assert layer.weight.is_meta
        assert layer.scales.is_meta


@BY_BACKEND
@TIED
@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_loaded_and_loaded_quantized(name, tied, kind, group_size, dtype, tmp_path):
    nn, config, ids = get_backend(name), wide_config(tied), token_ids(1, 6, 301)
    mambax.save_pretrained(build(nn, config, dtype=dtype), tmp_path / "full")
    model = mambax.load(tmp_path / "full", backend=name, device="cpu", quantize=kind, group_size=group_size)
    want = run(quantizer(name).quantize(build(nn, config, dtype=dtype), kind, group_size), ids)[0]
    np.testing.assert_array_equal(run(model, ids)[0], want)
    model.save_pretrained(tmp_path / "small")
    size = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("small", "full")]
    assert size[0] < size[1] * {"int8": 0.5, "int4": 0.45}[kind] * (1 if dtype == "float32" else 2)
    for other in HOST:
        again = mambax.load(tmp_path / "small", backend=other, device="cpu")
        assert_close(run(again, ids)[0], want, dtype)
        if other == name:  # to the bit, the vectors of a quantised table too
            np.testing.assert_array_equal(run(again, ids)[0], want)
        for path, array in nn.parameters(model).items():
            held = again.nn.to_numpy(again.nn.parameters(again)[path])
            np.testing.assert_array_equal(held, nn.to_numpy(array))
            assert held.dtype == nn.to_numpy(array).dtype
    mambax.load(tmp_path / "small", backend=name, device="cpu", quantize=kind, group_size=group_size)
    with pytest.raises(ValueError, match="the checkpoint is quantised already"):
        mambax.load(tmp_path / "small", backend=name, quantize="int8" if kind == "int4" else "int4")


def test_bad_quantized_checkpoints(tmp_path, capsys):
    model = quantizer("numpy").quantize(build(get_backend("numpy"), wide_config(True)), "int4")
    model.save_pretrained(tmp_path)
    info(str(tmp_path), None, True)
    assert "int4 and float32" in capsys.readouterr().out
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert raw["quantization_config"] == {"quant_method": "mambax", "kind": "int4", "group_size": 32}
    for change, words in (
        ({"quant_method": "gptq", "bits": 4}, "not supported unless mambax or mlx-lm wrote them"),
        ({"quant_method": "mambax", "kind": "int3", "group_size": 32}, "quantize is 'int3'"),
        ({"quant_method": "mambax", "kind": "int4", "group_size": None}, "group_size is None"),
        ({"quant_method": "mambax", "kind": "int4", "group_size": 64}, "of another shape"),
        ({"quant_method": "mambax", "kind": "int8", "group_size": 32}, "of another shape"),
        (None, "unexpected"),
    ):
        changed = json.dumps(raw | {"quantization_config": change})
        (tmp_path / "config.json").write_text(changed, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            mambax.load(tmp_path, backend="numpy")
