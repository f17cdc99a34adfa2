"""One token through a stack of Mamba-2 by the Triton kernels: what calling the blocks one after another gives.

Dimensions: B batch, M d_model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from decode_steps import mamba2_config, mamba2_model
from harness import assert_states_close, config_of
from test_graph_capture import PROMPTS, TRITON, launched, record
from test_graph_step import DEVICE, compare, following, one_by_one
from tolerances import assert_close

from mambax import get_backend
from mambax.blocks import LayerState

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
graph = pytest.importorskip("mambax_torch.graph")
graph_step = pytest.importorskip("mambax_torch.graph_step")
kernels = pytest.importorskip("mambax_torch.kernels.step_mamba2")
targets = pytest.importorskip("mambax_torch.kernels.step_targets")

nn = get_backend("torch")
__all__ = ["record"]  # a fixture

GATED = ("gate_first", "norm_first", "none")


def stack(batch: int, dtype: str = "float32", n_layer: int = 1, **options: Any) -> tuple[Any, Any, Any]:
    """The blocks, the next token's hidden state and the blocks' states after some others."""
    sizes: dict[str, Any] = {"n_heads": 2, "head_dim": 6, "d_state": 7, "n_groups": 1, **options}
    return following(mamba2_model(nn, dtype, n_layer=n_layer, d_model=20, **sizes), batch)


@pytest.mark.parametrize("gated_norm", GATED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_blocks_one_by_one(dtype, gated_norm):
    compare(*stack(2, dtype, gated_norm=gated_norm, use_bias=True, n_groups=2), dtype)


@pytest.mark.parametrize("wide", [False, True])
def test_blocks_of_both_kinds(wide):
    """And residual streams of both."""
    kinds, sizes = ("mamba2", "mamba", "mamba2"), mamba2_config(n_heads=2).mamba2
    config = config_of(
        layer_types=kinds, mamba2=sizes, d_model=20, d_state=3, dt_rank=3, d_conv=4, residual_in_fp32=wide
    )
    compare(*following(mamba2_model(nn, "bfloat16", config), 2), "bfloat16")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_products(kind):
    model = mamba2_model(nn, n_layer=1, d_model=64, n_heads=2, head_dim=32, d_state=7)
    compare(*following(nn.quantize(model, kind), 2))


def test_products_that_are_modules_are_called():
    layers, hidden, states = stack(1)
    seen = []
    for name in ("in_proj", "out_proj"):
        getattr(layers[0].mixer, name).register_forward_hook(lambda *call, name=name: seen.append(name))
    compare(layers, hidden, states)
    assert seen == ["in_proj", "out_proj"] * 2


def test_an_input_in_another_dtype_than_the_state():
    """A bias in float32 over narrow weights: the mixer goes on by itself, and remembers inputs in float32."""
    layers, hidden, states = stack(2, "bfloat16", use_bias=True)
    mixer = layers[0].mixer
    mixer.in_proj.bias = torch.nn.Parameter(mixer.in_proj.bias.float())
    mixer.out_proj.bias = None
    mixer.out_proj.float()
    with torch.no_grad():
        mixer.norm.float()
        compare(layers, hidden, states, "bfloat16")
        _, (after,) = graph_step.decode_step(layers, hidden, states)
    assert after.conv.dtype == torch.float32


@pytest.mark.parametrize("same", [False, True])
def test_states_go_where_they_belong(same):
    """But the convolution's not where it is read from, by several programs."""
    layers, hidden, states = stack(2)
    want, want_states = one_by_one(layers, hidden, states)
    rooms = states if same else [type(s)(*(torch.full_like(held, float("nan")) for held in s)) for s in states]
    pairs = [(held, room) for a, b in zip(states, rooms, strict=True) for held, room in zip(a, b, strict=True)]
    with torch.no_grad(), targets.written_into(pairs):
        got, after = graph_step.decode_step(layers, hidden, states)
    assert_close(got.cpu(), want.cpu())
    for state, room, other in zip(after, rooms, want_states, strict=True):
        assert state.ssm is room.ssm
        assert (state.conv is room.conv) != same
        for ours, theirs in zip(state, other, strict=True):
            assert_close(ours.cpu(), theirs.cpu())


def test_the_caller_calls_the_blocks_where_the_kernels_would_be_wrong(monkeypatch):
    layers, hidden, states = stack(1)
    mixer = layers[0].mixer

    def taken(blocks: Any = layers, before: Any = states) -> bool:
        return graph_step.decode_step(blocks, hidden, before) is not None

    assert not taken()  # gradients are recorded
    with torch.no_grad():
        assert taken()
        for part in (mixer, mixer.conv1d, mixer.norm):
            handle = part.register_forward_hook(lambda *call: None)
            assert not taken()
            handle.remove()
        conv, ssm = states[0]
        for other in (
            LayerState(conv.bfloat16(), ssm),
            LayerState(conv, ssm.double()),
            LayerState(conv, ssm[:, :1]),
        ):
            assert not taken(before=[other])
        with monkeypatch.context() as few:
            few.setattr(kernels, "WIDEST", mixer.options.d_inner - 1)
            assert not taken()
        weight = mixer.A_log.data
        mixer.A_log.data = weight.double()
        assert not taken()
        mixer.A_log.data = weight
        assert taken()
        mixer.norm = torch.nn.RMSNorm(12, device=DEVICE)
        assert not taken()
        mixer.conv1d.forward = mixer.conv1d.forward
        assert not taken()
        other, hidden, states = stack(1, part_multipliers=(1.0, 2.0, 1.0, 1.0, 1.0))
        assert not taken(other, states)
        assert kernels.why_not(other[0].mixer.options) == "its input has factors"
        for changes in ({"scan": "sequential"}, {"residual_multiplier": 0.5}):
            config = dataclasses.replace(mamba2_config(n_layer=1), **changes)
            other, hidden, states = following(mamba2_model(nn, config=config), 1)
            assert not taken(other, states)


@TRITON
@pytest.mark.parametrize("gated_norm", ["gate_first", "none"])
def test_generations_by_a_captured_step(record, monkeypatch, gated_norm):
    """A recorder with the rules of a CUDA graph replays the launches."""
    sizes: dict[str, Any] = {"n_heads": 2, "head_dim": 6, "d_state": 7, "n_groups": 1, "gated_norm": gated_norm}
    model = mamba2_model(nn, n_layer=2, d_model=20, **sizes).eval()
    options: dict[str, Any] = {"eos": (), "max_new_tokens": 5, "temperature": 1.0, "seed": 3}
    want = model.generate(PROMPTS, **options)
    launched(monkeypatch)
    record()
    got = model.generate(PROMPTS, **options)
    assert [row.tokens for row in got] == [row.tokens for row in want]
    for row, other in zip(got, want, strict=True):
        assert_states_close(row.state, other.state)
    (steps,) = graph._idle[model]
    assert len(steps._graphs[0].calls) > 10
