"""Errors at the command line: one clear message on stderr and an exit code, a traceback with ``--debug`` alone."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

FAILED = 1
INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended."""

EXPECTED = (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError)
"""What a person, a file, the network or a full device can cause. Anything else is a mistake of ours."""


class Group(TyperGroup):
    """The commands, with errors reported by :func:`message`, and ``--debug`` understood after a command too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move ``--debug`` to the front, where it is declared."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(arg for arg in args[:end] if arg != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; end with a message and an exit code where it fails."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # RuntimeErrors, but not errors
            raise
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # whoever read our output has gone, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None
        except EXPECTED as error:
            if ctx.params.get("debug"):
                raise
            complain(message(error))
            raise typer.Exit(FAILED) from None


def message(error: BaseException) -> str:
    """What to tell a person about an error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error)
    if isinstance(error, MemoryError):
        return f"out of memory{': ' + text if text else ''}; try a narrower --dtype, or a smaller model"
    whole = isinstance(error, (ValueError, OSError, ImportError)) or type(error).__module__.startswith("mambax.")
    return text if text and whole else f"{_kind(error)}: {text}"


def complain(text: str) -> None:
    """Print an error on stderr."""
    from mambax.cli.terminal import stderr

    stderr().print("error: ", style="bold red", end="")
    stderr().print(text, markup=False, highlight=False, soft_wrap=True)


def _kind(error: BaseException) -> str:
    kind = type(error)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
