"""generate and generate_streaming: which tokens, what ends a row, what its state is, and what Ctrl-C leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from harness import Letters, assert_states_close, build, config_of, letters, run, state_arrays, token_ids
from test_sampling import brute_force

from mambax.sampling import UniformSource

CONFIG = config_of(n_layer=2)
PROMPTS = [token_ids(1, length)[0].tolist() for length in (9, 1, 30)]


@pytest.fixture
def model(nn: Any) -> Any:
    model = build(nn, CONFIG)
    model.tokenizer = Letters()
    return model


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by whole forward calls, without any state."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(run(model, [ids])[0][0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_are_those_of_whole_forward_calls(model):
    want = [greedy(model, prompt, 30) for prompt in PROMPTS]
    assert [row.tokens for row in model.generate(PROMPTS, max_new_tokens=30, eos=())] == want
    for prompt, tokens in zip(PROMPTS, want, strict=True):
        one = model.generate(prompt, max_new_tokens=30, eos=())
        assert (one.tokens, one.finish_reason, one.text) == (tokens, "length", letters(tokens))
        assert str(one) == one.text


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "repetition_penalty": 1.8},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
    ids=["plain", "penalty", "every filter"],
)
def test_sampled_tokens_are_those_of_brute_force(model, options):
    """The penalty sees the prompt and what was generated; each row has its own numbers; no step is off by one."""
    want, uniform = [list(prompt) for prompt in PROMPTS], UniformSource(4, 3)
    for _ in range(25):
        numbers = uniform.draw()[:, 0]
        for ids, number in zip(want, numbers, strict=True):
            seen = np.isin(np.arange(101), ids)
            cumulative = np.cumsum(brute_force(run(model, [ids])[0][0, -1], seen, **options))
            ids.append(int(np.argmax(cumulative > number * (1 - 2**-20))))
    rows = model.generate(PROMPTS, max_new_tokens=25, eos=(), seed=4, **options)
    assert [prompt + row.tokens for prompt, row in zip(PROMPTS, rows, strict=True)] == want


def test_a_greedy_repetition_penalty(model):
    row = model.generate([1, 2, 3], max_new_tokens=60, eos=(), repetition_penalty=1000.0)
    assert len({1, 2, 3, *row.tokens}) > 40  # a token comes again only where all logits left are negative


def test_generated_text_carries_on_a_text(model):
    """A detokeniser must not take the first token for the start of a text, which has no space in front."""
    model.generate(["abc", "d"], max_new_tokens=1)
    assert model.tokenizer.asked == [True, True]


def test_every_form_of_a_prompt(model):
    want = model.generate([10, 11, 12], max_new_tokens=4).tokens
    for prompt in ("abc", np.array([10, 11, 12]), (10, 11, 12), np.array([10, 11, 12], np.uint8)):
        assert model.generate(prompt, max_new_tokens=4).tokens == want
    mixed = model.generate(["abc", [10, 11, 12], np.array([10, 11, 12])], max_new_tokens=4)
    assert [row.tokens for row in mixed] == [want] * 3
    square = model.generate(np.array([[10, 11, 12], [10, 11, 12]]), max_new_tokens=4)
    assert [row.tokens for row in square] == [want] * 2
    assert len(model.generate(["abc"], max_new_tokens=1)) == 1


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "sampled"])
def test_any_prefill_chunk_gives_the_same_tokens(model, options):
    results = [
        [row.tokens for row in model.generate(PROMPTS, max_new_tokens=20, prefill_chunk=chunk, **options)]
        for chunk in (512, 1, 7, 30, 29)
    ]
    assert all(result == results[0] for result in results)


def test_progress_of_the_prefill(model):
    calls = []
    model.generate(PROMPTS, max_new_tokens=2, prefill_chunk=7, progress=lambda *call: calls.append(call))
    assert calls == [(7, 30), (14, 30), (21, 30), (28, 30), (30, 30)]


# --- what ends a row ---------------------------------------------------------------------------------------------


def test_each_row_ends_by_itself(model):
    whole = [row.tokens for row in model.generate(PROMPTS, max_new_tokens=40, eos=())]
    end = whole[0][5]
    want = [row[: row.index(end) + 1] if end in row else row for row in whole]
    assert len({len(row) for row in want}) > 1
    rows = model.generate(PROMPTS, max_new_tokens=40, eos=end)
    assert [row.tokens for row in rows] == want
    for row, tokens in zip(rows, want, strict=True):
        assert row.finish_reason == ("eos" if tokens[-1] == end else "length")
        assert row.text == letters(tokens[:-1] if tokens[-1] == end else tokens)
    assert [row.tokens for row in model.generate(PROMPTS, max_new_tokens=40, eos=[end, 3])] == [
        next((row[: i + 1] for i, token in enumerate(row) if token in (end, 3)), row) for row in whole
    ]


def test_where_the_end_of_text_token_comes_from(nn):
    def reason(config_eos: Any, tokenizer_eos: Any, eos: Any) -> str:
        model = build(nn, config_of(n_layer=2, eos_token_id=config_eos))
        if tokenizer_eos is not None:
            model.tokenizer = Letters()
            model.tokenizer.eos_token_ids = tokenizer_eos
        return model.generate(PROMPTS[0], max_new_tokens=10, eos=eos).finish_reason

    token = greedy(build(nn, CONFIG), PROMPTS[0], 4)[3]
    assert reason(token, None, None) == "eos"
    assert reason((token,), (99,), None) == "eos"
    assert reason(None, (token,), None) == "eos"
    assert reason(None, None, token) == "eos"
    assert reason(None, None, np.int64(token)) == "eos"
    assert reason(token, (token,), ()) == "length"
    assert reason(None, None, None) == "length"


def test_stop_strings(model):
    whole = model.generate(PROMPTS[0], max_new_tokens=40, eos=())
    for start, size in ((0, 1), (4, 1), (4, 2), (3, 5), (10, 3)):
        stop = whole.text[start : start + size]
        row = model.generate(PROMPTS[0], max_new_tokens=40, eos=(), stop=stop)
        assert row.finish_reason == "stop"
        assert row.text == whole.text[: whole.text.index(stop)]
        assert row.tokens == whole.tokens[: len(row.tokens)]
        assert stop not in letters(row.tokens[:-1])
    first, second = whole.text[12:14], whole.text[5:7]
    row = model.generate(PROMPTS[0], max_new_tokens=40, eos=(), stop=[first, second, "never"])
    assert row.text == whole.text[: min(whole.text.index(first), whole.text.index(second))]
    never = model.generate(PROMPTS[0], max_new_tokens=40, eos=(), stop=["!", whole.text[-1] + "!"])
    assert (never.text, never.finish_reason) == (whole.text, "length")


def test_a_stop_string_ends_one_row_and_not_the_others(model):
    whole = model.generate(PROMPTS, max_new_tokens=30, eos=())
    stop = whole[0].text[6:9]
    rows = model.generate(PROMPTS, max_new_tokens=30, eos=(), stop=stop)
    for row, full in zip(rows, whole, strict=True):
        assert row.text == full.text.partition(stop)[0]
        assert row.finish_reason == ("stop" if stop in full.text else "length")


def test_streamed_events_add_up(model):
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 3, "stop": ["ab", "q"], "eos": (100, 99)}
    rows = model.generate(PROMPTS, **options)
    events = list(model.generate_streaming(PROMPTS, **options))
    for number, row in enumerate(rows):
        own = [event for event in events if event.row == number]
        assert "".join(event.text for event in own) == row.text
        assert [event.token for event in own] == row.tokens
        assert [event.generation is None for event in own] == [True] * (len(own) - 1) + [False]
        assert own[-1].generation == row
        assert "".join(map(str, own)) == row.text


def test_events_come_as_they_are_made(model):
    """The first token is there before the last one is computed."""
    stream = model.generate_streaming(PROMPTS[0], max_new_tokens=10**9)
    assert [next(stream).token for _ in range(3)] == greedy(model, PROMPTS[0], 3)
    stream.close()


# --- the state of a row ------------------------------------------------------------------------------------------


def check_state(model: Any, row: Any, prompt: list[int]) -> None:
    """It has read the prompt and every token of the row, no more, no less."""
    assert_states_close(row.state, run(model, [list(prompt) + row.tokens])[1])


@pytest.mark.parametrize("count", [1, 2, 12])
def test_the_state_has_read_the_prompt_and_every_token(model, count):
    for row, prompt in zip(model.generate(PROMPTS, max_new_tokens=count, eos=()), PROMPTS, strict=True):
        check_state(model, row, prompt)


def test_the_state_of_rows_that_end_early(model):
    whole = model.generate(PROMPTS, max_new_tokens=20, eos=())
    ends = [whole[0].tokens[3], whole[1].tokens[8]]
    rows = model.generate(PROMPTS, max_new_tokens=20, eos=ends)
    assert len({len(row.tokens) for row in rows}) > 1
    for row, prompt in zip(rows, PROMPTS, strict=True):
        check_state(model, row, prompt)
    stopped = model.generate(PROMPTS[0], max_new_tokens=20, eos=(), stop=whole[0].text[4:6])
    assert stopped.finish_reason == "stop"
    check_state(model, stopped, PROMPTS[0])


def test_continuing_from_a_state_is_one_long_run(model):
    first = model.generate(PROMPTS, max_new_tokens=15, eos=())
    more = [[5, 6], [7], [8, 9, 10, 11]]
    want = [
        model.generate(p + row.tokens + q, max_new_tokens=25, eos=()).tokens
        for p, row, q in zip(PROMPTS, first, more, strict=True)
    ]
    for row, q, tokens in zip(first, more, want, strict=True):
        kept = {name: array.copy() for name, array in state_arrays(row.state).items()}
        for _ in range(2):  # the state is a value: using it once does not use it up
            assert model.generate(q, max_new_tokens=25, eos=(), state=row.state).tokens == tokens
        for name, array in state_arrays(row.state).items():
            np.testing.assert_array_equal(array, kept[name])
    batch = run(model, [[1, 2, 3]] * 3)[1]
    rows = model.generate(more, max_new_tokens=10, eos=(), state=batch)
    assert [r.tokens for r in rows] == [
        model.generate([1, 2, 3, *q], max_new_tokens=10, eos=()).tokens for q in more
    ]


# --- interruption ------------------------------------------------------------------------------------------------


def interrupt_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but Ctrl-C arrives in the call after so many."""
    count = iter(range(calls))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted


