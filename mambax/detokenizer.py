"""From token ids to text, one token at a time.

A token of a byte-level vocabulary is a run of bytes that may begin or end inside a character. Every token is
therefore turned into bytes, and the bytes into text by an incremental UTF-8 decoder: it holds back at most the
three bytes of an unfinished character, so that the cost of a token does not depend on the text before it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token that stands for one byte, in vocabularies with byte fallback."""

PER_TOKEN = frozenset({"ByteFallback", "Metaspace", "Replace", "Strip", "WordPiece"})
"""Decoders of the tokenizers library that look at one token and at whether it is the first."""


class Pieces:
    """The bytes that each token of a vocabulary stands for.

    Args:
        backend: the tokenizer of the tokenizers library.

    Raises:
        ValueError: for a decoder that cannot work one token at a time.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._decoder = backend.decoder
        steps = decoder_steps(backend.decoder)
        kinds = [step["type"] for step in steps]
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._known: dict[tuple[int, bool], bytes | None] = {}
        problem = _unsupported(steps)
        if problem:
            raise ValueError(
                f"tokenizer.json: {problem} cannot be undone one token at a time; expected ByteLevel, or any of "
                f"{', '.join(sorted(PER_TOKEN))} with at most Fuse and a Strip of one leading character after it"
            )

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a special one, which generated text leaves out."""
        return token_id in self._special

    def piece(self, token_id: int, first: bool) -> bytes | None:
        """The UTF-8 bytes of a token; None for an id that the vocabulary does not have.

        Args:
            token_id: the token; models pad their vocabulary, so it may be larger than the tokenizer's.
            first: whether the text begins with it; many decoders drop the space in front of the first word.

        Raises:
            ValueError: for a negative id.
        """
        key = (token_id, first)
        if key not in self._known:
            self._known[key] = self._bytes(token_id, first)
        return self._known[key]

    def _bytes(self, token_id: int, first: bool) -> bytes | None:
        if token_id < 0:
            raise ValueError(f"token id is {token_id}; expected a whole number of at least 0")
        token = self._backend.id_to_token(int(token_id))
        if token is None:
            return None
        if self._byte_level:
            table = _byte_level_table()
            if all(char in table for char in token):
                return bytes(table[char] for char in token)
            return token.encode()  # an added token is itself, not its byte-level spelling
        byte = BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if byte and int(byte[1], 16) >= 0x80:
            return bytes([int(byte[1], 16)])
        if self._decoder is None:
            return token.encode() if first else f" {token}".encode()
        if first:
            return self._decoder.decode([token]).encode()
        return self._decoder.decode(["a", token])[1:].encode()


class Detokenizer:
    """Text as it becomes certain, token by token. The pieces joined are the text of all the tokens.

    Bytes that are not UTF-8 become U+FFFD, one for each maximal ill-formed part (Unicode 15, table 3-8).

    Args:
        pieces: the bytes of the tokens.
        skip_special_tokens: leave special tokens out.
        continues: the first token carries on a text, so that it keeps the space in front of it.
    """

    def __init__(self, pieces: Pieces, *, skip_special_tokens: bool = True, continues: bool = False) -> None:
        self._pieces = pieces
        self._skip = skip_special_tokens
        self._first = not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """Take a token; return the whole characters that are now certain, which may be none."""
        if self._skip and self._pieces.is_special(token_id):
            return ""
        piece = self._pieces.piece(token_id, self._first)
        if piece is None:
            return ""
        self._first = False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD, now that no more will come."""
        return self._utf8.decode(b"", final=True)

    def text(self, token_ids: Iterable[int]) -> str:
        """Take all of these tokens and finish; return their text."""
        return "".join(map(self.add, token_ids)) + self.finish()


def decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """The decoder of a tokenizer as a flat list of its steps, as they are written in ``tokenizer.json``."""
    if decoder is None:
        return []

    def flat(step: dict[str, Any]) -> list[dict[str, Any]]:
        return [s for part in step["decoders"] for s in flat(part)] if step["type"] == "Sequence" else [step]

    return flat(json.loads(decoder.__getstate__()))


def _unsupported(steps: list[dict[str, Any]]) -> str:
    """The step that depends on more than one token, in words, or ``""``."""
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "ByteLevel":
            others = [s["type"] for s in steps if s["type"] not in ("ByteLevel", "Fuse")]
            return f"ByteLevel together with {', '.join(others)}" if others else ""
        elif kind not in PER_TOKEN:
            return f"the decoder {kind}"
        elif fused and (kind != "Strip" or step["start"] > 1 or step["stop"]):
            return f"{kind} after Fuse"
    return ""


@cache
def _byte_level_table() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet (``bytes_to_unicode`` in openai/gpt-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + i): byte for i, byte in enumerate(rest)}
