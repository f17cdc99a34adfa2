"""What a run writes down: ``log.jsonl``, ``log.csv``, and TensorBoard's events where it is installed."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

JSONL, CSV, EVENTS = "log.jsonl", "log.csv", "tensorboard"
COLUMNS: tuple[str, ...] = (
    "step", "loss", "accuracy", "learning_rate", "gradient_norm", "tokens", "seconds", "tokens_per_second",
    "memory", "validation_loss", "validation_accuracy", "validation_perplexity", "validation_bits_per_byte",
    "validation_nats_per_character", "validation_items",
)  # fmt: skip
"""Names of the numbers in a record; a record of a step has some, of an evaluation others."""


class Log:
    """The records of a run, one to a line, each on the disk when it is written.

    Args:
        folder: the run.
        after: drop records of later steps, which a run that was killed wrote after its last checkpoint.
    """

    def __init__(self, folder: Path, after: int = 0) -> None:
        self.folder = folder
        kept = [record for record in read_log(folder) if record["step"] <= after]
        temporary = folder / f".{JSONL}.tmp"
        temporary.write_text("".join(_line(record) for record in kept), encoding="utf-8", newline="\n")
        os.replace(temporary, folder / JSONL)
        with (folder / CSV).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")  # of a run that another version began
            writer.writeheader()
            writer.writerows(kept)
        self._events = _events(folder / EVENTS)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record."""
        with (self.folder / JSONL).open("a", encoding="utf-8", newline="\n") as file:
            file.write(_line(record))
        with (self.folder / CSV).open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(record)
        if self._events is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Finish TensorBoard's events."""
        if self._events is not None:
            self._events.close()


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a run; a last line that was cut short is left out.

    Raises:
        ValueError: for another line that is not a record.
    """
    path = folder / JSONL
    if not path.is_file():
        return
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(
                f"{path}, line {number}: expected a record of a step, found {line[:60]!r}; delete the line, or the "
                "file to begin the log anew"
            )
        yield record


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(dict(record)) + "\n"


def _events(folder: Path) -> Any:
    """TensorBoard's writer; None where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]

    return Writer(str(folder))
