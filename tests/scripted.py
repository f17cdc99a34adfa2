"""A stand-in for a language model that says what it is told to, and whose state is the tokens that it has read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mambax import Generation, StreamEvent, Tokenizer


class ScriptedState(tuple):
    """Tokens, that can be saved."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self))


class ScriptedModel:
    """Answers from a list, each ended by the end-of-text token unless it is given as token ids."""

    def __init__(self, tokenizer: Tokenizer | None, answers: Sequence[str | list[int]], end: str = "") -> None:
        self.tokenizer = tokenizer
        self.config = SimpleNamespace(eos_token_ids=(), vocab_size=1000)
        self.answers = list(answers)
        self.end = end
        self.read: list[list[int]] = []  # what each call was given
        self.options: list[dict[str, Any]] = []

    def load_state(self, path: Path) -> ScriptedState:
        return ScriptedState(json.loads(path.read_text()))

    def generate_streaming(
        self, prompt: list[int], *, state: Any, eos: Any, **options: Any
    ) -> Iterator[StreamEvent]:
        if not prompt or options.get("top_k", 0) < 0:
            raise ValueError("refused")
        self.read.append(prompt)
        self.options.append({"eos": eos, **options})
        answer = self.answers.pop(0)
        if isinstance(answer, str):
            answer = self.tokenizer.encode(answer + self.end, add_special_tokens=False)
        return self._run(prompt, state or (), answer, eos)

    def _run(self, prompt: list[int], state: Any, tokens: list[int], eos: Any) -> Iterator[StreamEvent]:
        stream, text, said = self.tokenizer.stream(continues=True), "", []
        try:
            for token in tokens:
                said.append(token)
                last = token in eos or len(said) == len(tokens)
                part = "" if token in eos else stream.add(token)
                part += stream.finish() if last else ""
                text += part
                reason = "eos" if token in eos else "length"
                done = (
                    Generation(text, said, reason, lambda: ScriptedState([*state, *prompt, *said]))
                    if last
                    else None
                )
                yield StreamEvent(0, token, part, done)
        except KeyboardInterrupt:
            done = Generation(text, said, "interrupted", lambda: ScriptedState([*state, *prompt, *said]))
            yield StreamEvent(0, None, "", done)
