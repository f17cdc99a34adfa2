"""Text generation, written once: prefill in chunks, then decode one token ahead of the reader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from mambax.backend import Backend
from mambax.checkpoint.state_files import fits
from mambax.decoding import Decoder, Progress
from mambax.prompts import Prompt, is_single, on_host, token_ids
from mambax.sampling import SamplingParams, UniformSource
from mambax.state import InferenceParams
from mambax.stopping import StopText

if TYPE_CHECKING:
    from mambax.checkpoint.mapping import Mappings
    from mambax.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length", "interrupted"]
PREFILL_CHUNK = 512
"""Prompt tokens read at once by default; the memory of a prefill is bounded by this, not by the prompt."""


@dataclass(frozen=True)
class Generation:
    """One finished row.

    Attributes:
        text: what was generated, without the end-of-text token and the stop string; ``""`` without a tokenizer.
        tokens: the generated token ids, the end-of-text token included.
        finish_reason: ``"eos"``, ``"stop"`` (a stop string), ``"length"`` or ``"interrupted"`` (Ctrl-C).
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    _state: Callable[[], InferenceParams] = field(repr=False, compare=False)

    @property
    def state(self) -> InferenceParams:
        """The state (batch of 1) after the prompt and every token in ``tokens``; continue from it.

        Where Ctrl-C came before the whole prompt was read, the state before the prompt.
        """
        return self._state()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class StreamEvent:
    """One step of a row.

    Attributes:
        row: the row's number.
        token: the new token id, or None when the row ends without one.
        text: text that is now certain; may be empty, for half a character or the possible start of a stop string.
        generation: the finished row, at its last event; None before.
    """

    row: int
    token: int | None
    text: str
    generation: Generation | None = None

    def __str__(self) -> str:
        return self.text


class GenerationMixin:
    """``generate`` and ``generate_streaming`` for a causal language model."""

    nn: ClassVar[Backend]
    config: Any
    tokenizer: Tokenizer | None
    backbone: Any
    mappings: Mappings
    init_state: Callable[[int], InferenceParams]

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """Continue a prompt, or several at once.

        Args:
            prompt: a text, a sequence of token ids, or a list of either; rows may differ in length.
            max_new_tokens: at most this many tokens per row (default 128).
            temperature, top_k, top_p, min_p, repetition_penalty: see :class:`mambax.sampling.SamplingParams`;
                greedy by default. The penalty knows this prompt and what follows it, not what ``state`` has read.
            seed: the same seed gives the same tokens on every backend; None draws a fresh one.
            stop: a string or strings that end a row; they are not part of the text.
            eos: token id or ids that end a row; the model's own when None, none when ``()``.
            state: read the prompt after what this state has read; its batch is the number of prompts.
            prefill_chunk: prompt tokens read at once.
            progress: called with (positions read, positions) while the prompt is read.

        Returns:
            A :class:`Generation`, or a list of them for a list of prompts. After Ctrl-C, what was produced.

        Raises:
            ValueError: for an empty prompt, ids outside the vocabulary and options out of range; before
                anything runs.
            FloatingPointError: when the logits of a row are not finite.
        """
        prompt = on_host(self.nn, prompt)
        single = is_single(prompt)
        rows: dict[int, Generation] = {}
        for event in self.generate_streaming(prompt, **options):
            if event.generation is not None:
                rows[event.row] = event.generation
        return rows[0] if single else [rows[i] for i in range(len(rows))]

    def generate_streaming(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        eos: int | Sequence[int] | None = None,
        state: InferenceParams | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        progress: Progress | None = None,
    ) -> Iterator[StreamEvent]:
        """As :meth:`generate`, a :class:`StreamEvent` at a time; the last one of a row has its Generation.

        The arguments are checked when this is called, not at the first event.
        """
        self.mappings.check()
        prompt = on_host(self.nn, prompt)
        prompts = [prompt] if is_single(prompt) else [on_host(self.nn, row) for row in prompt]
        params = SamplingParams(repetition_penalty, temperature, top_k, top_p, min_p)
        stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
        for name, value, low in (("max_new_tokens", max_new_tokens, 1), ("prefill_chunk", prefill_chunk, 1)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least {low}")
        if not prompts:
            raise ValueError("generate: the list of prompts is empty; expected at least one prompt")
        if not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"stop is {stop!r}; expected a string or strings, none of them empty")
        if stops and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none; set model.tokenizer")
        if progress is not None and not callable(progress):
            raise ValueError(f"progress is {progress!r}; expected a function of (positions read, positions)")
        if state is not None and not isinstance(state, InferenceParams):
            raise ValueError(f"state: expected InferenceParams, found {type(state).__name__}; pass its .state")
        if state is not None and state.batch != len(prompts):
            raise ValueError(
                f"state holds {state.batch} row(s) for {len(prompts)} prompt(s); expected the same number "
                "(state.select repeats or picks rows)"
            )
        if state is not None:
            _check_state(state, self.init_state(len(prompts)))
        ends = self._eos_ids(eos)
        rows = [token_ids(p, self.tokenizer, self.config.vocab_size, i) for i, p in enumerate(prompts)]
        decoder = Decoder(self, rows, params, UniformSource(seed, len(rows), used=params.temperature > 0), state)
        collectors = [_Collector(self.tokenizer, stops, ends, int(max_new_tokens)) for _ in prompts]
        return _run(decoder, collectors, int(max_new_tokens), int(prefill_chunk), progress)

    def _eos_ids(self, eos: int | Sequence[int] | None) -> frozenset[int]:
        if eos is not None:
            ids = list(eos) if isinstance(eos, Iterable) else [eos]
            size = self.config.vocab_size
            for i in ids:
                if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not 0 <= i < size:
                    raise ValueError(f"eos is {eos!r}; expected token ids from 0 to {size - 1}, or () for none")
            return frozenset(int(i) for i in ids)
        own = self.config.eos_token_ids
        if not own and self.tokenizer is not None:
            own = self.tokenizer.eos_token_ids
        return frozenset(own)


