"""``mambax chat``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mambax.cli.errors import EXPECTED, complain, message
from mambax.cli.generate import load
from mambax.cli.terminal import note, stream
from mambax.conversation import Conversation

HELP = """\
/reset        forget the conversation
/undo         take back the last turn
/save FILE    write the conversation and the model's state
/load FILE    go on with a saved conversation
/help         this
/exit         leave, as Ctrl-D does
Ctrl-C ends an answer. Anything else is said to the model; to begin with a slash, put a space first."""


def chat(
    name: str,
    template: str | None,
    system: str | None,
    saved: Path | None,
    sampling: dict[str, Any],
    loading: dict[str, Any],
    quiet: bool,
) -> None:
    """Talk with a model until the input ends.

    Args:
        name: a folder or a repository.
        template: name of a chat template, or a file with one; the model's own when None.
        system: instructions in front of the conversation.
        saved: a saved conversation to go on with.
        sampling: options of ``generate_streaming``.
        loading: options of :func:`mambax.load`.
        quiet: only the model's text.
    """
    source = _template(template)
    conversation = Conversation(load(name, loading, quiet), template=source, system=system)
    if saved is not None:
        conversation.load(saved)
    if not quiet:
        plain = "This model has no chat template: it goes on with the text. " if conversation.is_plain else ""
        note(f"{plain}/help shows the commands.")
    _Session(conversation, sampling, quiet).run()


def _template(template: str | None) -> str | None:
    """The source in a file, or the name as it is.

    Raises:
        ValueError: for a file that is no template.
    """
    if not template or not Path(template).is_file():
        return template
    try:
        source = Path(template).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{template}: expected a Jinja template in UTF-8 ({error}); convert it") from error
    if "{" not in source:
        raise ValueError(f"{template}: expected a Jinja template, found text without {{{{ ... }}}} or {{% ... %}}")
    return source


class _Session:
    """Lines in, answers out."""

    def __init__(self, conversation: Conversation, sampling: dict[str, Any], quiet: bool) -> None:
        self.conversation = conversation
        self.sampling = sampling
        self.quiet = quiet
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self.reset, "/undo": self.undo, "/save": self.save, "/load": self.load, "/help": self.help,
        }  # fmt: skip

    def run(self) -> None:
        """Take lines until they end. What goes wrong with one is told, and changes nothing."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            with suppress(ImportError):  # line editing, where Python has it
                import readline  # noqa: F401
        while True:
            try:
                line = input("> " if interactive else "")
            except (EOFError, KeyboardInterrupt):
                if interactive:
                    note("")
                return
            if line.strip() in ("/exit", "/quit"):
                return
            try:
                self.obey(line)
            except EXPECTED as error:
                if isinstance(error, BrokenPipeError):
                    raise
                complain(message(error))

    def obey(self, line: str) -> None:
        """Run a command, or say the line to the model."""
        command, _, argument = line.strip().partition(" ")
        if not line.startswith("/"):
            self.say(line)
        elif command in self.commands:
            self.commands[command](argument.strip())
        else:
            raise ValueError(f"there is no command {command}; expected one of {', '.join(self.commands)}, /exit")

    def say(self, line: str) -> None:
        talk = self.conversation
        finished = stream(lambda **options: talk.say(line, **self.sampling, **options), quiet=self.quiet)
        if finished is None or not finished.tokens:
            note("(stopped before the first word; the turn does not count)")
        elif talk.read_again and not self.quiet:
            note("(the template changed what was said before, so that turns had to be read again)")

    def reset(self, _: str) -> None:
        self.conversation.reset()
        note("(forgotten)")

    def undo(self, _: str) -> None:
        note("(taken back)" if self.conversation.undo() else "(there is nothing to take back)")

    def save(self, name: str) -> None:
        written = self.conversation.save(_file(name, "/save"))
        note(f"(saved {', '.join(map(str, written))})")

    def load(self, name: str) -> None:
        self.conversation.load(_file(name, "/load"))
        said = [m for m in self.conversation.messages if m["role"] == "user"]
        note(f"(loaded {len(said)} turns; the last began with {said[-1]['content'][:60]!r})")

    def help(self, _: str) -> None:
        note(HELP)


def _file(name: str, command: str) -> Path:
    if not name:
        raise ValueError(f"{command} needs a file: {command} FILE")
    return Path(name).expanduser()
