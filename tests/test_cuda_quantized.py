"""Quantised weights by Triton against the weights as NumPy reads them; on the CPU in the interpreter.

There the operators, the layers and whole models are told that a tensor on the CPU is one on a GPU.

Dimensions: M rows, O outputs, I inputs.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from harness import TORCH_COMPILES, build, config_of, rounded, run, token_ids, weights_of
from test_quantized import dequantized
from tolerances import FORWARD, assert_close

import mambax
from mambax import get_backend, quantization
from mambax.adapters import add_lora

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
cuda_quantized = pytest.importorskip("mambax_torch.cuda_quantized")
graph_step = pytest.importorskip("mambax_torch.graph_step")
ops = pytest.importorskip("mambax_torch.quantized_ops")
nn = get_backend("torch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = pytest.mark.parametrize(("kind", "group"), [("int8", 32), ("int4", 32), ("int4", 64)])


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantised product is the kernels', whose results are NaN where they write nothing."""
    monkeypatch.setattr(ops, "kernels_of", lambda device: cuda_quantized)
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> Any:
        made = empty(*shape, **options)
        return made.fill_(float("nan")) if made.dtype.is_floating_point and not made.is_meta else made

    monkeypatch.setattr(cuda_quantized.torch, "empty", poisoned)


def quantized(kind: str, group: int, outputs: int, inputs: int) -> tuple[Any, Any, np.ndarray]:
    """The weight and scales on the device, and what they stand for."""
    values = np.random.default_rng(outputs + inputs).standard_normal((outputs, inputs)).astype(np.float32)
    found = quantization.quantize(values, kind, group)
    weight, scales = (nn.from_numpy(array, device=DEVICE) for array in (found.weight, found.scales))
    return weight, scales, quantization.dequantize(found)


@KINDS
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (21, 128), (3, 1300)])
def test_weights_are_read_back(kind, group, outputs, inputs):
    weight, scales, want = quantized(kind, group, outputs, inputs)
    got = cuda_quantized.dequantized(weight, scales, inputs, torch.float32)
    np.testing.assert_array_equal(got.cpu(), want)
    ids = torch.tensor([[0, outputs - 1], [outputs // 2, 0]], device=DEVICE)
    got = ops.rows(weight, scales, ids, inputs, torch.float32)
    np.testing.assert_array_equal(got.cpu(), want[ids.cpu()])
    assert ops.rows(weight, scales, ids[:0], inputs, torch.bfloat16).shape == (0, 2, inputs)
    with pytest.raises(IndexError):
        ops.rows(weight.cpu(), scales.cpu(), torch.tensor([outputs]), inputs, torch.float32)


@KINDS
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        ("float32", 1),
        ("float32", 3),
        ("float32", 65),
        ("bfloat16", 1),
        ("bfloat16", 65),
        ("float16", 1),
        ("float16", 3),
    ],
)
def test_products(kind, group, dtype, rows):
    for outputs, inputs in ((33, 300), (9, 2100)) if rows == 1 else ((17, 300),):
        weight, scales, values = quantized(kind, group, outputs, inputs)
        x = torch.randn(rows, inputs, device=DEVICE).to(getattr(torch, dtype))
        bias = torch.randn(outputs, device=DEVICE)
        want = x.double().cpu().numpy() @ values.astype(np.float64).T
        got = ops.linear(x[None], weight, scales, None, inputs)[0]
        assert got.dtype == x.dtype
        assert_close(got.double().cpu(), want, dtype)
        got = ops.linear(x, weight, scales, bias, inputs)
        assert_close(got.double().cpu(), want + bias.double().cpu().numpy(), dtype)


@KINDS
@pytest.mark.parametrize("rows", [2, 64])
def test_the_inputs_divided_over_programs(kind, group, rows, monkeypatch):
    from mambax_torch.kernels import tuning

    monkeypatch.setattr(tuning, "processors", lambda device: 132)
    assert cuda_quantized._Grid.of(rows, 70, 14, torch.device(DEVICE)).parts == 3
    weight, scales, values = quantized(kind, group, 70, 1700)
    x, bias = torch.randn(rows, 1700, device=DEVICE), torch.randn(70, device=DEVICE)
    want = x.double().cpu().numpy() @ values.astype(np.float64).T + bias.double().cpu().numpy()
    got = ops.linear(x, weight, scales, bias, 1700)
    assert_close(got.double().cpu(), want)
    assert torch.equal(got, ops.linear(x, weight, scales, bias, 1700))  # to the bit


@KINDS
def test_one_row_times_many_outputs(kind, group, monkeypatch):
    """Enough of them for the other shape of a program, whose last is not full."""
    from mambax_torch.kernels import tuning

    monkeypatch.setattr(tuning, "processors", lambda device: 2)
    weight, scales, values = quantized(kind, group, 150, 330)
    x = torch.randn(1, 990, device=DEVICE)[:, ::3]  # not contiguous
    want = x.double().cpu().numpy() @ values.astype(np.float64).T
    assert_close(ops.linear(x, weight, scales, None, 330).double().cpu(), want)


@KINDS
@pytest.mark.parametrize("rows", [3, 70])
def test_gradients_of_inputs_and_bias(kind, group, rows):
    weight, scales, values = quantized(kind, group, 5, 140)
    x, bias = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((rows, 140), (5,)))
    dy = torch.randn(rows, 5, device=DEVICE)
    ops.linear(x, weight, scales, bias, 140).backward(dy)
    assert_close(x.grad.cpu(), dy.double().cpu().numpy() @ values)
    assert_close(bias.grad.cpu(), dy.double().cpu().numpy().sum(0))
    assert bias.grad.dtype == torch.float32


