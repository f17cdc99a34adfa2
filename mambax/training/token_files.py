"""Token ids in files that are mapped into memory, not read: as long as the disk is large.

A folder with ``tokens.bin`` (little-endian uint16, or uint32 for more than 65536 tokens, one document after
another), ``documents.bin`` (little-endian int64, where each document ends) and ``dataset.json``, which says what
they hold. It appears complete or not at all.

Dimensions: T tokens.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mambax.checkpoint.json_files import dump_object, read_object
from mambax.tokenizer import Tokenizer

FORMAT, VERSION = "mambax-tokens", 1
TOKENS, DOCUMENTS, HEADER = "tokens.bin", "documents.bin", "dataset.json"


class TokenDataset:
    """Token ids of documents in a folder that :func:`write_tokens` wrote.

    Args:
        folder: the folder.

    Attributes:
        tokens: (T,) the ids, mapped.
        ends: where each document ends, mapped, int64; the last is T.
        vocab_size: of the tokenizer; every id is below it, but for a tokenizer with gaps between its ids.
        text_bytes, characters: the size of the text that the tokens stand for.
        digest: of the ids.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when the files do not fit each other.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / HEADER).is_file():
            raise FileNotFoundError(f"{self.folder}: no {HEADER}; expected a folder of tokens written by mambax")
        header = read_object(self.folder / HEADER)
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise ValueError(
                f"{self.folder / HEADER}: expected {FORMAT!r} of version {VERSION}, found {header.get('format')!r} "
                f"of version {header.get('version')!r}; write the tokens again"
            )
        for name in ("vocab_size", "bytes", "characters", "tokens", "documents"):
            if not isinstance(header.get(name), int) or header[name] < 0:
                raise ValueError(
                    f"{self.folder / HEADER}: {name} is {header.get(name)!r}; expected a whole number: write the "
                    "tokens again"
                )
        self.vocab_size: int = header["vocab_size"]
        self.text_bytes: int = header["bytes"]
        self.characters: int = header["characters"]
        self.digest = str(header.get("digest"))
        self.tokens = self._map(TOKENS, _dtype(self.vocab_size), header["tokens"])
        self.ends = self._map(DOCUMENTS, np.dtype("<i8"), header["documents"])

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = self.folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != count * dtype.itemsize:
            raise ValueError(
                f"{path}: expected {count * dtype.itemsize} bytes, found {'no file' if size < 0 else size}; write "
                "the tokens again"
            )
        return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.tokens)


def write_tokens(
    texts: Iterable[Iterable[str]],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    end_of_text: int | None = None,
    progress: Any = None,
) -> TokenDataset:
    """Tokenise documents into a folder, block by block.

    Args:
        texts: for each document, the blocks of its text.
        tokenizer: what turns a block into ids.
        folder: to be written; it must not exist.
        end_of_text: a token put after each document, or None.
        progress: called with the number of bytes of text that are done.

    Raises:
        ValueError: when there is no token at all.
        OSError: when it cannot be written; nothing is left then.
    """
    dtype = _dtype(tokenizer.vocab_size)
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    staging.mkdir(parents=True)
    digest = hashlib.blake2b(digest_size=16)
    count = documents = text_bytes = characters = 0
    try:
        with (staging / TOKENS).open("xb") as tokens, (staging / DOCUMENTS).open("xb") as ends:
            for blocks in texts:
                before = count
                for block in blocks:
                    ids = _as(dtype, tokenizer.encode(block, add_special_tokens=False))
                    tokens.write(ids.tobytes())
                    digest.update(ids.tobytes())
                    count += len(ids)
                    text_bytes += len(block.encode())
                    characters += len(block)
                    if progress is not None:
                        progress(text_bytes)
                if count == before:
                    continue
                if end_of_text is not None:
                    last = np.array([end_of_text], dtype).tobytes()
                    tokens.write(last)
                    digest.update(last)
                    count += 1
                ends.write(np.array([count], "<i8").tobytes())
                documents += 1
            for file in (tokens, ends):
                file.flush()
                os.fsync(file.fileno())
        if count == 0:
            raise ValueError("the texts are empty; expected at least one token to train on")
        header = {
            "format": FORMAT, "version": VERSION, "tokens": count, "documents": documents,
            "vocab_size": tokenizer.vocab_size, "bytes": text_bytes, "characters": characters,
            "digest": digest.hexdigest(),
        }  # fmt: skip
        (staging / HEADER).write_bytes(dump_object(header))
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return TokenDataset(folder)


def _as(dtype: np.dtype, ids: list[int]) -> np.ndarray:
    """Ids in the dtype of a file; a tokenizer with gaps may have some that are too large for it."""
    if (highest := max(ids, default=0)) > np.iinfo(dtype).max:
        raise ValueError(
            f"the tokenizer gives the token {highest}, though it has fewer tokens than that; expected ids up to "
            f"{np.iinfo(dtype).max}: use a tokenizer without gaps between its ids"
        )
    return np.array(ids, dtype)


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
