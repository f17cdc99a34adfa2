"""Work that all processes come through, or none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from mambax.training.engine import Engine
from mambax.training.processes import ProcessFailed

_LOST = re.compile(
    r"connection (closed|reset) by peer|connection to a peer was lost|broken pipe|remote process exit", re.I
)
"""What gloo, MLX's ring and NCCL say when a process that they wait for has ended."""


class Together:
    """Within it, what fails in one process fails in all of them, so that none waits for one that has gone.

    The process in which something failed raises that; the others raise :class:`ProcessFailed`. It ends with a sum
    over all processes, which each of them must reach, and does nothing where there is only one.

    Args:
        engine: of this process.
        doing: what is done meanwhile, for the message: ``"writing the log"``.
    """

    def __init__(self, engine: Engine, doing: str) -> None:
        self.engine, self.doing = engine, doing

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        own, count = self.engine.process, self.engine.processes
        if count == 1:
            return
        mine = [float(error is not None and number == own) for number in range(count)]
        failed = [number for number, value in enumerate(self.engine.sum_over_processes(mine)) if value]
        if failed and error is None:
            raise ProcessFailed(
                f"process {own} stops, because process {failed[0]} failed while {self.doing}; the message of "
                f"process {failed[0]} says why"
            )


@contextmanager
def lost_means_failed(process: int, processes: int) -> Iterator[None]:
    """Within it, what a framework says of a process that has ended without a word is a :class:`ProcessFailed`.

    Args:
        process: the number of this process.
        processes: how many there are.
    """
    try:
        yield
    except RuntimeError as error:
        said = _LOST.search(str(error))
        if processes == 1 or said is None:
            raise
        raise ProcessFailed(
            f"process {process} stops, because another process has ended: the message of that one, or of what "
            f"ended it, says why ({said[0]})"
        ) from error
