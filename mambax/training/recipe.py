"""A whole training run as one file: what model, what data, how.

TOML or JSON, with the sections ``[model]``, ``[data]`` and ``[training]``; every key may be left out. A recipe says
everything that decides the result, is written beside it, and can be run again.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mambax.checkpoint.json_files import dump_object, read_object
from mambax.config import MambaLMConfig
from mambax.training import fields
from mambax.training.config import TrainingConfig

ARRANGEMENTS = ("reading", "windows", "documents")
VOCABULARIES = ("bpe", "bytes", "characters")
"""Kinds of tokenizers that are made from the text."""

RECIPE = "recipe.json"
_FROM_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
PRETRAINED = "pretrained"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt from.

    Args:
        train: text files, ``.jsonl`` files, and folders of them.
        validation: the same, held out; when there are none, a part of ``train`` is.
        validation_fraction: how large a part. Of a single text file it is the end; else documents, drawn by seed.
        field: of a JSON line, where its text is.
        tokenizer: ``"bpe"`` (byte-level, learnt from the text), ``"bytes"``, ``"characters"``, or a folder with
            ``tokenizer.json``; of a pretrained model always its own.
        vocab_size: tokens of ``"bpe"``.
        arrangement: ``"reading"``, ``"windows"`` or ``"documents"``; see :mod:`mambax.training.token_data`.
        separate: keep documents apart: nothing of one reaches the next.
        length: tokens of a row.
        restart: of ``"reading"``, the chance that a reader goes to another place.
        validation_rows: into how many rows the held-out text is cut. One is exact for text that goes on; more are
            faster.
        validation_length: tokens of a row that are read at once.
    """

    train: tuple[str, ...] = fields.texts()
    validation: tuple[str, ...] = fields.texts()
    validation_fraction: float = fields.number(0.1, 1e-6, 0.9)
    field: str = fields.text("text")
    tokenizer: str = fields.text("bpe")
    vocab_size: int = fields.whole(512, 256, 2**24)
    arrangement: str = fields.choice("reading", *ARRANGEMENTS)
    separate: bool = fields.flag(False)
    length: int = fields.whole(256, 1)
    restart: float = fields.number(0.05, 0, 1)
    validation_rows: int = fields.whole(8, 1)
    validation_length: int = fields.whole(1024, 1)

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            given = getattr(self, name)
            if isinstance(given, (str, list)):
                object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        fields.check(self)
        if not self.train:
            raise ValueError(
                "data.train is empty; expected text files, .jsonl files or folders of them; name some, on the "
                "command line with --text"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run.

    Args:
        run: the folder of the run.
        model: fields of :class:`mambax.MambaLMConfig` but for those that the tokenizer decides; or ``pretrained``,
            a folder or repository to go on from.
        data, training: see there.
        backend: name of a backend; the best for training here when None.
        device: of the backend; its preferred one when None.

    Raises:
        ValueError: for a value that is not allowed.
    """

    run: str = fields.text("run")
    backend: str | None = fields.text(None, optional=True)
    device: str | None = fields.text(None, optional=True)
    model: Mapping[str, Any] = field(default_factory=dict)
    data: DataConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        fields.check(self)
        if PRETRAINED in self.model:
            if len(self.model) > 1 or not isinstance(self.model[PRETRAINED], str):
                raise ValueError("model.pretrained is a folder or repository, with nothing else under [model]")
            return
        self.model_config(256)

    def model_config(self, vocab_size: int, **tokens: Any) -> MambaLMConfig:
        """The configuration of a new model, for a tokenizer."""
        fields: dict[str, Any] = {"d_model": 128, "n_layer": 4, **self.model, "vocab_size": vocab_size, **tokens}
        return MambaLMConfig(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that :func:`parse` takes."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def save(self, folder: Path) -> None:
        """Write it as ``recipe.json``."""
        (folder / RECIPE).write_bytes(dump_object(self.to_dict()))


_SECTIONS: dict[str, frozenset[str]] = {
    "": frozenset(f.name for f in dataclasses.fields(Recipe)),
    "model": frozenset(f.name for f in dataclasses.fields(MambaLMConfig)) - {*_FROM_THE_TOKENIZER} | {PRETRAINED},
    "data": frozenset(f.name for f in dataclasses.fields(DataConfig)),
    "training": frozenset(f.name for f in dataclasses.fields(TrainingConfig)),
}


def parse(values: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from plain values.

    Args:
        values: as in a file.
        where: they come from, for messages.

    Raises:
        ValueError: for an unknown key, with the one that was probably meant, and a value that is not allowed.
    """
    for section, known in _SECTIONS.items():
        part = values.get(section, {}) if section else values
        if not isinstance(part, Mapping):
            raise ValueError(f"{where}: [{section}] is {part!r}; expected a table of keys and values")
        for key in part:
            if key not in known:
                raise ValueError(f"{where}: {_unknown(section, key)}")
    try:
        rest = {key: value for key, value in values.items() if key not in ("data", "training")}
        data, training = DataConfig(**values.get("data", {})), TrainingConfig(**values.get("training", {}))
        return Recipe(**rest, data=data, training=training)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _unknown(section: str, key: str) -> str:
    """What to say of a key that does not exist."""
    full = f"{section}.{key}" if section else key
    everything = {f"{s}.{k}" if s else k for s, keys in _SECTIONS.items() for k in keys}
    elsewhere = [name for name in sorted(everything) if name.rpartition(".")[2] == key]
    close = elsewhere or difflib.get_close_matches(full, sorted(everything), n=3, cutoff=0.6)
    if close:
        return f"unknown key {full!r}; did you mean {' or '.join(map(repr, close))}?"
    return f"unknown key {full!r}; expected one of {', '.join(sorted(_SECTIONS[section]))}"


def read_file(path: Path) -> dict[str, Any]:
    """The values in a recipe file.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is neither TOML nor JSON.
        ImportError: for TOML on Python 3.10 without tomli.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a recipe in TOML or JSON")
    if path.suffix.lower() == ".json":
        return read_object(path)
    if path.suffix.lower() != ".toml":
        raise ValueError(
            f"{path}: expected a recipe that ends in .toml or .json, found {path.suffix or 'neither'!r}"
        )
    toml = _toml()
    try:
        return toml.loads(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:  # also TOMLDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: not valid TOML: {error}") from error


def _toml() -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:
        try:
            import tomli  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise ImportError("to read TOML, Python 3.10 needs tomli: pip install tomli; or write JSON") from error
        return tomli
    return tomllib


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key``, or a key of no section, in plain values."""
    section, _, name = key.rpartition(".")
    target = values
    if section:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"[{section}] is {inner!r}; expected a table of keys and values")
        target = inner
    target[name] = value


def parse_assignment(text: str) -> tuple[str, Any]:
    """``training.steps=200`` as a key and a value: JSON if it is, else text.

    Raises:
        ValueError: for anything without ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"{text!r}: expected a key and a value, such as training.steps=200")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value.strip()
