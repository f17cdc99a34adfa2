"""Draw ``tasks.png`` from ``tasks.csv``: what selective and time-invariant models reach in the tasks of the guide.

    python docs/curves/task_curves.py

``tasks.csv`` is what ``examples/classify.py`` and ``examples/induction.py`` printed, in per cent. Needs matplotlib.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PANELS = (
    ("copying", "steps", "Selective copying: while it learns", "optimiser steps"),
    ("induction", "length", "Induction heads: learnt at 256 tokens", "tokens of a row"),
)
MODELS = ("selective", "time-invariant")


def read() -> list[dict[str, str]]:
    """The rows of the table."""
    with (FOLDER / "tasks.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def panel(axes: Any, rows: list[dict[str, str]], key: str) -> None:
    """One line for each model, over the numbers of a column."""
    for model, style in zip(MODELS, ("o-", "s--"), strict=True):
        points = [(int(row[key]), float(row["right"])) for row in rows if row["model"] == model]
        axes.plot(*zip(*points, strict=True), style, label=model, markersize=4, linewidth=1.2)
    axes.axhline(100 / 16, color="grey", linewidth=0.8, linestyle=":", label="by chance")
    axes.set_ylim(0, 104)
    axes.grid(alpha=0.3)


def draw(path: Path) -> None:
    """Write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = read()
    for axes, (task, key, title, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        panel(axes, [row for row in rows if row["task"] == task], key)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
        axes.set_ylabel("right answers, %")
        if key == "length":
            axes.set_xscale("log", base=2)
            lengths = sorted({int(row[key]) for row in rows if row["task"] == task})
            axes.set_xticks(lengths, [str(length) for length in lengths])
    figure.axes[0].legend()
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    draw(FOLDER / "tasks.png")
