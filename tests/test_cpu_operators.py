"""The fused CPU kernels as PyTorch operators and as an MLX function.

Dimensions: B batch, L length, D channels, N d_state, K width of the convolution.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import MLX, TORCH, TORCH_COMPILES
from mambax_cpu import scan
from test_cpu_kernels import conv_values, scan_values
from tolerances import FORWARD, GRADIENT, assert_close

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
SCAN_VALUES = scan_values(2, 37, 20, 5)
CONV_VALUES = conv_values(2, 37, 20, 4)


def tensors(values: dict[str, np.ndarray], **options: Any) -> dict[str, Any]:
    import torch

    return {name: torch.tensor(value, **options) for name, value in values.items()}


def results(**options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Outputs of both ops, and the leaves whose gradients their sum of squares gives."""
    import mambax_torch as nn

    scanned, convolved = tensors(SCAN_VALUES, **options), tensors(CONV_VALUES, **options)
    outputs = [*nn.selective_scan(**scanned, delta_softplus=True), *nn.causal_conv1d(**convolved)]
    return outputs, {**scanned, **{f"conv {name}": leaf for name, leaf in convolved.items()}}


@TORCH
def test_torch_finds_nothing_wrong_with_the_operators():
    import torch
    from mambax_torch import conv_ops, cpu_ops

    assert cpu_ops.selective_scan is not conv_ops.causal_conv1d  # importing them is what registers the operators
    values = tensors(SCAN_VALUES, requires_grad=True)
    mask = torch.ones(2, 37, dtype=torch.bool)
    u, delta, A, B, C, D, z, bias, state = (values[name] for name in NAMES)
    operator = torch.ops.mambax.cpu_selective_scan.default
    torch.library.opcheck(operator, (u, delta, A, B, C, D, z, bias, True, state, mask, None, True))
    plain = (x.detach() for x in (u, delta, A, B, C))
    torch.library.opcheck(operator, (*plain, None, None, None, True, None, None, mask, False))
    values = tensors(CONV_VALUES, requires_grad=True)
    x, weight, bias, state = (values[name] for name in ("x", "weight", "bias", "initial_state"))
    operator = torch.ops.mambax.cpu_causal_conv1d.default
    torch.library.opcheck(operator, (x, weight, bias, state, mask, None, "silu"))
    torch.library.opcheck(operator, (x, weight, None, None, None, mask, None))


@TORCH
def test_the_way_without_gradients_is_the_operator():
    import torch

    with torch.no_grad():
        direct, _ = results()
    recorded, _ = results(requires_grad=True)
    for got, want in zip(direct, recorded, strict=True):
        assert torch.equal(got, want)
        assert want.requires_grad
        assert not got.requires_grad


@TORCH
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_for_one_argument_alone(name):
    import mambax_torch as nn

    _, leaves = results(requires_grad=True)
    outputs, leaves = results(requires_grad=True)
    sum(y.square().sum() for y in outputs[:2]).backward()
    alone = tensors(SCAN_VALUES)
    alone[name].requires_grad_()
    sum(y.square().sum() for y in nn.selective_scan(**alone, delta_softplus=True)).backward()
    assert_close(alone[name].grad, leaves[name].grad)
    assert all(value.grad is None for other, value in alone.items() if other != name)


@TORCH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_gradients_come_back_narrow(dtype):
    import torch

    outputs, narrow = results(requires_grad=True, dtype=getattr(torch, dtype))
    sum(y.float().square().sum() for y in outputs).backward()
    outputs, wide = results(requires_grad=True)
    sum(y.square().sum() for y in outputs).backward()
    for name, leaf in narrow.items():
        assert leaf.grad.dtype == leaf.dtype
        # the rounded arguments and outputs move the gradient by several roundings
        assert_close(leaf.grad.float(), wide[name].grad, what=name, tolerance=5 * FORWARD[dtype])


