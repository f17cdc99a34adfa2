"""The decode step over static buffers: what it gives is what ordinary decoding gives, and states remain values.

Without a GPU the same steps run without graphs. Dimensions: B batch.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from harness import assert_states_close, assert_states_equal, build, config_of, frozen, token_ids

from mambax import get_backend
from mambax.sampling import SamplingParams

torch = pytest.importorskip("torch")
graph = pytest.importorskip("mambax_torch.graph")
layers = pytest.importorskip("mambax_torch.layers")
nn = get_backend("torch")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 3}


@pytest.fixture(scope="module")
def model() -> Any:
    return build(nn, config_of(n_layer=2, d_model=20, d_state=3, dt_rank=3)).to(DEVICE)


@pytest.fixture(params=["stack", "blocks"])
def triton_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token by the Triton kernels: through the whole stack at once, or block by block."""
    from mambax_torch import graph_step
    from mambax_torch.kernels import conv, step

    def scanned(u: Any, *args: Any, impl: str, mask: Any, boundaries: Any = None, **options: Any) -> Any:
        if u.shape[1] > 1:
            return selective_scan(u, *args, mask=mask, impl=impl, **options)
        return step.scan_step(u, *args, **options)

    def convolved(x: Any, *args: Any, **options: Any) -> Any:
        return conv.causal_conv1d(x, *args, **options)

    selective_scan = nn.selective_scan
    at_once = graph_step.decode_step if request.param == "stack" else lambda *given: None
    monkeypatch.setattr(nn, "decode_step", at_once)
    monkeypatch.setattr(nn, "selective_scan", scanned)
    monkeypatch.setattr(layers, "causal_conv1d", convolved)


def steps_of(model: Any, params: SamplingParams, prompt: np.ndarray, uniforms: np.ndarray) -> Any:
    """(tokens, state arrays) after each step of ordinary decoding, and of the static step, side by side."""
    from mambax.sampling import sample

    with torch.no_grad():
        output = model(prompt, logits_to_keep=1)
        state, seen = output.state, None
        if params.repetition_penalty != 1:
            seen = torch.zeros((len(prompt), model.config.vocab_size), dtype=torch.bool, device=DEVICE)
            seen.scatter_(1, torch.as_tensor(prompt, device=DEVICE), True)
        tokens = output.logits[:, -1].argmax(1)
        steps = graph.StepGraph(model, params, state, capture=GPU)
        ours = steps.begin(state, tokens, seen)
        for uniform in uniforms:
            output = model(tokens[:, None], state, logits_to_keep=1)
            state = output.state
            tokens = sample(nn, output.logits[:, -1], nn.from_numpy(uniform, like=tokens), params, seen)
            if seen is not None:
                seen = seen.scatter(1, tokens[:, None], True)
            ours = steps.advance(uniform)
            yield tokens.cpu().numpy(), state, steps.read(ours[0]), ours[1]


UNIFORMS = np.random.default_rng(0).random((7, 3, 1), dtype=np.float32)
PARAMS = pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(1.2, 0.7), SamplingParams(1.0, 1.1, 10, 0.9, 0.01)]
)


@PARAMS
def test_static_steps_are_ordinary_steps(model, params):
    for want, state, got, ours in steps_of(model, params, token_ids(3, 5), UNIFORMS):
        np.testing.assert_array_equal(got, want)
        assert_states_close(ours, state)


@TRITON
@pytest.mark.usefixtures("triton_steps")
def test_kernels_write_the_state_where_it_belongs(model, monkeypatch):
    copied = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda a, b: (copied.extend(a), copy(a, b)))
    for want, state, got, ours in steps_of(model, SamplingParams(), token_ids(2, 5), UNIFORMS[:3, :2]):
        np.testing.assert_array_equal(got, want)
        assert_states_close(ours, state)
    assert {array.dtype for array in copied} == {torch.int64}  # how many tokens were seen, and nothing large


def test_a_state_stays_what_it_was(model):
    held, copies = [], []
    for _, _, _, ours in steps_of(model, SamplingParams(), token_ids(2, 5), UNIFORMS[:5, :2]):
        held.append(ours)
        copies.append(frozen(ours))
    for state, copy in zip(held, copies, strict=True):
        assert_states_equal(state, copy)


def test_a_generation_is_the_ordinary_one(model, monkeypatch):
    prompts = [token_ids(1, n, seed=n)[0] for n in (3, 7)]
    options: dict[str, Any] = {"max_new_tokens": 12, "eos": (), **SAMPLED}
    monkeypatch.setattr(nn, "stepper", lambda *given: None)
    want = model.generate(prompts, **options)
    monkeypatch.setattr(nn, "stepper", partial(graph.stepper, capture=False))
    monkeypatch.setattr(graph, "LEAST", 1)
    got = model.generate(prompts, **options)
    assert [row.tokens for row in got] == [row.tokens for row in want]
    assert_states_close(got[0].state, want[0].state)
    ends = model.generate(prompts, **{**options, "eos": want[0].tokens[4]})  # one row ends before the other
    assert ends[0].tokens == want[0].tokens[: len(ends[0].tokens)]
    assert ends[1].tokens == want[1].tokens[: len(ends[1].tokens)]
    continued = model.generate([[5]], **{**options, "state": ends[0].state, "max_new_tokens": 3})
    assert len(continued[0].tokens) == 3


