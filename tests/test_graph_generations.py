"""Generations by the prepared steps of a backend: the tests of ordinary ones, and how they begin and end."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from harness import Letters, assert_states_close, assert_states_equal, build, config_of, frozen, run, token_ids
from test_generation import CONFIG, PROMPTS, check_state, interrupt_after, letters
from test_generation import test_any_prefill_chunk_gives_the_same_tokens as test_any_prefill_chunk
from test_generation import test_continuing_from_a_state_is_one_long_run as test_continuing_from_a_state
from test_generation import test_each_row_ends_by_itself as test_each_row_ends
from test_generation import test_every_form_of_a_prompt as test_prompts
from test_generation import test_greedy_tokens_are_those_of_whole_forward_calls as test_greedy_tokens
from test_generation import test_sampled_tokens_are_those_of_brute_force as test_sampled_tokens
from test_generation import test_stop_strings as test_stopping
from test_generation import test_streamed_events_add_up as test_events
from test_generation import test_the_state_has_read_the_prompt_and_every_token as test_states
from test_generation import test_the_state_of_rows_that_end_early as test_states_of_rows_that_end_early

from mambax import get_backend

torch = pytest.importorskip("torch")
graph = pytest.importorskip("mambax_torch.graph")
GPU = torch.cuda.is_available()
torch_backend = get_backend("torch")

__all__ = [
    "test_any_prefill_chunk", "test_continuing_from_a_state", "test_each_row_ends", "test_events",
    "test_greedy_tokens", "test_prompts", "test_sampled_tokens", "test_states",
    "test_states_of_rows_that_end_early", "test_stopping",
]  # fmt: skip


@pytest.fixture
def nn() -> Any:
    return torch_backend


@pytest.fixture
def model(nn: Any, steps: list[Any]) -> Any:
    model = build(nn, CONFIG).to("cuda" if GPU else "cpu")
    model.tokenizer = Letters()
    return model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The steps that generations were given, from graphs where there is a GPU; none is in use at the end."""
    given: list[Any] = []
    make = partial(graph.stepper, capture=GPU)

    def recorded(*args: Any) -> Any:
        given.append(make(*args))
        return given[-1]

    monkeypatch.setattr(graph, "LEAST", 1)
    monkeypatch.setattr(torch_backend, "stepper", recorded)
    yield given
    assert given
    assert not any(made is not None and made.busy for made in given)


