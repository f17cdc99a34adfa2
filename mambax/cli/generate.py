"""``mambax generate``."""

from __future__ import annotations

import sys
from typing import Any

import typer

from mambax.cli.errors import INTERRUPTED
from mambax.cli.terminal import bar, require_text_model, stream


def generate(name: str, prompt: str | None, sampling: dict[str, Any], loading: dict[str, Any], quiet: bool) -> None:
    """Continue a prompt, or what stdin holds.

    Args:
        name: a folder or a repository.
        prompt: the text; stdin when None or ``"-"``.
        sampling: options of ``generate_streaming``.
        loading: options of :func:`mambax.load`.
        quiet: nothing on stderr.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: as loading and generating do.
    """
    if prompt == "":
        raise ValueError("the prompt is empty; expected the text to continue")
    text = read_stdin() if prompt in (None, "-") else prompt
    model = load(name, loading, quiet)
    finished = stream(lambda **options: model.generate_streaming(text, **sampling, **options), quiet=quiet)
    if finished is None or finished.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def load(name: str, loading: dict[str, Any], quiet: bool) -> Any:
    """A model that can write text, with a bar while its weights are read; quiet, without a word on the backend."""
    import mambax
    from mambax.registry import default_backend

    if quiet and loading["backend"] is None:
        loading = loading | {"backend": default_backend()}  # what is named is not said
    with bar("Loading", in_bytes=True, quiet=quiet) as progress:
        model = mambax.load(name, progress=progress, **loading)
    return require_text_model(model, name)


def read_stdin() -> str:
    """All of stdin, its last newline included.

    Raises:
        ValueError: when it is a terminal, empty or not UTF-8.
    """
    if sys.stdin.isatty():
        raise ValueError("there is no prompt: give one after the model, or pipe one in")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not UTF-8 text ({error}); expected the text to continue") from error
    if not text:
        raise ValueError("stdin is empty; expected the text to continue")
    return text
