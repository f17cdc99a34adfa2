"""The files of a tokenizer, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambax import sentencepiece_files

if TYPE_CHECKING:
    import tokenizers

    from mambax.checkpoint.sources import Source

VOCABULARIES = ("tokenizer.json", "tokenizer.model.v3")
"""The files that a tokenizer may be in, the preferred one first; the second is Mistral's."""
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


def find(source: Source) -> Path | None:
    """The folder that the files of a tokenizer are in now; None when the source has no tokenizer."""
    found = next((path for path in map(source.find, VOCABULARIES) if path is not None), None)
    if found is None:
        return None
    for name in _BESIDE:
        source.find(name)  # from a repository, into the same folder
    return found.parent


def read_backend(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer in the first of :data:`VOCABULARIES`, and what is known of its special tokens by that alone.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is not a tokenizer.
    """
    from tokenizers import Tokenizer

    path = folder / VOCABULARIES[0]
    if not path.is_file():
        other = folder / VOCABULARIES[1]
        if other.is_file():
            return sentencepiece_files.read(other)
        found = ", ".join(sorted(p.name for p in folder.glob("*token*"))) or "no tokenizer files"
        raise FileNotFoundError(
            f"{folder}: expected tokenizer.json, found {found}; to make one, load the tokenizer with "
            "transformers.AutoTokenizer and call its save_pretrained"
        )
    text = _read_text(path)
    try:
        return Tokenizer.from_str(text), {}
    except Exception as error:
        if type(error) is not Exception:  # the only type that the tokenizers library raises
            raise
        raise ValueError(
            f"{path}: not a tokenizer of the tokenizers library: {error}; download or write the file again"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` over ``special_tokens_map.json``; empty when there is neither.

    Raises:
        ValueError: when one is not a JSON object.
    """
    return _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")


def read_templates(folder: Path, configured: Any) -> dict[str, str]:
    """Chat templates by name: what ``tokenizer_config.json`` says, replaced by the files that hold nothing else.

    Args:
        folder: the checkpoint.
        configured: ``chat_template`` of ``tokenizer_config.json``: one, a list of named ones, or None.

    Raises:
        ValueError: when they are neither.
    """
    default = _read_json(folder / "chat_template.json").get("chat_template")
    found: dict[Any, Any] = {} if default is None else {"default": default}
    if isinstance(configured, list):
        found |= {entry.get("name"): entry.get("template") for entry in configured if isinstance(entry, Mapping)}
    elif configured is not None:
        found["default"] = configured
    for path in [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]:
        if path.is_file():
            found["default" if path.parent == folder else path.stem] = _read_text(path)
    for name, template in found.items():
        if not isinstance(name, str) or not isinstance(template, str):
            raise ValueError(
                f"{folder}: chat template {name!r} is {type(template).__name__}; expected Jinja source"
            )
        if Path(name).name != name:
            raise ValueError(f"{folder}: a chat template is named {name!r}; expected a name that can be a file's")
    return found


def write(
    folder: Path,
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    templates: Mapping[str, str],
) -> None:
    """Write all files of a tokenizer into a folder, which is made if need be."""
    from mambax.checkpoint.json_files import dump_object

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(backend.to_str(pretty=True).encode())
    (folder / "tokenizer_config.json").write_bytes(dump_object(dict(config)))
    (folder / "special_tokens_map.json").write_bytes(dump_object(dict(special_tokens)))
    for name, template in templates.items():
        named = folder / "additional_chat_templates" / f"{name}.jinja"
        path = folder / "chat_template.jinja" if name == "default" else named
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(template.encode())


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    from mambax.checkpoint.json_files import read_object

    return read_object(path) if path.is_file() else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # not read_text, which would change the newlines of a template
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); was it downloaded completely?") from error