@KINDS
def test_torch_finds_nothing_wrong_with_the_operators(kind, group):
    weight, scales, _ = quantized(kind, group, 5, 40)
    x, bias = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((3, 40), (5,)))
    torch.library.opcheck(torch.ops.mambax.quantized_linear.default, (x, weight, scales, bias, 40))
    ids = torch.tensor([[1, 4]], device=DEVICE)
    torch.library.opcheck(torch.ops.mambax.quantized_rows.default, (weight, scales, ids, 40, torch.bfloat16))


def test_what_cannot_run_is_refused(monkeypatch):
    weight, scales, _ = quantized("int8", 32, 5, 40)
    with pytest.raises(ValueError, match=r"expected float32.*found float64"):
        ops.linear(torch.zeros(3, 40, dtype=torch.float64, device=DEVICE), weight, scales, None, 40)
    with pytest.raises(ValueError, match=r"inputs \(\.\.\., 40\).*found \(3, 41\)"):
        ops.linear(torch.zeros(3, 41, device=DEVICE), weight, scales, None, 40)
    from mambax_torch.kernels import devices

    gpu = torch.device("cuda:0")
    monkeypatch.setattr(devices, "_too_old", lambda index: "")
    assert not nn.why_not_quantized("cuda:0")
    monkeypatch.setattr(devices, "missing", lambda: "Triton cannot be imported")
    with pytest.raises(ValueError, match=r"cannot run on cuda:0: Triton cannot be imported\. Use 'cpu'"):
        ops.check_device(gpu)
    monkeypatch.setattr(devices, "missing", lambda: "")
    monkeypatch.setattr(devices, "_too_old", lambda index: "it has compute capability 7.5; the kernels need 8.0")
    assert "need 8.0" in nn.why_not_quantized("cuda:0")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in nn.why_not_quantized("cuda")