@TORCH
@TORCH_COMPILES
def test_compiled_without_a_graph_break():
    import mambax_torch as nn
    import torch

    def loss(u, delta, A, B, C, D, z, delta_bias, initial_state, x, weight, bias, past):
        y, final = nn.selective_scan(
            u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True, initial_state=initial_state
        )
        out, end = nn.causal_conv1d(x, weight, bias, initial_state=past)
        return sum(value.square().sum() for value in (y, final, out, end))

    outputs, want = results(requires_grad=True)
    sum(value.square().sum() for value in outputs).backward()
    got = [tensor.detach().clone().requires_grad_() for tensor in want.values()]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*got).backward()
    for leaf, (name, expected) in zip(got, want.items(), strict=True):
        assert_close(leaf.grad, expected.grad, what=name, tolerance=GRADIENT["float32"])


@TORCH
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # forward mode in torch uses it
def test_where_the_kernels_cannot_run_auto_takes_another_and_a_name_is_refused():
    import mambax_torch as nn
    import torch
    from torch.autograd import forward_ad

    values = tensors(SCAN_VALUES)
    u = values.pop("u")

    def loss(u: Any, impl: str = "auto") -> Any:
        return nn.selective_scan(u, **values, delta_softplus=True, impl=impl)[0].square().sum()

    leaf = u.clone().requires_grad_()
    loss(leaf, "cpu").backward()
    assert_close(torch.func.grad(loss)(u), leaf.grad, tolerance=GRADIENT["float32"])
    with pytest.raises(ValueError, match=r"'cpu' cannot run here.*torch\.func"):
        torch.func.grad(lambda u: loss(u, "cpu"))(u)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(u, u))).tangent
        assert_close(tangent, (leaf.grad * u).sum(), tolerance=GRADIENT["float32"])
    with pytest.raises(ValueError, match=r"'cpu' cannot run here.*meta"):
        nn.selective_scan(u.to("meta"), **values, impl="cpu")
    with pytest.raises(ValueError, match=r"'cpu' cannot run here.*float64"):
        loss(u.double(), "cpu")


@TORCH
def test_a_second_gradient_is_refused():
    import torch

    outputs, leaves = results(requires_grad=True)
    (gradient,) = torch.autograd.grad(outputs[0].square().sum(), leaves["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="cpu_selective_scan_backward"):
        gradient.sum().backward()


@TORCH
def test_the_number_of_threads_is_that_of_torch(monkeypatch):
    import mambax_torch as nn
    import torch

    asked = []
    monkeypatch.setattr(scan, "run", lambda work, count, threads: (asked.append(threads), work(0, count)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    values = tensors(scan_values(2, 400, 100, 16), requires_grad=True)
    nn.selective_scan(**values, delta_softplus=True)[0].sum().backward()
    assert asked == [5, 5]


@TORCH
def test_the_state_of_the_convolution_does_not_keep_its_inputs():
    import mambax_torch as nn

    values = tensors(CONV_VALUES)
    _, state = nn.causal_conv1d(**values)
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


@MLX
def test_mlx_refuses_what_the_kernels_cannot_give():
    import mambax_mlx as nn
    import mlx.core as mx

    if nn.scan_implementations()["cpu"]:
        pytest.skip(nn.scan_implementations()["cpu"])
    values = {name: mx.array(value) for name, value in SCAN_VALUES.items()}
    u = values.pop("u")

    def loss(u: Any) -> Any:
        return nn.selective_scan(u, **values, delta_softplus=True, impl="cpu")[0].square().sum()

    with pytest.raises(NotImplementedError, match="'pscan'"):
        mx.jvp(loss, [u], [u])
    with pytest.raises(NotImplementedError, match="'pscan'"):
        mx.grad(lambda u: mx.grad(loss)(u).sum())(u)
    with pytest.raises(ValueError, match="not allowed"):
        mx.compile(loss)(u)
