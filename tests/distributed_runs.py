"""A small run in each of several processes, which torchrun or mlx.launch starts, or in one.

python distributed_runs.py BACKEND FOLDER RUN STEPS [stop | resume]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from training_runs import Losses, trainer


def main() -> None:
    backend, folder, name, steps, *how = sys.argv[1:]
    losses, stop, resume = Losses(), how == ["stop"], how == ["resume"]
    made = trainer(
        backend, Path(folder) / name, Path(folder), observers=(losses,), steps=int(steps), warmup_steps=1,
        micro_batch_size=1, schedule="constant",
    )  # fmt: skip
    assert made.engine.processes == int(os.environ.get("WORLD_SIZE", os.environ.get("EXPECTED", "1")))
    if stop and made.engine.process == 1:  # what one process is told, all do
        one_step = made._one_step

        def interrupted() -> dict[str, Any]:
            if made.step == 3:
                signal.raise_signal(signal.SIGINT)
            return one_step()

        made._one_step = interrupted
    assert made.train(resume=resume).interrupted is stop
    if made.engine.process == 0:
        path = Path(folder) / f"{name}.json"
        before = json.loads(path.read_text("utf-8")) if resume else {}
        path.write_text(json.dumps(before | dict(losses)), "utf-8")


if __name__ == "__main__":
    main()
