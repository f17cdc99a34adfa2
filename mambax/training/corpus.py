"""Texts in files: plain text, JSON lines, folders of both, read in blocks so that no file need fit in memory."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK = 2**20
"""Bytes that are read at once."""

JSON_LINES = (".jsonl", ".ndjson")
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class TextFile:
    """A file of text, or a part of one: one document.

    Args:
        path: the file, UTF-8.
        start, stop: bytes; the part between them.
    """

    path: Path
    start: int
    stop: int

    def blocks(self) -> Iterator[str]:
        """Its text in parts of about :data:`BLOCK` bytes, cut in front of white space.

        There, a byte-level BPE tokenizer cuts as well, so that the tokens of the parts are those of the whole.

        Raises:
            ValueError: for bytes that are not UTF-8.
        """
        kept = ""
        for part in self._decoded():
            kept += part
            cut = _last_cut(kept)
            if cut:
                yield kept[:cut]
                kept = kept[cut:]
        if kept:
            yield kept

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            try:
                while left > 0 and (read := file.read(min(BLOCK, left))):
                    left -= len(read)
                    yield decoder.decode(read, final=left <= 0)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path}: expected UTF-8 text ({error}); convert it, or leave it out"
                ) from error


@dataclass(frozen=True)
class Lines:
    """A file of JSON lines: each line an object with the text of a document in one field.

    Args:
        path: the file.
        field: the name of that field.
    """

    path: Path
    field: str

    def texts(self) -> Iterator[str]:
        """The texts, one after another.

        Raises:
            ValueError: for a line that is not such an object.
        """
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {number}: not valid JSON: {error}; correct the line, or leave it out"
                ) from error
            if not isinstance(value, dict) or not isinstance(value.get(self.field), str):
                raise ValueError(
                    f"{self.path}, line {number}: expected an object with text under {self.field!r}, found "
                    f"{self._found(value)}; name the field with data.field"
                )
            yield value[self.field]

    def _found(self, value: object) -> str:
        """What stands in the place of an object with text, in words."""
        if not isinstance(value, dict):
            return type(value).__name__
        if self.field in value:
            return f"{type(value[self.field]).__name__} there"
        return ", ".join(map(repr, list(value)[:8]))

    def _lines(self) -> Iterator[str]:
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                yield from file
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(self.path, error)) from error


Source = TextFile | Lines


def sources(paths: Sequence[str | os.PathLike[str]], field: str = "text") -> list[Source]:
    """The files behind paths; of a folder, all files in it and below, by name, but for hidden ones.

    Raises:
        FileNotFoundError: for a path that leads nowhere, and a folder without files.
    """
    found: list[Source] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            below = sorted(path.rglob("*"), key=lambda p: p.as_posix())
            inside = [p for p in below if p.is_file() and not _hidden(p.relative_to(path))]
            if not inside:
                raise FileNotFoundError(f"{path}: the folder has no files; expected text (.txt, ...) or .jsonl")
        elif path.is_file():
            inside = [path]
        else:
            raise FileNotFoundError(f"{path}: no such file or folder; expected text, .jsonl, or a folder of them")
        found += [_source(file, field) for file in inside]
    return found


def documents(found: Sequence[Source]) -> Iterator[Iterator[str]]:
    """Every document, as blocks of its text."""
    for source in found:
        if isinstance(source, TextFile):
            yield source.blocks()
        else:
            for text in source.texts():
                yield iter((text,))


def split_file(file: TextFile, fraction: float) -> tuple[TextFile, TextFile]:
    """A file in two: the last part is ``fraction`` of its bytes, cut between characters."""
    cut = file.start + int((file.stop - file.start) * (1 - fraction))
    with file.path.open("rb") as opened:
        opened.seek(cut)
        rest = opened.read(4)
    cut += next((i for i, byte in enumerate(rest) if byte & 0xC0 != 0x80), 0)
    return TextFile(file.path, file.start, cut), TextFile(file.path, cut, file.stop)


def _source(path: Path, field: str) -> Source:
    if path.suffix.lower() in JSON_LINES:
        return Lines(path, field)
    with path.open("rb") as file:
        start = 3 if file.read(3) == codecs.BOM_UTF8 else 0
    return TextFile(path, start, path.stat().st_size)


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    return f"{path}: expected UTF-8 text ({error}); convert it, or leave it out"


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _last_cut(text: str) -> int:
    """The last place in front of white space that follows something else; 0 when there is none."""
    for i in range(len(text) - 1, 0, -1):
        if text[i] in _SPACE and text[i - 1] not in _SPACE:
            return i
    return 0
