"""What a prompt may be: text, token ids, or an array of them.

Dimensions: L length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mambax.backend import Backend
from mambax.inputs import is_whole

if TYPE_CHECKING:
    from mambax.tokenizer import Tokenizer

Prompt = str | Sequence[int] | np.ndarray


def on_host(nn: Backend, prompt: Any) -> Any:
    """A prompt or a list of them, an array of the framework as one of NumPy.

    Raises:
        ValueError: for anything else, naming its type.
    """
    listed = isinstance(prompt, (str, Sequence)) and not isinstance(prompt, bytes)
    if listed or (isinstance(prompt, np.ndarray) and prompt.ndim):
        return prompt
    if not getattr(prompt, "shape", None) or not is_whole(nn, prompt):
        raise ValueError(
            f"prompt is {type(prompt).__name__}; expected text, a sequence of token ids, or a list of either; an "
            f"array has to be of whole numbers, and of NumPy or of the {nn.name} backend"
        )
    return nn.to_numpy(prompt)


def is_single(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt and not a list of them."""
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1
    return len(prompt) > 0 and isinstance(prompt[0], (int, np.integer))


def token_ids(prompt: Any, tokenizer: Tokenizer | None, vocab_size: int, row: int) -> np.ndarray:
    """A prompt as (L,) int64; `row` is its number in messages.

    Raises:
        ValueError: for text without a tokenizer, an empty prompt, and what are not ids of the vocabulary.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer, and this model has none; pass token ids")
        prompt = tokenizer.encode(prompt)
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(
            f"prompt {row} is empty or not a flat list (shape {ids.shape}); expected at least one token, for "
            "example the model's beginning-of-text token"
        )
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"prompt {row} has {ids.dtype} values; expected text or whole token ids")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"prompt {row} has token id {outside[0]}, outside the vocabulary of {vocab_size}; expected 0 to "
            f"{vocab_size - 1}. Was it tokenized with this model's tokenizer?"
        )
    return ids.astype(np.int64)
