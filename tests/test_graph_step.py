"""One token through a stack of blocks by the Triton kernels: what calling the blocks one after another gives.

Dimensions: B batch, M d_model.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness import build, config_of, token_ids
from tolerances import FORWARD, assert_close

from mambax import get_backend

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
graph_step = pytest.importorskip("mambax_torch.graph_step")
step_block = pytest.importorskip("mambax_torch.kernels.step_block")
targets = pytest.importorskip("mambax_torch.kernels.step_targets")
from torch.overrides import BaseTorchFunctionMode  # noqa: E402

nn = get_backend("torch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def stack(batch: int, dtype: str = "float32", **changes: Any) -> tuple[Any, Any, Any]:
    """The blocks, the next token's hidden state and the blocks' states after some others."""
    small: dict[str, Any] = {"n_layer": 2, "d_model": 20, "d_state": 3, "dt_rank": 3, **changes}
    return following(build(nn, config_of(**small), dtype=dtype), batch)


def following(model: Any, batch: int) -> tuple[Any, Any, Any]:
    """As :func:`stack` of a model."""
    model = model.to(DEVICE)
    with torch.no_grad():
        state = model(token_ids(batch, 5)).state
        hidden = model.backbone.embeddings(torch.as_tensor(token_ids(batch, 1), device=DEVICE))
    return model.backbone.layers, hidden, state.layers


def one_by_one(layers: Any, hidden: Any, states: Any) -> tuple[Any, Any]:
    after = []
    with torch.no_grad():
        for layer, state in zip(layers, states, strict=True):
            hidden, state = layer(hidden, state)
            after.append(state)
    return hidden, after


def compare(layers: Any, hidden: Any, states: Any, dtype: str = "float32") -> None:
    want, want_states = one_by_one(layers, hidden, states)
    with torch.no_grad():
        found = graph_step.decode_step(layers, hidden, states)
    assert found is not None
    got, after = found
    assert got.dtype == want.dtype
    # to bfloat16 Triton's interpreter cuts off where a GPU rounds: twice the error, at every rounding
    limit = FORWARD[dtype] * (2 if dtype == "bfloat16" and DEVICE == "cpu" else 1)
    assert_close(got.double().cpu(), want.double().cpu(), what="hidden", tolerance=limit)
    for ours, theirs in zip(after, want_states, strict=True):
        for name in ("conv", "ssm"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert one.dtype == other.dtype
            if one.numel():
                assert_close(one.double().cpu(), other.double().cpu(), what=name, tolerance=limit)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_few_rows_in_two_launches(batch, width, monkeypatch):
    launched = []
    mixed = step_block.mixed
    monkeypatch.setattr(step_block, "mixed", lambda *given: launched.append(1) or mixed(*given))
    compare(*stack(batch, d_conv=width))
    assert len(launched) == 2


def test_more_rows_with_products_between(monkeypatch):
    monkeypatch.setattr(step_block, "FEW_ROWS", 1)
    compare(*stack(3))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 4), ("bfloat16", 3), ("float16", 4)])
def test_narrow_weights(dtype, width, wide, rows, monkeypatch):
    monkeypatch.setattr(step_block, "FEW_ROWS", rows)
    compare(*stack(2, dtype, residual_in_fp32=wide, use_bias=False, d_conv=width), dtype)


@pytest.mark.parametrize("width", [3, 4])
def test_taps_that_are_read_together(width):
    """Four of 16 bits are one number of 64, where memory is aligned to it."""
    weight = torch.zeros(6, 1, width, dtype=torch.bfloat16, device=DEVICE)
    assert (step_block._four_in_one(weight, torch.bfloat16) is None) == (width != 4)
    assert step_block._four_in_one(weight, torch.float16) is None  # they would be taken for the values' own dtype
    assert step_block._four_in_one(weight.float(), torch.float32) is None
    shifted = torch.zeros(6 * width + 2, dtype=torch.bfloat16, device=DEVICE)[2:].view(6, 1, width)
    assert step_block._four_in_one(shifted, torch.bfloat16) is None


def test_without_bias_of_the_convolution():
    compare(*stack(2, use_conv_bias=False, use_bias=False, d_state=5, dt_rank=1))


@pytest.mark.parametrize("rows", [1, 8])
def test_states_go_where_they_belong(rows, monkeypatch):
    monkeypatch.setattr(step_block, "FEW_ROWS", rows)
    layers, hidden, states = stack(2)
    want, want_states = one_by_one(layers, hidden, states)
    rooms = [type(state)(*(torch.full_like(held, float("nan")) for held in state)) for state in states]
    pairs = [(held, room) for a, b in zip(states, rooms, strict=True) for held, room in zip(a, b, strict=True)]
    with torch.no_grad(), targets.written_into(pairs):
        got, after = graph_step.decode_step(layers, hidden, states)
    assert_close(got.cpu(), want.cpu())
    for state, room, other in zip(after, rooms, want_states, strict=True):
        for ours, place, theirs in zip(state, room, other, strict=True):
            assert ours is place
            assert_close(ours.cpu(), theirs.cpu())


def test_the_caller_calls_the_blocks_where_the_kernels_would_be_wrong():
    layers, hidden, states = stack(2)
    assert graph_step.decode_step(layers, hidden, states) is None  # gradients are recorded
    with torch.no_grad():
        assert graph_step.decode_step(layers, torch.cat([hidden, hidden], 1), states) is None
        assert graph_step.decode_step(layers, hidden.double(), states) is None
        with torch.autocast(DEVICE, torch.bfloat16):
            assert graph_step.decode_step(layers, hidden, states) is None
        handle = layers[1].mixer.register_forward_hook(lambda *call: None)
        assert graph_step.decode_step(layers, hidden, states) is None
        handle.remove()
        narrow = [type(state)(state.conv.bfloat16(), state.ssm) for state in states]
        assert graph_step.decode_step(layers, hidden, narrow) is None
        assert graph_step.decode_step(layers, hidden, states) is not None
        layers[0].norm.forward = lambda x: x
        assert graph_step.decode_step(layers, hidden, states) is None
    for changes in ({"dt_b_c_norm": "weightless"}, {"residual_multiplier": 0.5}):
        other, hidden, states = stack(2, **changes)
        with torch.no_grad():
            assert graph_step.decode_step(other, hidden, states) is None


def test_where_new_tensors_go_does_not_matter_and_other_modes_do():
    """``torch.set_default_device`` is a mode too."""
    layers, hidden, states = stack(1)
    with torch.no_grad(), torch.device(DEVICE):
        assert graph_step.decode_step(layers, hidden, states) is not None
        with BaseTorchFunctionMode():
            assert graph_step.decode_step(layers, hidden, states) is None


def test_products_that_are_modules_are_called():
    """So that adapters and quantised layers take part, and hooks on them run."""
    layers, hidden, states = stack(2)
    seen = []
    for name in ("in_proj", "x_proj", "out_proj"):
        getattr(layers[0].mixer, name).register_forward_hook(lambda *call, name=name: seen.append(name))
    compare(layers, hidden, states)
    assert seen == ["in_proj", "x_proj", "out_proj"] * 2