def test_ctrl_c_while_decoding_ends_with_what_was_produced(model, monkeypatch):
    whole = model.generate(PROMPTS, max_new_tokens=30, eos=())
    monkeypatch.setattr(model.nn, "to_numpy", interrupt_after(6, model.nn.to_numpy))
    rows = model.generate(PROMPTS, max_new_tokens=30, eos=())
    monkeypatch.undo()
    for row, full, prompt in zip(rows, whole, PROMPTS, strict=True):
        assert row.finish_reason == "interrupted"
        assert row.tokens == full.tokens[:6]
        assert row.text == letters(row.tokens)
        check_state(model, row, prompt)
        rest = model.generate([full.tokens[6]], max_new_tokens=5, eos=(), state=row.state).tokens
        assert rest == full.tokens[7:12]


def test_ctrl_c_keeps_the_rows_that_had_ended(model, monkeypatch):
    end = model.generate(PROMPTS[0], max_new_tokens=30, eos=()).tokens[2]
    monkeypatch.setattr(model.nn, "to_numpy", interrupt_after(5, model.nn.to_numpy))
    rows = model.generate(PROMPTS, max_new_tokens=30, eos=end)
    monkeypatch.undo()
    assert rows[0].finish_reason == "eos"
    assert {row.finish_reason for row in rows[1:]} <= {"eos", "interrupted"}
    for row, prompt in zip(rows, PROMPTS, strict=True):
        check_state(model, row, prompt)


@pytest.mark.parametrize("calls", [0, 2])
def test_ctrl_c_while_reading_the_prompt_gives_back_the_state_before_it(model, calls):
    _, before = run(model, [[1, 2], [3, 4], [5, 6]])
    progress = interrupt_after(calls, lambda done, length: None)
    rows = model.generate(PROMPTS, max_new_tokens=5, prefill_chunk=7, progress=progress, state=before)
    for number, row in enumerate(rows):
        assert (row.tokens, row.text, row.finish_reason) == ([], "", "interrupted")
        assert_states_close(row.state, before.select(number))


def test_a_stream_that_is_left_early_leaves_the_model_as_it_was(model):
    """As when Ctrl-C arrives in the caller's own loop."""
    stream = model.generate_streaming(PROMPTS[0], max_new_tokens=10**9)
    for _ in range(3):
        next(stream)
    stream.close()
    assert next(stream, None) is None
    assert model.generate(PROMPTS[0], max_new_tokens=3).tokens == greedy(model, PROMPTS[0], 3)
