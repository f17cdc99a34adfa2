"""What training on a GPU computes once more instead of keeping: the same bits, and nothing else changes.

On the CPU in Triton's interpreter. Dimensions: B batch, L length, M d_model, D d_inner.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
from harness import TORCH_COMPILES, build, config_of
from tolerances import FORWARD, GRADIENT, assert_close

from mambax import mamba2
from mambax.blocks import LayerState

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

import mambax_torch as nn
import torch
from mambax_torch import layers, normed_ops, ops
from mambax_torch.kernels import conv, gated_norm, norm
from test_triton_norm import process_group
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["process_group"]  # a fixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, L, M, D = 2, 5, 3, 6
CONFIG = config_of(n_layer=1, d_model=M, d_state=2, dt_rank=1, scan="triton", vocab_size=9)


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution of the definition by the same kernel, which it takes by itself on a GPU alone."""
    monkeypatch.setattr(layers, "causal_conv1d", conv.causal_conv1d)


@pytest.fixture
def mixer() -> Any:
    return build(nn, CONFIG).backbone.layers[0].mixer.to(DEVICE)


def normal(*shape: int, seed: int = 0, dtype: Any = None) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype or torch.float32)


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the mixer was one operation, from here on."""
    calls, mix = [], nn.mix

    def counted(*given: Any) -> Any:
        mixed = mix(*given)
        calls.append(mixed is not None)
        return mixed

    monkeypatch.setattr(nn, "mix", counted)
    return calls


def gradients(mixer: Any, run: Any = None, *, rows: int = 1, low: bool = False, **places: Any) -> dict[str, Any]:
    """Outputs, and the gradients of a sum in which all of them take part: of weights, inputs and states."""
    dtype = mixer.in_proj.weight.dtype
    leaves = {"hidden": normal(rows, L, M, dtype=dtype), "ssm": normal(rows, D, 2, seed=1)}
    leaves["conv"] = normal(rows, 2, D, seed=2, dtype=dtype)
    for leaf in leaves.values():
        leaf.requires_grad_()
    mixer.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=low):
        y, after = (run or mixer)(leaves["hidden"], LayerState(leaves["conv"], leaves["ssm"]), **places)
    outputs = {"y": y, "conv after": after.conv, "ssm after": after.ssm}
    weighed = [(x.float() * normal(*x.shape, seed=3)).sum() for x in outputs.values()]
    torch.stack(weighed).sum().backward()
    of = {name: leaf.grad for name, leaf in (*leaves.items(), *mixer.named_parameters())}
    return {name: x.detach().clone() for name, x in (outputs | of).items()}


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Every bit; on a GPU, where a library may add in another order, within the tolerances."""
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.dtype == want[name].dtype, name
        if DEVICE == "cpu":
            assert torch.equal(x, want[name]), name
        else:
            limit = FORWARD["bfloat16"] if x.dtype == torch.bfloat16 else GRADIENT["float32"]
            assert_close(x.float().cpu(), want[name].float().cpu(), what=name, tolerance=limit)


MARKED = torch.tensor([[False, True, True, False, True], [True, True, False, False, True]], device=DEVICE)


@pytest.mark.parametrize(
    ("dtype", "low", "places"),
    [
        (torch.float32, True, {}),
        (torch.float32, False, {"mask": MARKED}),
        (torch.bfloat16, False, {"boundaries": MARKED}),
    ],
)
def test_one_operation_gives_the_same_bits(mixer, monkeypatch, dtype, low, places):
    mixer = mixer.to(dtype)
    mixer.dt_proj.bias.data = mixer.dt_proj.bias.data.float()  # as models of narrow weights have it
    calls = calls_of(monkeypatch)
    got = gradients(mixer, rows=B, low=low, **places)
    monkeypatch.setattr(nn, "mix", lambda *_: None)
    same(got, gradients(mixer, rows=B, low=low, **places))
    assert calls == [True]


