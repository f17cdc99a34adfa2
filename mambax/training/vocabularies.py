"""Tokenizers made for a text: bytes, characters, or BPE tokens learnt from it."""

from __future__ import annotations

from collections.abc import Iterable

from mambax.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
"""The token after each document, where a vocabulary has one."""

UNKNOWN = "<unk>"
"""Of a vocabulary of characters: any other character."""


def byte_tokenizer(*, end_of_text: bool = False) -> Tokenizer:
    """Each byte of the UTF-8 text is a token, whose id is its value."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {_byte_character(value): value for value in range(256)}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, eos_token=END_OF_TEXT if end_of_text else None)


def character_tokenizer(texts: Iterable[str], *, end_of_text: bool = False) -> Tokenizer:
    """Each character is a token; characters that are not in the texts become :data:`UNKNOWN`.

    Raises:
        ValueError: for texts without a character.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise ValueError("the texts are empty; expected at least one character to make a vocabulary of")
    vocabulary = {token: i for i, token in enumerate([UNKNOWN, *sorted(characters)])}
    backend = Backend(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, eos_token=END_OF_TEXT if end_of_text else None)


def bpe_tokenizer(texts: Iterable[str], size: int, *, end_of_text: bool = False) -> Tokenizer:
    """A byte-level BPE vocabulary of at most ``size`` tokens, learnt from texts.

    Raises:
        ValueError: for a size below 256 and the end-of-text token.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = [END_OF_TEXT] if end_of_text else []
    if size < 256 + len(special):
        raise ValueError(
            f"vocab_size is {size}; expected at least {256 + len(special)}: a token for every byte comes first"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    return Tokenizer(backend, eos_token=END_OF_TEXT if end_of_text else None)


def _byte_character(value: int) -> str:
    """The character that stands for a byte in byte-level vocabularies (``bytes_to_unicode`` of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if value in printable:
        return chr(value)
    return chr(0x100 + sum(other not in printable for other in range(value)))
