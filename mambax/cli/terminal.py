"""What is written where: a model's text alone on stdout, everything about it on stderr."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from mambax.conversation import interrupt
from mambax.generation import Generation, GenerationMixin, StreamEvent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but for tab and newline. A terminal obeys them, so a model must not print them there."""


def stderr() -> Console:
    """A console on what is stderr now."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """Say something about the work on stderr."""
    stderr().print(text, style="dim", markup=False, soft_wrap=True)


def write(text: str) -> None:
    """Write a model's text to stdout now; on a terminal with control characters made visible."""
    if sys.stdout.isatty():
        text = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def bar(label: str, *, in_bytes: bool = False, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, gone when it is done; none where stderr is not a terminal.

    Yields:
        What to call with (done, total).
    """
    from rich import progress as rich_progress

    console = stderr()
    if quiet or not console.is_terminal:
        yield lambda done, total: None
        return
    amount = rich_progress.DownloadColumn() if in_bytes else rich_progress.MofNCompleteColumn()
    columns = (rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(), amount)
    with rich_progress.Progress(*columns, console=console, transient=True) as progress:
        yield partial(_advance, progress, progress.add_task(label, total=None))


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def stream(start: Callable[..., Iterator[StreamEvent]], *, quiet: bool = False) -> Generation | None:
    """Run a generation: a bar while the prompt is read, then its text as it comes, then how fast it went.

    Ctrl-C ends it with what was produced.

    Args:
        start: begins it; called with ``progress=``.
        quiet: write the text alone.

    Returns:
        The finished row; None when Ctrl-C came before the first token.
    """
    seen = _Seen()
    with bar("Reading the prompt", quiet=quiet) as progress:

        def advance(done: int, total: int) -> None:
            seen.prompt = total
            progress(done, total)

        events = start(progress=advance)
        try:
            seen.take(next(events))
        except KeyboardInterrupt:
            return None
    try:
        write(seen.text)
        for event in events:
            write(seen.take(event))
    except KeyboardInterrupt:
        for event in interrupt(events):
            write(seen.take(event))
    finally:
        if seen.text and not seen.text.endswith("\n"):
            write("\n")
    if not quiet:
        note(seen.summary())
    return seen.generation


class _Seen:
    """What a generation has produced, and when."""

    def __init__(self) -> None:
        self.start = self.first = self.last = time.perf_counter()
        self.prompt = 0
        self.tokens = 0
        self.text = ""  # the latest that was not empty
        self.generation: Generation | None = None

    def take(self, event: StreamEvent) -> str:
        """Count an event in; return its text."""
        self.last = time.perf_counter()
        if self.tokens == 0:
            self.first = self.last
        self.tokens += event.token is not None
        self.text = event.text or self.text
        self.generation = event.generation
        return event.text

    def summary(self) -> str:
        """Tokens, seconds, and why it ended."""
        read = self.first - self.start
        parts = [f"prompt: {self.prompt} tokens in {read:.2f} s ({self.prompt / max(read, 1e-9):.1f} tokens/s)"]
        wrote = self.last - self.first
        rate = f" in {wrote:.2f} s ({(self.tokens - 1) / wrote:.1f} tokens/s)" if self.tokens > 1 and wrote else ""
        parts.append(f"text: {self.tokens} tokens{rate}")
        if self.generation is not None:
            parts.append(f"ended by {self.generation.finish_reason}")
        return "; ".join(parts)


def size(number: int) -> str:
    """A number of bytes, for people."""
    value, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def require_text_model(model: Any, name: str) -> Any:
    """The model, if it can write text.

    Raises:
        ValueError: when it is not a causal language model, or has no tokenizer.
    """
    if not isinstance(model, GenerationMixin):
        raise ValueError(f"{name} is a {type(model).__name__}; expected a causal language model to write text")
    if model.tokenizer is None:
        raise ValueError(
            f"{name} has no tokenizer, so it cannot read text; put a tokenizer.json beside its weights"
        )
    return model
