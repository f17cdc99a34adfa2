"""The Triton scan as a PyTorch operator, and when it is chosen.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness import TORCH_COMPILES

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

import mambax_torch as nn
import torch
from mambax_torch.kernels import scan, scan_ops
from triton_scan_cases import (
    DEVICE,
    NAMES,
    compare,
    leaves,
    poisoned,
    results,
    small,
    triton_scan,
    values_of,
)

__all__ = ["poisoned", "small"]  # fixtures of every test here


# --- as an operator -----------------------------------------------------------------------------------------------


def test_torch_finds_nothing_wrong_with_the_operator():
    values = leaves(values_of(1, 9, 3, 2))
    u, delta, A, B, C, D, z, bias, state = (values[name] for name in NAMES)
    mask = torch.ones(1, 9, dtype=torch.bool, device=DEVICE)
    operator = torch.ops.mambax.triton_selective_scan.default
    torch.library.opcheck(operator, (u, delta, A, B, C, D, z, bias, True, state, mask, None, True))
    plain = (x.detach() for x in (u, delta, A, B, C))
    torch.library.opcheck(operator, (*plain, None, None, None, True, None, None, None, False))


@TORCH_COMPILES
def test_compiled_exported_checkpointed_and_under_autocast():
    values = values_of(1, 9, 3, 2)
    want = results(triton_scan, leaves(values), delta_softplus=True)

    def function(**given: Any) -> Any:
        return triton_scan(**given, delta_softplus=True)

    def checkpointed(**given: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, **given, use_reentrant=False)

    def cast(**given: Any) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16):
            return function(**given)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for variant in (compiled, checkpointed, cast):
        compare(results(variant, leaves(values)), want, 1e-7, 1e-7)

    class Wrapped(torch.nn.Module):
        def forward(self, given: dict[str, Any]) -> Any:
            return function(**given)

    exported = torch.export.export(Wrapped(), (values,), strict=False)
    assert "mambax.triton_selective_scan" in str(exported.graph)
    assert torch.equal(exported.module()(values)[0], want[0]["y"])


def test_a_second_gradient_is_refused():
    values = leaves(values_of(1, 3, 2, 2))
    y, _ = triton_scan(**values)
    (gradient,) = torch.autograd.grad(y.square().sum(), values["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="triton_selective_scan_backward"):
        gradient.sum().backward()


def test_a_gradient_for_one_argument_alone():
    values = values_of(1, 3, 2, 2)
    _, want = results(triton_scan, leaves(values))
    for name in NAMES:
        alone = values | {name: values[name].clone().requires_grad_()}
        _, got = results(triton_scan, alone)
        assert got.keys() == {name}
        assert torch.equal(got[name], want[name])


def test_auto_takes_it_on_a_gpu_alone_and_a_name_is_refused_with_the_reason(monkeypatch):
    values = values_of(1, 3, 2, 2)
    called = []
    monkeypatch.setattr(scan_ops, "selective_scan", lambda *_, **__: called.append(True))
    nn.selective_scan(**values)
    assert len(called) == (DEVICE == "cuda")
    values = {name: x.cpu() for name, x in values.items()}
    with pytest.raises(ValueError, match=r"'triton' cannot run here.*float64"):
        nn.selective_scan(**values | {"u": values["u"].double()}, impl="triton")
    monkeypatch.setattr("mambax_torch.kernels.devices.interpreted", lambda: False)
    monkeypatch.setattr("mambax_torch.kernels.devices._taken", {"cuda"})
    with pytest.raises(ValueError, match=r"'triton' cannot run here: the tensors are on cpu"):
        nn.selective_scan(**values, impl="triton")
    if DEVICE == "cpu":
        assert nn.scan_implementations()["triton"] == "PyTorch finds no CUDA device"
    monkeypatch.setattr("mambax_torch.fused.missing", lambda: "Triton cannot be imported")
    assert nn.scan_implementations()["triton"] == "Triton cannot be imported"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(1, 3, 4)}, r"B is \(1, 3, 4\); expected \(1, 3, 2\)"),
        ({"mask": torch.ones(1, 3) > 0, "boundaries": torch.ones(1, 3) > 0}, "a mask and boundaries"),
        ({"D": torch.zeros(2, device="meta")}, "D is on meta"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        scan_ops.selective_scan(**{name: x.cpu() for name, x in values_of(1, 3, 2, 2).items()} | change)


def test_no_gradient_is_made_of_what_is_kept_for_the_gradient():
    """PyTorch makes zeros for results without a gradient unless it is told not to: as large as all saved states."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if "zeros" in func.name():
                made.append(tuple(found.shape))
            return found

    values = leaves(values_of(1, 20, 5, 3))
    y, _ = triton_scan(**values, delta_softplus=True)
    with Seen():
        y.sum().backward()
    assert (1, 5, 3) in made  # of the final state, which has none either
    assert scan.saved_shape(1, 20, 5, 3) not in made
    assert all(x.grad is not None for x in values.values())
