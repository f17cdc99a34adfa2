"""Products with quantised weights by Triton against the weights as NumPy reads them; on the CPU in the interpreter.

Dimensions: M rows, O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tolerances import assert_close

from mambax import quantization

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
cuda_quantized = pytest.importorskip("mambax_torch.cuda_quantized")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = pytest.mark.parametrize(("kind", "group"), [("int8", 32), ("int4", 32), ("int4", 64)])


def quantized(kind: str, group: int, outputs: int, inputs: int) -> tuple[Any, Any, np.ndarray]:
    """The weight and scales on the device, and what they stand for."""
    values = np.random.default_rng(outputs + inputs).standard_normal((outputs, inputs)).astype(np.float32)
    found = quantization.quantize(values, kind, group)
    scales = found.scales
    wide = torch.from_numpy(scales.astype(np.float32))
    scales = wide.bfloat16() if scales.dtype == ml_dtypes.bfloat16 else wide
    return torch.from_numpy(found.weight).to(DEVICE), scales.to(DEVICE), quantization.dequantize(found)


@KINDS
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 40), (40, 128), (33, 300)])
def test_weights_are_read_back(kind, group, outputs, inputs):
    weight, scales, want = quantized(kind, group, outputs, inputs)
    np.testing.assert_array_equal(cuda_quantized.dequantized(weight, scales, inputs).cpu(), want)
    ids = torch.tensor([[0, outputs - 1], [outputs // 2, 0]], device=DEVICE)
    got = cuda_quantized.rows(weight, scales, ids, inputs)
    np.testing.assert_array_equal(got.cpu(), want[ids.cpu()])


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_products(kind, group, dtype, rows):
    weight, scales, values = quantized(kind, group, 33, 300)
    x = torch.randn(rows, 300, device=DEVICE).to(getattr(torch, dtype))
    bias = torch.randn(33, device=DEVICE)
    want = x.double().cpu().numpy() @ values.astype(np.float64).T
    got = cuda_quantized.linear(x[None], weight, scales, None, 300)[0]
    assert got.dtype == x.dtype
    assert_close(got.double().cpu(), want, dtype)
    got = cuda_quantized.linear(x, weight, scales, bias, 300)
    assert_close(got.double().cpu(), want + bias.double().cpu().numpy(), dtype)


@KINDS
def test_gradients_of_inputs_and_bias(kind, group):
    weight, scales, values = quantized(kind, group, 5, 40)
    x, bias = (
        torch.randn(3, 40, device=DEVICE, requires_grad=True),
        torch.randn(5, device=DEVICE, requires_grad=True),
    )
    dy = torch.randn(3, 5, device=DEVICE)
    cuda_quantized.linear(x, weight, scales, bias, 40).backward(dy)
    assert_close(x.grad.cpu(), dy.double().cpu().numpy() @ values)
    assert_close(bias.grad.cpu(), dy.double().cpu().numpy().sum(0))


def test_torch_finds_nothing_wrong_with_the_operator():
    weight, scales, _ = quantized("int4", 32, 5, 40)
    x = torch.randn(3, 40, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.mambax.triton_quantized_linear.default, (x, weight, scales, None, 40))


def test_what_cannot_run_is_refused():
    weight, scales, _ = quantized("int8", 32, 5, 40)
    with pytest.raises(ValueError, match=r"cannot run here.*float64"):
        cuda_quantized.linear(torch.zeros(3, 40, dtype=torch.float64, device=DEVICE), weight, scales, None, 40)
    with pytest.raises(ValueError, match=r"inputs \(\.\.\., 40\).*found \(3, 41\)"):
        cuda_quantized.linear(torch.zeros(3, 41, device=DEVICE), weight, scales, None, 40)