def test_graphs_are_kept_and_those_in_use_are_left_alone():
    model = build(nn, config_of(n_layer=1)).to(DEVICE)
    params, tokens = SamplingParams(), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    state = model.init_state(2)

    def taken(params: SamplingParams, state: Any, *steps: int) -> Any:
        return graph.stepper(model, params, state, *steps, capture=GPU)

    first, second = taken(params, state), taken(params, state)
    first.begin(state, tokens, None)
    assert second is not first  # another generation runs at the same time
    first.end(first.advance(UNIFORMS[0, :2])[0])
    second.end(tokens)  # which never began
    assert graph._idle[model] == [first, second]
    assert taken(params, state, 1) is first
    assert graph._idle[model] == [second]
    hot = SamplingParams(temperature=0.5)
    assert taken(hot, state, graph.LEAST - 1) is None  # making one would not pay
    third = taken(hot, state)
    assert graph._idle[model] == [second]
    third.end(tokens)
    first.end(tokens)
    assert graph._idle[model] == [third, first]  # those used last
    fourth = taken(params, model.init_state(3))
    assert graph._idle[model] == [first]  # the other one has made room
    gone = weakref.ref(fourth)
    del fourth  # by one who forgets to end it
    gc.collect()
    assert gone() is None


def test_a_graph_serves_only_the_model_it_was_made_for():
    model = build(nn, config_of(n_layer=1)).to(DEVICE)
    state, params, none = model.init_state(1), SamplingParams(), torch.zeros(0)

    def taken() -> Any:
        steps = graph.stepper(model, params, state, capture=GPU)
        steps.end(none)
        return steps

    before = taken()
    with torch.no_grad():
        model.backbone.norm_f.weight.mul_(1.5)  # in place: the graph reads the new values
    assert taken() is before
    model.backbone.norm_f.eps = 1e-3
    other = taken()
    assert other is not before
    model.backbone.norm_f.eps = before_eps = 1e-5
    assert (model.backbone.norm_f.eps, taken()) == (before_eps, before)
    nn.set_parameters(model, {"backbone.norm_f.weight": model.backbone.norm_f.weight.detach().clone()})
    assert taken() not in (before, other)
    assert len(graph._idle[model]) == 1  # of those whose weights are gone, none is kept
    precision = torch.get_float32_matmul_precision()
    before = taken()
    try:
        torch.set_float32_matmul_precision("high")
        assert taken() is not before
    finally:
        torch.set_float32_matmul_precision(precision)


def test_steps_and_model_let_go_of_each_other():
    model = build(nn, config_of(n_layer=1))
    kept = graph.stepper(model, SamplingParams(), model.init_state(1), capture=False)
    kept.end(torch.zeros(1))
    steps = weakref.ref(kept)
    del kept
    gone = weakref.ref(model)
    assert steps() is not None
    del model
    gc.collect()
    assert gone() is None
    assert steps() is None


def test_tokens_outlive_the_generation(model):
    state = model.init_state(2)
    steps = graph.StepGraph(model, SamplingParams(), state, capture=GPU)
    steps.begin(state, torch.tensor([1, 2], device=DEVICE), None)
    tokens, after = steps.advance(UNIFORMS[0, :2])
    want, arrays = steps.read(tokens), frozen(after)
    own = steps.end(tokens)
    steps.begin(state, torch.tensor([3, 4], device=DEVICE), None)
    steps.advance(UNIFORMS[1, :2])
    steps.advance(UNIFORMS[2, :2])
    np.testing.assert_array_equal(own.cpu().numpy(), want)
    assert_states_equal(after, arrays)


def test_what_cannot_be_captured_is_said(model):
    state = model.init_state(1)
    if GPU:
        assert graph.why_not_graph(model, state.tokens_seen) == ""
    else:
        assert "NVIDIA GPU" in graph.why_not_graph(model, state.tokens_seen)
        assert graph.stepper(model, SamplingParams(), state) is None


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_captured_generation_is_the_ordinary_one(model, monkeypatch):
    prompts = [token_ids(1, n, seed=n)[0] for n in (3, 7)]
    options: dict[str, Any] = {"max_new_tokens": 40, "eos": (), **SAMPLED}
    with monkeypatch.context() as without:
        without.setattr(nn, "stepper", lambda *given: None)
        want = model.generate(prompts, **options)
    for _ in range(2):
        got = model.generate(prompts, **options)
        assert [row.tokens for row in got] == [row.tokens for row in want]
        assert_states_close(got[1].state, want[1].state)
    assert any(steps._graphs is not None for steps in graph._idle[model])
