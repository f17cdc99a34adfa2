"""A small run in each of several processes, which torchrun or mlx.launch starts, or in one.

python distributed_runs.py BACKEND FOLDER RUN STEPS [stop | resume] [field=value of the configuration]...
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from training_runs import Losses, trainer


def main() -> None:
    backend, folder, name, steps, *how = sys.argv[1:]
    losses, stop, resume = Losses(), "stop" in how, "resume" in how
    changes: dict[str, Any] = {"micro_batch_size": 1}
    changes |= {key: json.loads(value) for key, _, value in (text.partition("=") for text in how) if value}
    made = trainer(
        backend, Path(folder) / name, Path(folder), observers=(losses,), steps=int(steps), warmup_steps=1,
        schedule="constant", **changes,
    )  # fmt: skip
    assert made.engine.processes == int(os.environ.get("WORLD_SIZE", os.environ.get("EXPECTED", "1")))
    if stop and made.engine.process == 1:  # what one process is told, all do
        one_step = made.steps.take

        def interrupted(step: int) -> tuple[dict[str, Any], int]:
            if step == 3:
                signal.raise_signal(signal.SIGINT)
            return one_step(step)

        made.steps.take = interrupted
    assert made.train(resume=resume).interrupted is stop
    if made.engine.process == 0:
        path = Path(folder) / f"{name}.json"
        before = json.loads(path.read_text("utf-8")) if resume else {}
        path.write_text(json.dumps(before | dict(losses)), "utf-8")


def no_threads_of_gloo() -> None:
    """A process that had some when its interpreter was taken down is aborted now and then, so here always."""
    threads = Path("/proc/self/task")
    names = [(thread / "comm").read_text("utf-8") for thread in threads.iterdir()] if threads.is_dir() else []
    if any("gloo" in name for name in names):
        print(f"expected no threads of gloo at the end, found {names}", file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    atexit.register(no_threads_of_gloo)  # runs last
    main()
