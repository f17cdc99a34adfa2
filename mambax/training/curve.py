"""The loss curve of a run as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mambax.training.logs import read_log

PICTURE = "loss.png"


def draw(folder: Path) -> str:
    """Draw ``loss.png`` from the log of a run.

    Returns:
        What there is to say: where it is, or why there is none.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return f"no {PICTURE}: it needs matplotlib (pip install matplotlib); the numbers are in log.csv"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(read_log(folder))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, style, label=label, linewidth=1, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(folder / PICTURE))
    return f"loss curve: {folder / PICTURE}"
