"""From a recipe to tokens on the disk: once for each run, and again only when something about them has changed."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambax.checkpoint.json_files import dump_object, read_object
from mambax.tokenizer import Tokenizer
from mambax.training import corpus, vocabularies
from mambax.training.processes import ProcessFailed
from mambax.training.recipe import DataConfig
from mambax.training.token_files import HEADER, TokenDataset, write_tokens

SOURCE, TOKENIZER, TRAIN, VALIDATION = "source.json", "tokenizer", "train", "validation"
_DECIDING = ("validation_fraction", "field", "tokenizer", "vocab_size", "separate")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes of text that are done, and all of them."""


@dataclass(frozen=True)
class Prepared:
    """Tokens to learn from and to evaluate on, and what made them."""

    train: TokenDataset
    validation: TokenDataset
    tokenizer: Tokenizer


class Corpus:
    """The texts of a recipe, found but not read.

    Args:
        data: the recipe's.
        seed: of the split.

    Raises:
        FileNotFoundError: for a path that leads nowhere.
        ValueError: when there are fewer bytes of text than one row needs.
    """

    def __init__(self, data: DataConfig, seed: int) -> None:
        self.data, self.seed = data, seed
        self.train = corpus.sources(data.train, data.field)
        self.held_out = corpus.sources(data.validation, data.field) if data.validation else []
        self.bytes = sum(source.path.stat().st_size for source in [*self.train, *self.held_out])
        if self.bytes <= data.length:
            names = ", ".join(data.train)
            raise ValueError(
                f"{names}: {self.bytes} bytes of text; expected more than data.length, {data.length} tokens"
            )
        only = self.train[0]
        self.one_text = len(self.train) == 1 and isinstance(only, corpus.TextFile)
        self._parts: Sequence[corpus.Source] = ()
        if self.one_text and not self.held_out and isinstance(only, corpus.TextFile):
            self._parts = corpus.split_file(only, data.validation_fraction)

    def texts(self, held_out: bool) -> Iterator[Iterator[str]]:
        """The documents of one side."""
        if self.held_out:
            yield from corpus.documents(self.held_out if held_out else self.train)
        elif self._parts:
            yield from corpus.documents([self._parts[held_out]])
        else:
            for i, document in enumerate(corpus.documents(self.train)):
                if self._is_held_out(i) is held_out:
                    yield document

    def _is_held_out(self, number: int) -> bool:
        digest = hashlib.blake2b(f"{self.seed} {number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.data.validation_fraction * 2**64

    def learnt_from(self) -> Iterator[str]:
        """All text to learn from, in blocks."""
        for document in self.texts(held_out=False):
            yield from document

    def describe(self) -> dict[str, Any]:
        """What the tokens depend on, as plain values."""
        files = [
            [source.path.name, source.path.stat().st_size, source.path.stat().st_mtime_ns]
            for source in [*self.train, *self.held_out]
        ]
        options = {name: getattr(self.data, name) for name in _DECIDING}
        return {"files": files, "seed": self.seed, "held_out_files": len(self.held_out), **options}


def prepare(
    found: Corpus,
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> Prepared:
    """Tokens in a folder, written unless they are there already. Of several processes, process 0 calls this.

    Args:
        found: the texts.
        folder: for them; appears complete or not at all.
        tokenizer: a pretrained model's own; made as the recipe says when None.
        progress: told how far it is.
        resume: a run goes on, so that the tokens must be those that are there.

    Raises:
        ValueError: for texts without a token on one of the two sides, and what is not UTF-8 or JSON lines; for
            other tokens than those of a run that goes on, which then stay as they are.
        OSError: when it cannot be written.
    """
    description = _description(found, tokenizer)
    if not _is_there(folder, description):
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        staging.mkdir(parents=True)
        try:
            _write(found, staging, tokenizer, progress)
            (staging / SOURCE).write_bytes(dump_object(description))
            if resume:
                _check_same(staging, folder)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return _open(folder, tokenizer)


def open_prepared(found: Corpus, folder: Path, *, tokenizer: Tokenizer | None = None) -> Prepared:
    """What :func:`prepare` made in process 0, for the other processes.

    Raises:
        ProcessFailed: when it is not there.
        ValueError: when it cannot be read.
    """
    source, wanted = folder / SOURCE, _description(found, tokenizer)
    made = read_object(source) if source.is_file() else {}
    if _without_times(made) != _without_times(wanted):
        raise ProcessFailed(
            f"this process stops, because process 0 has not made the tokens that it needs in {folder}: either "
            "process 0 failed, and its message says why, or the folder of the run is not one that all processes see"
        )
    return _open(folder, tokenizer)


def _is_there(folder: Path, description: Mapping[str, Any]) -> bool:
    """Whether a folder says that it was made from this. One whose file that says so is damaged was not."""
    try:
        return read_object(folder / SOURCE) == description
    except (FileNotFoundError, ValueError):
        return False


def _open(folder: Path, tokenizer: Tokenizer | None) -> Prepared:
    try:
        made = tokenizer or Tokenizer.from_pretrained(folder / TOKENIZER)
        return Prepared(TokenDataset(folder / TRAIN), TokenDataset(folder / VALIDATION), made)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error}. Delete {folder}: it is made again from the text") from error


def _description(found: Corpus, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return found.describe() | {"pretrained_tokenizer": None if tokenizer is None else repr(tokenizer)}


def _without_times(description: Mapping[str, Any]) -> dict[str, Any]:
    """Without when the texts were changed, which may differ where each machine has a copy of them."""
    return {**description, "files": [file[:2] for file in description.get("files", ())]}


def _check_same(made: Path, folder: Path) -> None:
    """Refuse tokens that are not those in the folder of a run that goes on."""
    for name in (TRAIN, VALIDATION):
        if not (folder / name / HEADER).is_file():
            continue
        before, now = (read_object(folder / name / HEADER) for folder in (folder, made))
        if before.get("digest") != now["digest"]:
            raise ValueError(
                f"{folder / name}: the run has {before.get('tokens')} tokens there, and the text now gives other "
                f"ones, {now['tokens']}; a run is resumed on the same text: put it back as it was, or begin "
                "another run in another folder"
            )


def _write(found: Corpus, folder: Path, tokenizer: Tokenizer | None, progress: Progress | None) -> None:
    if tokenizer is None:
        if progress is not None:
            progress("making the vocabulary", 0, found.bytes)
        tokenizer = make_tokenizer(found)
        tokenizer.save_pretrained(folder / TOKENIZER)
    ends = tokenizer.eos_token_ids
    end = ends[0] if ends and not found.one_text else None
    done = 0
    for name, held_out in ((TRAIN, False), (VALIDATION, True)):

        def advance(size: int, before: int = done) -> None:
            if progress is not None:
                progress("tokenising", before + size, found.bytes)

        try:
            side = write_tokens(found.texts(held_out), tokenizer, folder / name, end_of_text=end, progress=advance)
        except ValueError as error:
            raise ValueError(f"{name} data: {error}") from error
        done += side.text_bytes


def make_tokenizer(found: Corpus) -> Tokenizer:
    """The tokenizer that a recipe asks for."""
    kind, end_of_text = found.data.tokenizer, not found.one_text
    if kind == "bytes":
        return vocabularies.byte_tokenizer(end_of_text=end_of_text)
    if kind == "characters":
        return vocabularies.character_tokenizer(found.learnt_from(), end_of_text=end_of_text)
    if kind == "bpe":
        size = found.data.vocab_size
        return vocabularies.bpe_tokenizer(found.learnt_from(), size, end_of_text=end_of_text)
    return Tokenizer.from_pretrained(Path(kind).expanduser())