def ordinary(model: Any, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Any:
    """What a generation gives without prepared steps."""
    with monkeypatch.context() as without:
        without.setattr(torch_backend, "stepper", lambda *given: None)
        return model.generate(*args, **options)


# --- how a generation ends -----------------------------------------------------------------------------------


def test_nothing_is_prepared_for_one_token_or_before_the_first_is_asked_for(model, steps):
    assert len(model.generate(PROMPTS, max_new_tokens=1, eos=())[0].tokens) == 1
    assert steps == [None]
    stream = model.generate_streaming(PROMPTS, max_new_tokens=5)
    stream.close()
    del stream
    assert steps == [None]


def test_a_stream_that_is_closed_or_dropped_gives_its_steps_back(model, steps):
    for _ in range(2):
        stream = model.generate_streaming(PROMPTS, max_new_tokens=10**9, eos=())
        events = [next(stream) for _ in range(5)]
        assert steps[-1].busy
        assert [event.row for event in events] == [0, 1, 2, 0, 1]
        stream.close()
        assert not steps[-1].busy
    stream = model.generate_streaming(PROMPTS, max_new_tokens=10**9, eos=())
    next(stream)
    del stream
    gc.collect()
    assert not steps[-1].busy
    assert steps[0] is steps[1] is steps[2]
    assert not steps[0]._weights


def test_ctrl_c_ends_with_what_was_produced(model, monkeypatch):
    whole = ordinary(model, monkeypatch, PROMPTS, max_new_tokens=30, eos=())
    for method in ("read", "advance"):  # before the tokens come, and before the next step is launched
        with monkeypatch.context() as interrupted:
            interrupted.setattr(graph.StepGraph, method, interrupt_after(6, getattr(graph.StepGraph, method)))
            rows = model.generate(PROMPTS, max_new_tokens=30, eos=())
        for row, full, prompt in zip(rows, whole, PROMPTS, strict=True):
            assert row.finish_reason == "interrupted"
            assert row.tokens == full.tokens[:6]
            assert row.text == letters(row.tokens)
            check_state(model, row, prompt)


def interrupted_once(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but Ctrl-C arrives at the end of the call after so many."""
    count = itertools.count()

    def interrupted(*args: Any) -> Any:
        result = function(*args)
        if next(count) == calls:
            raise KeyboardInterrupt
        return result

    return interrupted


def test_ctrl_c_in_the_middle_of_a_step(model, monkeypatch):
    """It may come between any two operations; the state that is left is the one before the step."""
    whole = ordinary(model, monkeypatch, PROMPTS, max_new_tokens=30, eos=())
    for method in ("_send_tokens", "_own_memory", "_view"):
        with monkeypatch.context() as interrupted:
            interrupted.setattr(graph.StepGraph, method, interrupted_once(9, getattr(graph.StepGraph, method)))
            rows = model.generate(PROMPTS, max_new_tokens=30, eos=())
        for row, full, prompt in zip(rows, whole, PROMPTS, strict=True):
            assert row.finish_reason == "interrupted"
            assert 0 < len(row.tokens) < 30
            assert row.tokens == full.tokens[: len(row.tokens)]
            check_state(model, row, prompt)


def test_ctrl_c_while_the_steps_are_made(model, monkeypatch):
    with monkeypatch.context() as interrupted:
        interrupted.setattr(graph, "layout_of", interrupt_after(0, graph.layout_of))
        rows = model.generate(PROMPTS, max_new_tokens=30, eos=())
    assert [row.tokens for row in rows] == [[], [], []]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        check_state(model, row, prompt)
    assert len(model.generate(PROMPTS, max_new_tokens=2, eos=())) == 3


def test_weights_that_are_not_finite_name_the_row_and_the_tokens(model, monkeypatch, steps):
    advance, count = graph.StepGraph.advance, iter(range(100))

    def spoiled(self: Any, uniform: Any) -> Any:
        if next(count) == 3:
            self._states[self._now].layers[0].ssm[1] = float("nan")
        return advance(self, uniform)

    monkeypatch.setattr(graph.StepGraph, "advance", spoiled)
    with pytest.raises(FloatingPointError, match="row 1 are not finite after 4 tokens"):
        model.generate(PROMPTS, max_new_tokens=30, eos=())
    assert not steps[-1].busy


def test_an_error_in_the_callers_loop(model, steps):
    def consume() -> None:
        for event in model.generate_streaming(PROMPTS, max_new_tokens=9, eos=()):
            assert event.row == 0

    with pytest.raises(AssertionError):
        consume()
    gc.collect()
    assert not steps[-1].busy


# --- states --------------------------------------------------------------------------------------------------


def test_nothing_is_copied_while_it_decodes(model, monkeypatch):
    """A state that nobody holds is written over; the last is copied where its Generation may ask for it."""
    copied: list[Any] = []
    copy = graph._copy
    monkeypatch.setattr(graph, "_copy", lambda state: (copied.append(state), copy(state))[1])
    whole = model.generate(PROMPTS, max_new_tokens=20, eos=())
    assert len(copied) == 2 + 1  # the two sets of buffers, and the last state
    copied.clear()
    ends = [row.tokens[at] for row, at in zip(whole, (3, 8, 15), strict=True)]
    rows = model.generate(PROMPTS, max_new_tokens=20, eos=ends)
    assert all(row.finish_reason == "eos" for row in rows)
    assert copied == []


def test_states_outlive_later_generations_and_the_model():
    model = build(torch_backend, CONFIG).to("cuda" if GPU else "cpu")
    make = partial(graph.stepper, capture=GPU)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(graph, "LEAST", 1)
        patched.setattr(torch_backend, "stepper", make)
        early = model.generate(PROMPTS, max_new_tokens=9, eos=())  # whose states are computed when asked for
        first = early[0].state
        kept = frozen(first)
        for _ in range(3):
            model.generate(PROMPTS, max_new_tokens=7, eos=(), temperature=1.0, seed=5)
    assert_states_equal(first, kept)
    for row, prompt in zip(early, PROMPTS, strict=True):
        assert_states_close(row.state, run(model, [prompt + row.tokens])[1])
    (*_, held) = graph._idle[model]
    gone, model_gone = weakref.ref(held), weakref.ref(model)
    del held, model, early, row
    gc.collect()
    assert gone() is None  # with its graphs and their memory
    assert model_gone() is None
    assert_states_equal(first, kept)


# --- several at a time ---------------------------------------------------------------------------------------


def test_two_streams_in_turn(model, monkeypatch, steps):
    options: dict[str, Any] = {"max_new_tokens": 15, "eos": ()}
    seeds = (1, 2)
    want = [ordinary(model, monkeypatch, PROMPTS, temperature=1.0, seed=s, **options) for s in seeds]
    streams = [model.generate_streaming(PROMPTS, temperature=1.0, seed=s, **options) for s in seeds]
    tokens: list[list[list[int]]] = [[[], [], []], [[], [], []]]
    for events in zip(*streams, strict=True):
        for number, event in enumerate(events):
            tokens[number][event.row].append(event.token)
    assert tokens == [[row.tokens for row in rows] for rows in want]
    assert steps[0] is not steps[1]


def test_many_threads(model, monkeypatch):
    options: dict[str, Any] = {"max_new_tokens": 15, "eos": (), "temperature": 1.0}
    want = [ordinary(model, monkeypatch, PROMPTS, seed=s, **options) for s in range(4)]
    got: dict[int, Any] = {}

    def work(seed: int) -> None:
        for _ in range(2):
            got[seed] = model.generate(PROMPTS, seed=seed, **options)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, rows in enumerate(want):
        assert [row.tokens for row in got[seed]] == [row.tokens for row in rows]
        assert_states_close(got[seed][2].state, rows[2].state)


def test_a_stream_read_by_several_threads(model, monkeypatch):
    options: dict[str, Any] = {"max_new_tokens": 9, "eos": ()}
    want = ordinary(model, monkeypatch, PROMPTS[0], **options)
    stream, tokens = model.generate_streaming(PROMPTS[0], **options), []
    for _ in range(9):
        thread = threading.Thread(target=lambda: tokens.append(next(stream).token))
        thread.start()
        thread.join()
    assert tokens == want.tokens
    assert next(stream, None) is None


# --- what callers do around it -------------------------------------------------------------------------------


def test_inference_mode_and_back(model, monkeypatch):
    options: dict[str, Any] = {"max_new_tokens": 9, "eos": (), "repetition_penalty": 1.4}
    want = ordinary(model, monkeypatch, PROMPTS, **options)
    with torch.inference_mode():
        inside = model.generate(PROMPTS, **options)
        states = [row.state for row in inside]
    outside = model.generate(PROMPTS, **options)
    for rows in (inside, outside):
        assert [row.tokens for row in rows] == [row.tokens for row in want]
    for state, row in zip(states, want, strict=True):
        assert_states_close(state, row.state)
    more = model.generate([1, 2], max_new_tokens=3, eos=(), state=states[0])
    assert more.tokens == ordinary(model, monkeypatch, [1, 2], max_new_tokens=3, eos=(), state=want[0].state).tokens


def test_defaults_of_another_dtype_and_device(model, monkeypatch):
    options: dict[str, Any] = {"max_new_tokens": 9, "eos": (), "temperature": 1.0, "seed": 1}
    want = ordinary(model, monkeypatch, PROMPTS, **options)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            made = graph.StepGraph(model, graph.SamplingParams(), model.init_state(2), capture=False)
        for buffer in (made._uniform, *made._host_uniforms):
            assert (buffer.dtype, buffer.device.type == "meta") == (torch.float32, False)
        got = model.generate(PROMPTS, **options)
    finally:
        torch.set_default_dtype(before)
    assert [row.tokens for row in got] == [row.tokens for row in want]


def test_a_generation_goes_on_with_the_weights_it_began_with(model, monkeypatch, steps):
    """Whatever becomes of the model: memory that is freed must not be read."""
    want = ordinary(model, monkeypatch, PROMPTS[0], max_new_tokens=9, eos=()).tokens
    stream = model.generate_streaming(PROMPTS[0], max_new_tokens=9, eos=())
    tokens = [next(stream).token for _ in range(3)]
    held = [weight.untyped_storage().data_ptr() for weight in steps[-1]._weights]
    assert held == [weight.untyped_storage().data_ptr() for weight in graph.tensors_of(model)]
    for parameter in model.parameters():
        parameter.data = parameter.data + 1  # as .to() does; what was there is freed if nobody holds it
    assert held == [weight.untyped_storage().data_ptr() for weight in steps[-1]._weights]
    stream.close()
    assert tokens == want[:3]
    assert not steps[-1]._weights


def test_weights_changed_in_place_are_read_anew(model, monkeypatch, steps):
    options: dict[str, Any] = {"max_new_tokens": 9, "eos": ()}
    model.generate(PROMPTS, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    got = model.generate(PROMPTS, **options)
    want = ordinary(model, monkeypatch, PROMPTS, **options)
    assert [row.tokens for row in got] == [row.tokens for row in want]
    assert steps[0] is steps[1]


def test_other_prompts_and_batches(model, monkeypatch, steps):
    options: dict[str, Any] = {"max_new_tokens": 6, "eos": ()}
    for batch in (1, 2, 5, 1, 2):
        prompts = [token_ids(1, 2 + i, seed=i)[0] for i in range(batch)]
        got = model.generate(prompts, **options)
        want = ordinary(model, monkeypatch, prompts, **options)
        assert [row.tokens for row in got] == [row.tokens for row in want]
    assert len(graph._idle[model]) == graph.KEPT


def test_a_model_of_one_block(monkeypatch, steps):
    model = build(torch_backend, config_of(n_layer=1)).to("cuda" if GPU else "cpu")
    got = model.generate(np.array([5]), max_new_tokens=7, eos=())
    assert got.tokens == ordinary(model, monkeypatch, [5], max_new_tokens=7, eos=()).tokens
