"""Models of sentencepiece, such as Mistral's ``tokenizer.model.v3``, read into the tokenizers library.

Such a file is one message of Protocol Buffers. Byte-pair models with byte fallback are read, which is what Mistral
publishes; the others are refused.

Source: ``sentencepiece_model.proto`` of sentencepiece; the wire format in the documentation of Protocol Buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import tokenizers

_SPACE = "\u2581"
"""What sentencepiece writes for a space."""
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_PIECE, _SCORE, _TYPE = 1, 2, 3  # of SentencePiece
_MODEL_TYPE, _AS_SUFFIX, _BYTE_FALLBACK, _UNK_ID, _BOS_ID, _EOS_ID = 3, 24, 35, 40, 41, 42  # of TrainerSpec
_CHARACTERS, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5  # of NormalizerSpec
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # values of _TYPE
_BPE = 2  # value of _MODEL_TYPE


class Piece(NamedTuple):
    """One token of the vocabulary."""

    text: str
    score: float
    kind: int


def read(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer in a model of sentencepiece, and what ``tokenizer_config.json`` would say of it.

    As in mistral_inference, a text begins with the token of that name.

    Raises:
        ValueError: when the file is none, is damaged, or is of a kind that is not supported.
    """
    try:
        pieces, trainer, normalizer = _parse(path.read_bytes())
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a model of sentencepiece, or cut short ({error}); download the file again"
        ) from error
    _check(path, pieces, trainer, normalizer)
    special = {
        role: pieces[trainer.get(field, default)].text
        for role, field, default in (
            ("unk_token", _UNK_ID, 0),
            ("bos_token", _BOS_ID, 1),
            ("eos_token", _EOS_ID, 2),
        )
    }
    backend = _tokenizer(pieces, special["unk_token"], dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)))
    return backend, special | {"add_bos_token": True, "add_eos_token": False}


def _parse(data: bytes) -> tuple[list[Piece], dict[int, Any], dict[int, Any]]:
    """The vocabulary, and the fields of the trainer and of the normaliser by their numbers."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == _PIECES:
            found = dict(_fields(_message(value)))
            score = struct.unpack("<f", found.get(_SCORE, b"\0\0\0\0"))[0]
            pieces.append(Piece(_message(found.get(_PIECE)).decode(), score, found.get(_TYPE, _NORMAL)))
        elif number == _TRAINER:
            trainer = dict(_fields(_message(value)))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(_message(value)))
    return pieces, trainer, normalizer


def _message(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise IndexError("a field is of another kind than expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: whole numbers, and the bytes of all else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind not in (1, 2, 5):
            raise IndexError(f"byte {at}: a field of kind {kind}")
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(data):
            raise IndexError(f"byte {at}: {size} bytes expected, {len(data) - at} found")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number and where it ends; negative ones are 64 bits in two's complement."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value - 2**64 if value >= 2**63 else value), at
    raise IndexError(f"byte {at}: a number of more than 64 bits")


def _check(path: Path, pieces: list[Piece], trainer: dict[int, Any], normalizer: dict[int, Any]) -> None:
    """Refuse what would give other tokens than sentencepiece does."""
    if not pieces or _MODEL_TYPE not in trainer:
        raise ValueError(f"{path}: not a model of sentencepiece: it has no vocabulary; download the file again")
    supported = (
        ("model_type", trainer.get(_MODEL_TYPE), _BPE),
        ("byte_fallback", trainer.get(_BYTE_FALLBACK, 0), 1),
        ("treat_whitespace_as_suffix", trainer.get(_AS_SUFFIX, 0), 0),
        ("precompiled_charsmap", normalizer.get(_CHARACTERS, b"")[:8], b""),
        ("remove_extra_whitespaces", normalizer.get(_REMOVE_SPACES, 1), 0),
        ("escape_whitespaces", normalizer.get(_ESCAPE_SPACES, 1), 1),
        ("user_defined_symbols", sum(piece.kind == _USER_DEFINED for piece in pieces), 0),
        ("bytes in the vocabulary", sum(piece.kind == _BYTE for piece in pieces), 256),
    )
    for name, found, expected in supported:
        if found != expected:
            raise ValueError(
                f"{path}: {name} is {found!r}; only {expected!r} is supported; make a tokenizer.json of it with "
                "transformers.AutoTokenizer and its save_pretrained"
            )
    ids = [trainer.get(field, default) for field, default in ((_UNK_ID, 0), (_BOS_ID, 1), (_EOS_ID, 2))]
    if not all(0 <= number < len(pieces) for number in ids):
        raise ValueError(f"{path}: unk, bos and eos are tokens {ids}; expected numbers from 0 to {len(pieces) - 1}")


def _tokenizer(pieces: list[Piece], unknown: str, *, dummy_prefix: bool) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocabulary = {piece.text: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocabulary, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    escape = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), escape]) if dummy_prefix else escape
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if dummy_prefix else steps)
    special = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every pair of tokens that make a third, the pair that sentencepiece would join first being first."""
    normal = {piece.text: number for number, piece in enumerate(pieces) if piece.kind == _NORMAL}
    merges: list[tuple[str, str]] = []
    for piece in sorted((piece for piece in pieces if piece.kind == _NORMAL), key=lambda piece: -piece.score):
        halves = ((piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text)))
        pairs = [(left, right) for left, right in halves if left in normal and right in normal]
        merges += sorted(pairs, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    return merges