def kept(function: Any) -> set[int]:
    """The memory of all that is kept for the gradient, as large as (B, L, D)."""
    sizes: dict[int, int] = {}

    def pack(x: Any) -> Any:
        sizes[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = function()
    assert outputs is not None
    return {address for address, size in sizes.items() if size == B * L * D}


def test_neither_what_the_convolution_nor_what_dt_proj_gives_is_kept(mixer, monkeypatch):
    hidden = normal(B, L, M)
    assert len(kept(lambda: mixer(hidden))) == 1  # y, which out_proj keeps
    monkeypatch.setattr(nn, "mix", lambda *_: None)
    assert len(kept(lambda: mixer(hidden))) == 3 + 1  # and part of xz


def test_checkpointed_twice_backwards_and_used_twice(mixer, monkeypatch):
    calls = calls_of(monkeypatch)
    want = gradients(mixer)
    same(gradients(mixer, lambda *given: checkpoint(mixer, *given, use_reentrant=False)), want)
    assert calls == [True] * 3
    hidden = normal(1, L, M).requires_grad_()
    weights = (hidden, *mixer.parameters())
    total = mixer(hidden)[0].sum()
    first = torch.autograd.grad(total, weights, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(total, weights)))
    twice = torch.autograd.grad(mixer(hidden)[0].sum() + mixer(hidden)[0].sum(), weights)
    for got, once in zip(twice, first, strict=True):
        assert_close(got.cpu(), 2 * once.cpu(), tolerance=GRADIENT["float32"])


def test_frozen_weights_have_no_gradient_and_the_others_theirs(mixer):
    want = gradients(mixer)
    mixer.zero_grad()
    mixer.requires_grad_(False)
    mixer.conv1d.weight.requires_grad_()
    mixer(normal(1, L, M))[0].sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is not None] == ["conv1d.weight"]
    mixer.requires_grad_()
    same(gradients(mixer), want)


def test_a_second_gradient_and_writing_into_what_is_needed_are_refused(mixer):
    hidden = normal(1, L, M).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(hidden)[0].square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    y, _ = mixer(hidden)
    with torch.no_grad():
        mixer.dt_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Own(nn.MambaMixer):
    pass


class OwnLinear(nn.Linear):
    pass


def change(mixer: Any, name: str) -> Any:
    """The mixer with something in it that is not what mambax makes."""
    if name == "subclass":
        mixer.__class__ = Own
    elif name == "layer":
        mixer.x_proj.__class__ = OwnLinear
    elif name == "forward":
        mixer.dt_proj.forward = lambda x: torch.nn.functional.linear(x, mixer.dt_proj.weight, mixer.dt_proj.bias)
    elif name == "parametrised":
        torch.nn.utils.parametrizations.weight_norm(mixer.x_proj)
    elif name == "norms":
        mixer.config = replace(mixer.config, dt_b_c_norm="weightless")
    else:
        getattr(mixer, name).register_forward_hook(lambda *_: None)
    return mixer


OTHERS = ["subclass", "layer", "forward", "parametrised", "norms", "conv1d", "x_proj", "dt_proj"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_anybodys_own_is_called(mixer, name):
    xz, A = normal(B, L, 2 * D), -normal(D, 2).exp()
    assert nn.mix(mixer, xz, A, None, None, None) is not None
    assert nn.mix(change(mixer, name), xz, A, None, None, None) is None


def test_the_definition_does_what_cannot_be_one_operation(mixer):
    xz, A = normal(B, L, 2 * D), -normal(D, 2).exp()

    def mixed(xz: Any = xz, state: Any = None, mask: Any = None, boundaries: Any = None) -> bool:
        return nn.mix(mixer, xz, A, state, mask, boundaries) is not None

    assert mixed()
    with torch.no_grad():
        assert not mixed()
    assert not mixed(xz[:, :0])
    assert not mixed(xz.double())
    assert not mixed(mask=MARKED, boundaries=MARKED)
    assert not mixed(mask=MARKED[:1])
    assert not mixed(state=LayerState(normal(B, 2, D), normal(B, D, 3)))
    with torch.autocast(DEVICE, torch.float16):
        assert not mixed()
    with FlopCounterMode(display=False):
        assert not mixed()
    seen = []
    torch.func.grad(lambda x: (seen.append(mixed(x)), x.sum())[1])(xz)
    assert seen == [False]
    mixer.requires_grad_(False)
    assert not mixed()


@TORCH_COMPILES
def test_compiled_it_is_the_operators_one_by_one(mixer):
    hidden = normal(1, L, M)
    want = torch.autograd.grad(mixer(hidden)[0].sum(), list(mixer.parameters()))
    compiled = torch.compile(lambda x: mixer(x)[0], fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden).sum(), list(mixer.parameters()))
    for one, other in zip(got, want, strict=True):
        assert_close(one.cpu(), other.cpu(), tolerance=GRADIENT["float32"])