def test_a_device_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    model = build(nn, config_of(d_model=20, n_layer=1))
    model.save_pretrained(tmp_path / "full")
    nn.quantize(model, "int8").save_pretrained(tmp_path / "small")
    monkeypatch.setattr(nn, "devices", lambda: ("cuda", "cpu"))
    monkeypatch.setattr(nn, "why_not_quantized", lambda device: "no kernels there" if device != "cpu" else "")
    for folder, kind in (("full", "int4"), ("small", None)):
        with pytest.raises(ValueError, match="quantised weights cannot run on 'cuda': no kernels there"):
            mambax.load(tmp_path / folder, backend="torch", device="cuda", quantize=kind)
        assert mambax.load(tmp_path / folder, backend="torch", device="cpu", quantize=kind)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_brings_the_quantised_weights_alone_to_a_gpu(dtype, tmp_path, monkeypatch):
    """Here a GPU is the CPU under another name, and what is brought there is written down."""
    build(nn, config_of(d_model=20, n_layer=1, tie_embeddings=True), dtype=dtype).save_pretrained(tmp_path)
    want = mambax.load(tmp_path, backend="torch", device="cpu", quantize="int4")
    brought: list[Any] = []
    from_numpy = nn.from_numpy

    def recorded(array: np.ndarray, *, like: Any = None, device: str | None = None) -> Any:
        if device == "cuda":
            brought.append(array)
        return from_numpy(array, like=like, device=None if device == "cuda" else device)

    monkeypatch.setattr(nn, "devices", lambda: ("cuda", "cpu"))
    monkeypatch.setattr(nn, "why_not_quantized", lambda device: "")
    monkeypatch.setattr(nn, "from_numpy", recorded)
    got = mambax.load(tmp_path, backend="torch", device="cuda", quantize="int4")
    assert len(brought) == len(nn.parameters(got))
    assert sum(array.nbytes for array in brought) == sum(x.nbytes for x in nn.parameters(want).values())
    for name, value in nn.parameters(want).items():
        assert torch.equal(nn.parameters(got)[name], value), name
        assert nn.parameters(got)[name].dtype == value.dtype
    assert got.backbone.embeddings.dtype == getattr(torch, dtype)


# --- models --------------------------------------------------------------------------------------------------


def made(kind: str, group: int, dtype: str = "float32", tied: bool = True) -> tuple[Any, Any]:
    """A quantised model on the device, and one of the weights that its bits stand for."""
    config = config_of(d_model=20, n_layer=1, vocab_size=53, tie_embeddings=tied)
    weights = rounded(weights_of(config), dtype)
    model = build(nn, config, weights, dtype).to(DEVICE)
    exact = build(nn, config, dequantized(weights, kind, group, tied), dtype).to(DEVICE)
    return nn.quantize(model, kind, group), exact


@pytest.mark.parametrize(("kind", "group", "tied"), [("int8", 32, True), ("int4", 32, True), ("int4", 64, False)])
def test_a_model_is_that_of_the_weights_its_bits_stand_for(kind, group, tied):
    model, want = made(kind, group, tied=tied)
    for batch, length in ((1, 1), (2, 3), (5, 14)):
        ids = token_ids(batch, length, 53)
        assert_close(run(model, ids)[0], run(want, ids)[0], tolerance=1e-5)
    ids = token_ids(1, 3, 53)
    state, parts = None, []
    for t in range(3):
        part, state = run(model, ids[:, t : t + 1], state)
        parts.append(part)
    assert_close(np.concatenate(parts, 1), run(model, ids)[0])


