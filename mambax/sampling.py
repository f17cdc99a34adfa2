"""Choosing the next token, on the device, the same on every backend.

The randomness is one uniform number per row, drawn on the host; it becomes a token by the inverse of the
cumulative distribution in vocabulary order. So no backend needs a random-number generator, and a seed gives the
same text on all of them.

Dimensions: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from mambax.backend import Array, Ops
from mambax.init import check_seed
from mambax.scan import at_least_float32


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. Filters apply in the order of the fields, as in Hugging Face transformers.

    Args:
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or already
            generated (Keskar et al. 2019); 1 changes nothing.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens with at least this probability; 1 keeps all. Here and
            for ``top_k``, tokens as likely as the last one kept are kept too: ties do not depend on an order.
        min_p: keep tokens with at least this fraction of the probability of the most likely one; 0 keeps all.

    Raises:
        ValueError: naming the argument, the value and the allowed range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for field, low, high in (
            ("repetition_penalty", 1e-3, 1e3),
            ("temperature", 0.0, 1e3),
            ("top_k", 0, 2**31),
            ("top_p", 1e-9, 1.0),
            ("min_p", 0.0, 1.0),
        ):
            value = getattr(self, field)
            whole = field != "top_k" or isinstance(value, Integral)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not (number and whole and low <= float(value) <= high):
                kind = "a whole number" if field == "top_k" else "a number"
                raise ValueError(f"{field} is {value!r}; expected {kind} from {low:g} to {high:g}")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature is {self.temperature!r}; expected 0 (greedy) or at least 0.001")


class UniformSource:
    """The uniform numbers of a generation: an independent stream for each row.

    A row's numbers depend on the seed and on its place in the batch, not on the other rows.

    Args:
        seed: a whole number from 0, or None for a fresh one each time.
        batch: number of rows.
        used: whether anybody looks at them, which at temperature 0 nobody does; else they are 0.

    Raises:
        ValueError: for another seed.
    """

    def __init__(self, seed: int | None, batch: int, *, used: bool = True) -> None:
        check_seed(seed)
        self._unused = None if used else np.zeros((batch, 1), np.float32)
        self._rows = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(batch)] if used else []

    def draw(self) -> np.ndarray:
        """(B, 1) float32 in [0, 1)."""
        if self._unused is not None:
            return self._unused
        return np.array([[row.random(dtype=np.float32)] for row in self._rows], np.float32)


def sample(nn: Ops, logits: Array, uniform: Array, params: SamplingParams, seen: Array | None = None) -> Array:
    """The next token of each row.

    Args:
        nn: the backend whose arrays these are.
        logits: (B, V).
        uniform: (B, 1) float32 in [0, 1); not used at temperature 0.
        params: how to choose.
        seen: (B, V) bool, the tokens that the repetition penalty applies to, or None.

    Returns:
        (B,) int64 token ids; -1 in a row whose logits have a NaN or no finite maximum.
    """
    logits = at_least_float32(nn, logits)
    vocab = logits.shape[1]
    if seen is not None and params.repetition_penalty != 1.0:
        penalty = params.repetition_penalty
        logits = nn.where(seen, nn.where(logits > 0, logits / penalty, logits * penalty), logits)
    top = nn.max(logits, axis=1)[:, None]  # (B, 1)
    valid = (top - top == 0)[:, 0]  # not for NaN and infinity
    if params.temperature == 0:
        return nn.where(valid, nn.argmax(logits, axis=1), -1)

    weights = nn.exp((logits - top) / params.temperature)  # unnormalised, the largest is 1
    if 0 < params.top_k < vocab:
        smallest = nn.sort(weights, axis=1)[:, vocab - params.top_k : vocab - params.top_k + 1]
        weights = nn.where(weights >= smallest, weights, 0.0)
    if params.top_p < 1:
        ascending = nn.sort(weights, axis=1)
        mass = nn.cumulative_sum(ascending, axis=1)
        kept = mass > (1 - params.top_p) * mass[:, -1:]
        smallest = -nn.max(nn.where(kept, -ascending, -1.0), axis=1)[:, None]
        weights = nn.where(weights >= smallest, weights, 0.0)
    if params.min_p > 0:
        weights = nn.where(weights >= params.min_p, weights, 0.0)

    possible = weights > 0
    distribution = nn.where(possible, nn.cumulative_sum(weights, axis=1), 0.0)
    total = nn.max(distribution, axis=1)[:, None]
    target = total * (uniform * (1 - 2**-20))  # below the total also after rounding
    steps = nn.arange(vocab, like=logits)
    chosen = -nn.max(nn.where(possible & (distribution > target), -steps, -vocab), axis=1)
    return nn.where(valid, chosen, -1)