@pytest.mark.skipif(sys.platform == "win32", reason="Triton runs on Linux")
@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")  # of torch.distributed
def test_in_several_processes_and_spread_over_them(monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def made() -> Any:
        return build(nn, CONFIG).backbone.layers[0].to(DEVICE)

    def of(module: Any) -> list[Any]:
        module(normal(1, L, M))[0].sum().backward()
        found = [p.grad for p in module.parameters()]
        return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]

    want, calls, spread = of(made()), calls_of(monkeypatch), made()
    fully_shard(spread, mesh=init_device_mesh(DEVICE, (1,)))
    for module in (torch.nn.parallel.DistributedDataParallel(made()), spread):
        for got, expected in zip(of(module), want, strict=True):
            assert_close(got.cpu(), expected.cpu(), tolerance=GRADIENT["float32"])
    assert calls == [True] * 2


# --- products with what a norm gave -------------------------------------------------------------------------------


def made(x: Any, weight: Any) -> Any:
    return normed_ops.remember(norm.rms_norm(x, weight, 1e-5)[0], x, weight, 1e-5)


@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_a_product_that_keeps_no_output_of_a_norm_gives_the_same_bits(dtype, low):
    x, scale = normal(B, L, D).requires_grad_(), normal(D, seed=1, dtype=dtype).requires_grad_()
    weight, bias = (normal(*s, seed=4, dtype=dtype).requires_grad_() for s in ((7, D), (7,)))

    def run(function: Any) -> dict[str, Any]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=low):
            y = function(made(x, scale), weight, bias)
        total = (y.float() * normal(B, L, 7, seed=5)).sum()
        of = torch.autograd.grad(total, (x, scale, weight, bias))
        return dict(zip(("y", "x", "scale", "weight", "bias"), (y.detach(), *of), strict=True))

    same(run(normed_ops.linear), run(torch.nn.functional.linear))
    ones = torch.ones(7, D, device=DEVICE, dtype=dtype, requires_grad=True)
    assert len(kept(lambda: torch.nn.functional.linear(made(x, scale), ones))) == 2
    assert len(kept(lambda: normed_ops.linear(made(x, scale), ones, None))) == 1  # x, which the norm keeps anyway


def test_a_product_with_anything_else_keeps_it():
    x, scale, weight = normal(B, L, D).requires_grad_(), normal(D), normal(7, D).requires_grad_()
    y = made(x, scale)
    assert normed_ops.linear(y, weight, None) is not None
    assert normed_ops.linear(y * 1, weight, None) is None
    assert normed_ops.linear(y, weight.detach(), None) is None
    assert normed_ops.linear(made(x.detach(), scale), weight, None) is None
    assert normed_ops.linear(y, weight.double(), None) is None
    with torch.no_grad():
        assert normed_ops.linear(y, weight, None) is None
        y.mul_(2)
    assert normed_ops.linear(y, weight, None) is None
    del y
    assert not normed_ops._origins


# --- the gated norm of Mamba-2 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "groups"), [("float32", 1), ("float32", 2), ("bfloat16", 2)])
def test_a_gated_norm_that_keeps_its_inputs_alone(monkeypatch, dtype, groups):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: empty(*size, **kind).fill_(float("nan")))
    monkeypatch.setattr(gated_norm, "PROGRAMS", 3)  # so that one goes through several rows
    low = getattr(torch, dtype)
    whole = normal(B, L, 2 * D, dtype=low)
    leaves = [normal(B, L, D, seed=1, dtype=low), whole[..., :D], normal(D, seed=2)]
    leaves = [x.requires_grad_() for x in leaves]

    def run(function: Any, *leaves: Any) -> list[Any]:
        y = function(*leaves, groups, 1e-5)
        return [y.detach(), *torch.autograd.grad((y * normal(B, L, D, seed=3)).sum(), leaves)]

    got = run(gated_norm.gated_norm, *leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = run(lambda *given: mamba2.gated_rms_norm(ops, *given), *wide)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.dtype == (low if i in (1, 2) else torch.float32)
        limit = FORWARD["bfloat16"] if one.dtype == torch.bfloat16 else GRADIENT["float32"]
        assert_close(one.float().cpu(), other.cpu(), tolerance=limit)
    y, z, weight = leaves
    assert len(kept(lambda: gated_norm.gated_norm(y, z, weight, groups, 1e-5))) == 2
    assert len(kept(lambda: mamba2.gated_rms_norm(ops, y, z, weight, groups, 1e-5))) > 2


def test_a_gated_norm_with_weights_frozen():
    y, z, weight = normal(B, L, D).requires_grad_(), normal(B, L, D, seed=1), normal(D)
    (got,) = torch.autograd.grad(gated_norm.gated_norm(y, z, weight, 2, 1e-5).sum(), y)
    (want,) = torch.autograd.grad(mamba2.gated_rms_norm(ops, y, z, weight, 2, 1e-5).sum(), y)
    assert_close(got.cpu(), want.cpu(), tolerance=GRADIENT["float32"])
