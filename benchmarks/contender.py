"""What a measuring process runs: a contender prepares tasks, a task is run again and again.

A contender is made by a factory that a :class:`Spec` names, in a process of its own. No framework is imported here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Job = Mapping[str, Any]
"""What to do, as plain values: the kind of work, and its sizes. Its time should grow with ``job["size"]``."""


class Unavailable(Exception):
    """This contender cannot do this here. The message says why, and what to install."""


@dataclass(frozen=True)
class Task:
    """One job made ready by a contender.

    Args:
        run: does the work and returns when it is done. What it returns, if anything, is the time in seconds, for
            work that times itself.
        parts: how many equal parts one run has (tokens, steps); times are given per part.
        check: figures to be shown beside the time, such as the error against a reference. Called after all runs.
        warm_up: whether to run it once, untimed, before anything is measured.
    """

    run: Callable[[], float | None]
    parts: int = 1
    check: Callable[[], dict[str, float]] = field(default=dict)
    warm_up: bool = True


class Contender(Protocol):
    """An implementation that is measured."""

    def prepare(self, job: Job) -> Task:
        """The job with its inputs in memory, ready to be run.

        Raises:
            Unavailable: when this contender cannot do the job.
        """
        ...


@dataclass(frozen=True)
class Spec:
    """Which contender to start.

    Args:
        label: its name in results; unique within a case. Those of mambax start with ``mambax``.
        factory: ``"module:name"`` below ``benchmarks.contenders``.
        options: the factory's keyword arguments, as plain values.
        kinds: the kinds of job that it takes part in; all when empty.
        needs: bytes of memory that must be free before its first job.
    """

    label: str
    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    needs: int = 0


def build(factory: str, options: Mapping[str, Any]) -> Contender:
    """The contender that a factory makes.

    Raises:
        Unavailable: when something that it needs is not installed.
    """
    module, _, name = factory.partition(":")
    found = importlib.import_module(f"benchmarks.contenders.{module}")
    return getattr(found, name)(**options)


def optional(module: str, install: str) -> Any:
    """A module of another implementation.

    Raises:
        Unavailable: when it is not installed, with what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module} cannot be imported ({error}): pip install {install}") from error
