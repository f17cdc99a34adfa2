"""Mamba-2's Triton scan as a PyTorch operator, and when it is chosen.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from harness import TORCH_COMPILES, config_of, token_ids
from tolerances import GRADIENT, assert_close

from mambax.options import Mamba2Options

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

import mambax_torch as nn
import torch
from mambax_torch.kernels import ssd_ops
from triton_scan_cases import DEVICE, compare, leaves
from triton_ssd_cases import NAMES, poisoned, results, small, triton_ssd, values_of

__all__ = ["poisoned", "small"]  # fixtures of every test here
ssd_of_backend = nn.ssd


def test_torch_finds_nothing_wrong_with_the_operator():
    values = leaves(values_of((1, 2, 1, 1, 1, 1)))
    *tensors, state = (values[name] for name in NAMES)
    mask = torch.ones(1, 2, dtype=torch.bool, device=DEVICE)
    operator = torch.ops.mambax.triton_ssd.default
    torch.library.opcheck(operator, (*tensors, True, 0.0, 1.0, state, mask, None, True))
    plain = [x.detach() for x in tensors[:5]]
    without = (*plain, None, None, True, 0.0, float("inf"), None, None, None, False)
    torch.library.opcheck(operator, without, test_utils=("test_schema", "test_faketensor"))


@TORCH_COMPILES
def test_compiled_checkpointed_and_under_autocast():
    values = values_of((1, 2, 1, 2, 1, 2))
    want = results(triton_ssd, leaves(values), dt_softplus=True)

    def function(**given: Any) -> Any:
        return triton_ssd(**given, dt_softplus=True)

    def checkpointed(**given: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, **given, use_reentrant=False)

    def cast(**given: Any) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16):
            return function(**given)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for variant in (compiled, checkpointed, cast):
        compare(results(variant, leaves(values)), want, 1e-7, 1e-7)


def test_one_gradient_alone_and_no_second_one():
    values = values_of((1, 3, 1, 2, 1, 2))
    _, want = results(triton_ssd, leaves(values))
    for name in ("dt", "initial_state"):
        _, got = results(triton_ssd, values | {name: values[name].clone().requires_grad_()})
        assert got.keys() == {name}
        assert torch.equal(got[name], want[name])
    x = values["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(triton_ssd(**values)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="triton_ssd_backward"):
        gradient.sum().backward()


def test_auto_takes_it_on_a_gpu_alone_and_a_name_is_refused_with_the_reason(monkeypatch):
    values = values_of((1, 3, 1, 2, 1, 2))
    called = []
    monkeypatch.setattr(ssd_ops, "ssd", lambda *_, **__: called.append(True))
    nn.ssd(**values)
    assert len(called) == (DEVICE == "cuda")
    values = {name: x.cpu() for name, x in values.items()}
    with pytest.raises(ValueError, match=r"'triton' cannot run here.*float64; use 'chunked'"):
        nn.ssd(**values | {"x": values["x"].double()}, impl="triton")
    monkeypatch.setattr("mambax_torch.kernels.devices.interpreted", lambda: True)
    wide = values | {"B": torch.zeros(1, 3, 1, 257), "C": torch.zeros(1, 3, 1, 257)}
    with pytest.raises(ValueError, match=r"d_state 257; the kernels hold at most 128 and 256; use 'chunked'"):
        nn.ssd(**wide, impl="triton")
    monkeypatch.setattr("mambax_torch.kernels.devices.TRITON", (3, 2))
    with pytest.raises(ValueError, match=r"Triton is 3.2; Mamba-2's scan needs 3.6 or newer.*use 'chunked'"):
        nn.ssd(**values, impl="triton")
    monkeypatch.setattr("mambax_torch.kernels.devices.interpreted", lambda: False)
    monkeypatch.setattr("mambax_torch.kernels.devices._taken", {"cuda"})
    with pytest.raises(ValueError, match=r"'triton' cannot run here: the tensors are on cpu"):
        nn.ssd(**values, impl="triton")


def test_a_model_takes_it(monkeypatch):
    config = config_of(
        n_layer=1, layer_types=("mamba2",), mamba2=Mamba2Options(n_heads=2, head_dim=3, n_groups=1, d_state=5)
    )
    model = nn.MambaForCausalLM(config).to(DEVICE)
    ids = torch.from_numpy(token_ids(1, 6)).to(DEVICE)
    found = []
    for impl in ("chunked", "triton"):
        monkeypatch.setattr(nn, "ssd", partial(ssd_of_backend, impl=impl))
        model.zero_grad()
        logits = model(ids).logits
        logits.square().sum().backward()
        found.append({"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()})
    for name, want in found[0].items():
        assert_close(found[1][name].cpu(), want.cpu(), what=name, tolerance=GRADIENT["float32"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"C": torch.zeros(1, 3, 1, 4)}, r"C is \(1, 3, 1, 4\); expected \(1, 3, 1, 2\)"),
        ({"mask": torch.ones(1, 3) > 0, "boundaries": torch.ones(1, 3) > 0}, "a mask and boundaries"),
        ({"D": torch.zeros(1, device="meta")}, "D is on meta"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ssd_ops.ssd(**{name: x.cpu() for name, x in values_of((1, 3, 1, 2, 1, 2)).items()} | change)
