"""What a person sees of a run: a bar on a terminal, plain lines elsewhere; both on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


class Progress:
    """An observer of a :class:`mambax.training.Trainer`.

    Args:
        every: steps between plain lines; 0 for none.
        quiet: say nothing.
    """

    def __init__(self, every: int = 10, *, quiet: bool = False) -> None:
        self.every = every
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._began: tuple[float, int] | None = None

    def __call__(self, kind: str, record: Mapping[str, Any]) -> None:
        """Show what happened; kinds are those of :class:`mambax.training.Trainer`."""
        if not self.quiet:
            getattr(self, f"_{kind}")(record)

    def _start(self, record: Mapping[str, Any]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True, highlight=False)
        if console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}"))
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task("", total=record["steps"], completed=record["step"], numbers="")
            self._bar.start()

    def _step(self, record: Mapping[str, Any]) -> None:
        numbers = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
        if record.get("memory"):
            numbers += f"  {record['memory'] / 2**20:,.0f} MiB"
        numbers += f"  {_time(record['seconds_left'])} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], numbers=numbers)
        elif self.every and record["step"] % self.every == 0:
            self._say(f"step {record['step']}/{record['steps']}  {numbers}")

    def _evaluation(self, record: Mapping[str, Any]) -> None:
        parts = [f"step {record['step']}: validation loss {record['validation_loss']:.4f}"]
        for name, label in (
            ("perplexity", ""),
            ("bits_per_byte", ""),
            ("nats_per_character", ""),
            ("accuracy", ""),
        ):
            value = record.get(f"validation_{name}")
            if value is not None and value == value:
                parts.append(f"{label or name.replace('_', ' ')} {value:.4f}")
        self._say(", ".join(parts))

    def _checkpoint(self, record: Mapping[str, Any]) -> None:
        if self._bar is None:
            self._say(f"step {record['step']}: saved {record['path']}")

    def _note(self, record: Mapping[str, Any]) -> None:
        self._say(record["text"])

    def _end(self, record: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