def _check_state(state: InferenceParams, fresh: InferenceParams) -> None:
    """Refuse a state whose arrays are not shaped as those of a fresh one."""
    state.check(fresh.nn.name, len(fresh.layers), fresh.batch)
    found = {name: tuple(array.shape) for name, array in state.arrays().items()}
    for name, array in fresh.arrays().items():
        if not fits(found.get(name, ()), tuple(array.shape)):
            raise ValueError(
                f"state: {name} is {found.get(name)}, but this model and input need {tuple(array.shape)}; use the "
                "state of the same model"
            )


class _Collector:
    """What one row has produced, and whether it is finished."""

    def __init__(
        self, tokenizer: Tokenizer | None, stops: tuple[str, ...], eos: frozenset[int], limit: int
    ) -> None:
        self._detokenizer = None if tokenizer is None else tokenizer.stream(continues=True)
        self._stop = StopText(stops)
        self._eos = eos
        self._limit = limit
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None

    def add(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        self.tokens.append(token)
        if token in self._eos:
            return self.finish("eos")
        text = "" if self._detokenizer is None else self._detokenizer.add(token)
        text, stopped = self._stop.add(text)
        self.text += text
        if stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._limit:
            text += self.finish("length")
        return text

    def finish(self, reason: FinishReason) -> str:
        """End the row; return the text that was held back."""
        rest = "" if self._detokenizer is None else self._detokenizer.finish()
        rest, stopped = self._stop.add(rest)
        if not stopped:
            rest += self._stop.finish()
        self.text += rest
        self.finish_reason = "stop" if stopped else reason
        return rest

    def result(self, number: int, states: Callable[[], InferenceParams], *, keep: bool) -> Generation:
        """The finished row. ``keep`` holds on to the batch's state until the row's own is asked for."""
        assert self.finish_reason is not None
        own = cache(lambda: states().select(number))
        if not keep:
            own()
            del states
        return Generation(self.text, self.tokens, self.finish_reason, own)


def _run(
    decoder: Decoder,
    rows: list[_Collector],
    max_new_tokens: int,
    chunk: int,
    progress: Progress | None,
) -> Iterator[StreamEvent]:
    """Drive a generation. The step after a token is launched before that token is read."""
    everyone = range(len(rows))
    states = dict.fromkeys(everyone, _known(decoder.state))  # of a row that goes on: has read all it produced
    after: Callable[[], InferenceParams] | None = None
    lazy = False  # whether a Generation may ask the decoder for a state when this has ended
    try:
        decoder.prefill(chunk, progress)
        states = dict.fromkeys(everyone, _known(decoder.state))
        decoder.start(max_new_tokens - 1)
        for step in range(max_new_tokens):
            current = decoder.tokens
            active = [row.finish_reason is None for row in rows]
            last = step + 1 == max_new_tokens
            if last:
                after = cache(decoder.final_state)
            else:
                decoder.advance()
                after = _known(decoder.state)
            tokens = decoder.read(current)
            for number, row in enumerate(rows):
                if not active[number]:
                    continue
                token = int(tokens[number])
                if token < 0:
                    raise FloatingPointError(
                        f"the logits of row {number} are not finite after {len(row.tokens)} tokens; look for NaN "
                        "or infinity in the weights, or use a wider dtype"
                    )
                text = row.add(token)
                states[number], done = after, None
                if row.finish_reason is not None:
                    done = row.result(number, states.pop(number), keep=last)
                    lazy |= last
                yield StreamEvent(number, token, text, done)
            if all(row.finish_reason is not None for row in rows):
                return
    except KeyboardInterrupt:
        lazy = True
        for number, row in enumerate(rows):
            if row.finish_reason is None:
                text = row.finish("interrupted")
                yield StreamEvent(number, None, text, row.result(number, states[number], keep=True))
    finally:
        states, after = {}, None  # held no longer: what is held has to be copied
        decoder.end(keep=lazy)


def _known(state: InferenceParams) -> Callable[[], InferenceParams]:
    return lambda: state
