"""What generate refuses before anything runs, logits that are not finite, and the memory of long prompts."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from harness import BACKENDS, Letters, backend_params, build, config_of

from mambax import get_backend

CONFIG = config_of(n_layer=2)


@pytest.fixture
def model(nn: Any) -> Any:
    model = build(nn, CONFIG)
    model.tokenizer = Letters()
    return model


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "empty"),
    ("", {}, "prompt 0 is empty"),
    ([[1], []], {}, "prompt 1 is empty"),
    ([[1], [[2]]], {}, "prompt 1 is empty or not a flat list"),
    ([1, 101], {}, "token id 101, outside the vocabulary of 101"),
    ([[1], [-1]], {}, "prompt 1 has token id -1, outside the vocabulary"),
    ([[1.5, 2.5]], {}, "float64 values; expected text or whole token ids"),
    ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ([1], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    ([1], {"max_new_tokens": True}, "max_new_tokens is True"),
    ([1], {"prefill_chunk": 0}, "prefill_chunk is 0"),
    ([1], {"temperature": -1}, "temperature is -1"),
    ([1], {"top_p": 2}, "top_p is 2"),
    ([1], {"stop": [""]}, "stop is"),
    ([1], {"stop": [3]}, "stop is"),
    ([1], {"seed": -1}, "seed is -1"),
    ([1], {"seed": 1.5}, "seed is 1.5"),
    ([1], {"seed": "lucky"}, "seed is 'lucky'"),
    ([1], {"eos": 101}, "eos is 101"),
    ([1], {"eos": [1, -1]}, r"eos is \[1, -1\]"),
    ([1], {"eos": "</s>"}, "eos is '</s>'"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), REFUSED)
def test_bad_input_is_refused_before_anything_runs(model, monkeypatch, prompt, options, message):
    def forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(model.backbone), "forward", forward)
    with pytest.raises(ValueError, match=message):
        model.generate_streaming(prompt, **options)
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **options)


def test_a_state_that_does_not_fit_is_refused_at_the_call(model):
    with pytest.raises(ValueError, match=r"2 row\(s\) for 1 prompt"):
        model.generate_streaming([1], state=model.init_state(2))
    other = model.nn.MambaForCausalLM(config_of(n_layer=3)).init_state(1)
    with pytest.raises(ValueError, match=r"state: .*this model and input need"):
        model.generate_streaming([1], state=other)


def test_a_state_of_another_backend_is_refused():
    for one, two in pairwise((*BACKENDS, BACKENDS[0])):
        ours, theirs = (build(get_backend(name), CONFIG) for name in (one, two))
        with pytest.raises(ValueError, match=rf"state of the '{two}' backend.*'{one}'"):
            ours.generate([1], state=theirs.init_state(1))


def test_unknown_options_are_refused(model):
    with pytest.raises(TypeError, match="temprature"):
        model.generate([1], temprature=1.0)


def test_text_needs_a_tokenizer(nn):
    model = build(nn, CONFIG)
    for prompt, options in (("abc", {}), ([1], {"stop": "a"})):
        with pytest.raises(ValueError, match="tokenizer"):
            model.generate(prompt, **options)
    assert model.generate([1], max_new_tokens=3).text == ""


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word on the planted NaN
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_raise_with_the_row(model, temperature):
    table = np.array(model.nn.to_numpy(model.nn.parameters(model)["backbone.embeddings.weight"]))
    table[77] = np.nan
    model.nn.set_parameters(model, {"backbone.embeddings.weight": model.nn.from_numpy(table)})
    with pytest.raises(FloatingPointError, match="row 1 are not finite after 0 tokens"):
        model.generate([[1, 2], [77, 3]], temperature=temperature)
    assert model.generate([[1, 2]], max_new_tokens=1)[0].tokens


# --- memory ------------------------------------------------------------------------------------------------------


def peak_of_a_prompt(length: int, chunk: int = 512) -> int:
    """Peak bytes that Python and NumPy allocate while a prompt is read, without the prompt itself."""
    model = build(get_backend("numpy"), config_of(d_model=8, n_layer=2, d_state=4, d_conv=4, dt_rank=1))
    prompt = np.random.default_rng(0).integers(0, 101, length)
    model.generate(prompt[:600], max_new_tokens=1)
    tracemalloc.start()
    try:
        assert len(model.generate(prompt, max_new_tokens=2, prefill_chunk=chunk).tokens) == 2
        return tracemalloc.get_traced_memory()[1] - 3 * prompt.nbytes  # ids, their copy, padded ids and mask
    finally:
        tracemalloc.stop()


def test_memory_of_a_prompt_is_bounded_by_the_chunk():
    short, long = peak_of_a_prompt(1_000), peak_of_a_prompt(5_000)
    assert long < 1.5 * short
    assert peak_of_a_prompt(5_000, chunk=5_000) > 3 * long


@pytest.mark.slow
def test_memory_of_a_prompt_of_100_000_tokens():
    assert peak_of_a_prompt(100_000) < 1.5 * peak_of_a_prompt(1_000)


@pytest.mark.parametrize("backend", backend_params(("mlx",)))
def test_memory_of_a_prompt_on_mlx_is_bounded_by_the_chunk(backend):
    import mlx.core as mx

    model = build(get_backend(backend), config_of(d_model=8, n_layer=2, d_state=4, dt_rank=1))
    prompt = np.random.default_rng(0).integers(0, 101, 5_000)
    model.generate(prompt[:600], max_new_tokens=1)

    def peak(length: int, chunk: int) -> int:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model.generate(prompt[:length], max_new_tokens=1, prefill_chunk=chunk)
        return mx.get_peak_memory() - before

    assert peak(5_000, 200) < 1.3 * peak(1_000, 200)
    assert peak(5_000, 5_000) > 3 * peak(5_000, 200)


@pytest.mark.parametrize("backend", backend_params(("torch", "mlx")))
def test_a_prompt_of_5000_tokens(backend):
    model = build(get_backend(backend), config_of(d_model=8, n_layer=1, d_state=4, dt_rank=1))
    prompt = np.random.default_rng(0).integers(0, 101, 5_000)
    row = model.generate(prompt, max_new_tokens=2)
    assert row.state.get_cache_info().tokens_seen == (5_002,)
    assert row.state.get_cache_info().bytes == model.init_state().get_cache_info().bytes
