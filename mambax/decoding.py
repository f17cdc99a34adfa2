"""The device side of text generation: prefill in chunks, and the step from one token to the next.

Dimensions: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mambax.backend import Array, Backend, Stepper
from mambax.sampling import SamplingParams, UniformSource, sample
from mambax.state import InferenceParams

Progress = Callable[[int, int], None]
"""Called with (prompt positions read, prompt positions) after each chunk of the prefill."""


def stepper(model: Any, params: SamplingParams, state: InferenceParams, steps: int) -> None:
    """See :meth:`mambax.backend.Backend.stepper`, for backends that compute each step as it comes."""


class Decoder:
    """The state of a generation, the tokens it has not read yet, and the step between.

    A finished row is stepped along with the others; what becomes of it is not looked at again.

    Args:
        model: a causal language model.
        prompts: token ids of each row, (L,) int64, not empty.
        params: how to choose tokens.
        uniforms: the randomness.
        state: what the rows have read before, or None.
    """

    def __init__(
        self,
        model: Any,
        prompts: list[np.ndarray],
        params: SamplingParams,
        uniforms: UniformSource,
        state: InferenceParams | None,
    ) -> None:
        self.model = model
        self.nn: Backend = model.nn
        self.params = params
        self.uniforms = uniforms
        self.state: Any = model.init_state(len(prompts)) if state is None else state.fork()  # None at the end
        self.tokens: Array = None  # (B,) sampled, not yet read by the state
        self._like = self.state.tokens_seen
        self._prompts = prompts
        self._stepper: Stepper | None = None
        self._seen: Array | None = None  # (B, V) what the repetition penalty applies to
        if params.repetition_penalty != 1.0:
            seen = np.zeros((len(prompts), model.config.vocab_size), bool)
            for row, ids in enumerate(prompts):
                seen[row, ids] = True
            self._seen = self.nn.from_numpy(seen, like=self._like)

    def prefill(self, chunk: int, progress: Progress | None) -> None:
        """Read the prompts, padded on the left to one length, and sample the first tokens."""
        length = max(len(ids) for ids in self._prompts)
        padded = np.zeros((len(self._prompts), length), np.int64)
        mask = np.zeros(padded.shape, bool)
        for row, ids in enumerate(self._prompts):
            padded[row, length - len(ids) :] = ids
            mask[row, length - len(ids) :] = True
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            part_mask = None if mask[:, part].all() else mask[:, part]
            with self.nn.no_grad():
                output = self.model(padded[:, part], self.state, part_mask, logits_to_keep=1)
            self.state = output.state
            if start + chunk < length:
                self._evaluate(wait=True)
            else:
                self._sample(output.logits)
            if progress is not None:
                progress(min(start + chunk, length), length)

    def start(self, steps: int) -> None:
        """Make ready for so many steps, at most. Whoever calls this calls :meth:`end`, however the steps end."""
        self._stepper = self.nn.stepper(self.model, self.params, self.state, steps)
        if self._stepper is not None:
            self.tokens, self.state = self._stepper.begin(self.state, self.tokens, self._seen)

    def advance(self) -> None:
        """Let the state read the tokens, and sample the next ones. Does not wait."""
        if self._stepper is not None:
            self.tokens, self.state = self._stepper.advance(self.uniforms.draw())
            return
        output = self._read()
        self.state = output.state
        self._sample(output.logits)

    def read(self, tokens: Array) -> np.ndarray:
        """Tokens on the host, (B,): those of now or of the step before."""
        return self.nn.to_numpy(tokens) if self._stepper is None else self._stepper.read(tokens)

    def end(self, *, keep: bool) -> None:
        """Give back what :meth:`start` took. States that others hold remain as they are.

        Args:
            keep: whether :meth:`final_state` may be asked for yet; else this lets go of its own state.
        """
        if not keep:
            self.state = self._seen = None
        if self._stepper is not None:
            self.tokens, self._stepper = self._stepper.end(self.tokens), None

    def final_state(self) -> InferenceParams:
        """The state after the last tokens too."""
        return self._read().state

    def _read(self) -> Any:
        with self.nn.no_grad():
            ids = self.nn.maximum(self.tokens, 0)[:, None]
            return self.model(ids, self.state, logits_to_keep=1)

    def _sample(self, logits: Array) -> None:
        nn = self.nn
        with nn.no_grad():
            uniform = nn.from_numpy(self.uniforms.draw(), like=self._like)
            self.tokens = sample(nn, logits[:, -1], uniform, self.params, self._seen)
            if self._seen is not None:
                self._seen = self._seen | (nn.arange(logits.shape[2], like=logits) == self.tokens[:, None])
        self._evaluate(wait=False)

    def _evaluate(self, wait: bool) -> None:
        pending = [a for a in (self.tokens, self._seen) if a is not None]
        of_layers = (array for layer in self.state.layers for array in layer)
        self.nn.evaluate(*pending, self.state.tokens_seen, *of_layers, wait=wait)