def test_moved_narrowed_copied_saved_and_loaded(tmp_path):
    model, _ = made("int4", 32)
    ids = token_ids(2, 5, 53)
    want = run(model, ids)[0]
    np.testing.assert_array_equal(run(copy.deepcopy(model), ids)[0], want)
    other = nn.quantize(build(nn, model.config, weights_of(model.config, seed=5)).to(DEVICE), "int4")
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(run(other, ids)[0], want)
    model.cpu().save_pretrained(tmp_path)
    again = mambax.load(tmp_path, backend="torch", device=DEVICE)
    np.testing.assert_array_equal(run(again, ids)[0], want)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(model).to(DEVICE).to(dtype).to("cpu", torch.float32).to(DEVICE, dtype)
        mixer = narrow.backbone.layers[0].mixer
        assert (mixer.in_proj.scales.dtype, mixer.x_proj.scales.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(mixer.in_proj.scales.cpu(), model.backbone.layers[0].mixer.in_proj.scales.cpu())
        assert narrow.backbone.embeddings(torch.tensor([1], device=DEVICE)).dtype == dtype
        assert_close(run(narrow, ids)[0], want, tolerance=3 * FORWARD["bfloat16"])


def test_adapters_are_trained_over_quantised_layers():
    model, exact = made("int4", 32)
    for each in (model, exact):
        add_lora(each, ["in_proj", "x_proj", "out_proj", "embeddings"], rank=2, tied_embeddings=True, seed=3)
    ids = torch.as_tensor(token_ids(1, 3, 53), device=DEVICE)
    for each in (model, exact):
        each(ids).logits.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "_B" in name}
    assert len(found) == 4
    for name, p in exact.named_parameters():
        if name in found and p.grad.norm():
            assert_close(found[name].cpu(), p.grad.double().cpu(), tolerance=1e-4, what=name)


@TORCH_COMPILES
def test_compile():
    model, _ = made("int4", 32)
    ids = torch.as_tensor(token_ids(2, 3, 53), device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(ids).logits.cpu(), model(ids).logits.cpu())
    torch.compiler.reset()


@pytest.mark.parametrize(("kind", "group"), [("int8", 32), ("int4", 32)])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_token_of_the_captured_step(kind, group, batch):
    """An x_proj that is quantised takes the way with products between the kernels."""
    model, _ = made(kind, group)
    layers = model.backbone.layers
    with torch.no_grad():
        state = model(torch.as_tensor(token_ids(batch, 5, 53), device=DEVICE)).state
        hidden = model.backbone.embeddings(torch.as_tensor(token_ids(batch, 1, 53), device=DEVICE))
        want, after = hidden, []
        for layer, held in zip(layers, state.layers, strict=True):
            want, held = layer(want, held)
            after.append(held)
        found = graph_step.decode_step(layers, hidden, state.layers)
    assert found is not None
    assert_close(found[0].cpu(), want.double().cpu())
    for ours, theirs in zip(found[1], after, strict=True):
        assert_close(ours.ssm.cpu(), theirs.ssm.double().cpu())
        assert_close(ours.conv.cpu(), theirs.conv.double().cpu())


def test_nothing_waits_for_the_gpu(monkeypatch):
    """Tensors without values, as if on a GPU: whatever asked for one of them would raise."""
    from mambax_torch.kernels import devices, tuning
    from torch._subclasses.fake_tensor import FakeTensorMode

    launched: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert all(type(size) is int and size > 0 for size in grid)
            return lambda *given, **options: launched.append(self.name)

    class Kernels:
        def __getattr__(self, name: str) -> Kernel:
            return Kernel(name)

    monkeypatch.setattr(cuda_quantized, "_kernels", Kernels)
    monkeypatch.setattr(devices, "on_device_of", lambda x: nullcontext())
    monkeypatch.setattr(tuning, "processors", lambda device: 132)
    with FakeTensorMode():
        options: dict[str, Any] = {"device": "cuda"}
        eight = torch.empty(70, 300, dtype=torch.int8, **options), torch.empty(70, **options)
        scales = torch.empty(70, 6, dtype=torch.bfloat16, **options)
        four = torch.empty(70, 192, dtype=torch.uint8, **options), scales
        for weight, scales in (eight, four):
            for rows in (1, 3, 65):
                x = torch.empty(rows, 300, dtype=torch.bfloat16, **options)
                y = ops._product(x, weight, scales, None, 300)
                assert (y.device.type, y.dtype, tuple(y.shape)) == ("cuda", torch.bfloat16, (rows, 70))
            ids = torch.empty(2, 1, dtype=torch.int64, **options)
            assert ops._rows_of(weight, scales, ids, 300, torch.bfloat16).device.type == "cuda"
    names = ("{}_row_kernel", "{}_kernel", "widen_{}_kernel", "widen_{}_kernel")
    assert launched == [name.format(kind) for kind in ("int8", "int4") for name in names]
