"""The training loop, written once over the engine of a framework.

What a step computes is in :mod:`mambax.training.steps`, what is written in :mod:`mambax.training.checkpoints`.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambax.training import curve
from mambax.training.batches import EvaluationData, TrainingData
from mambax.training.checkpoints import Checkpoints
from mambax.training.config import TrainingConfig
from mambax.training.engine import make_engine
from mambax.training.evaluation import Evaluation, evaluate
from mambax.training.interrupts import Interrupts
from mambax.training.logs import Log
from mambax.training.resuming import Evaluated, check_same, from_plain, identity, to_plain
from mambax.training.steps import NotFinite, Steps
from mambax.training.together import Together, lost_means_failed

Observer = Callable[[str, Mapping[str, Any]], None]
"""Called with what happened ("start", "step", "evaluation", "checkpoint", "note", "end") and its numbers."""

MODEL, ADAPTER, CHECKPOINTS = "model", "adapter", "checkpoints"


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        step: optimiser steps done.
        interrupted: whether it was stopped before its end, and can be resumed.
        evaluation: the last one; None without validation data.
        best, best_step: the evaluation with the lowest loss, and when it was; None without any.
        checkpoint: the last one.
        model: the model of the best step (the last one without evaluation), or the adapters of one that has
            adapters; None when interrupted.
    """

    step: int
    interrupted: bool
    evaluation: Evaluation | None
    best: Evaluation | None
    best_step: int | None
    checkpoint: Path
    model: Path | None


class Trainer:
    """Trains a model and keeps everything about it in one folder.

    ``log.jsonl`` and ``log.csv`` hold the numbers, ``checkpoints/`` the last state of the run and its best one,
    ``loss.png`` the curve, and ``model/`` at the end the best model in Hugging Face layout. Of several processes,
    each makes a trainer; process 0 logs and says what happens.

    Args:
        model: a model of a backend that has gradients, in float32. It is trained in place.
        data: what to learn from; :mod:`mambax.training.token_data` has most of what one needs.
        config: how.
        run: the folder; made if need be. Of several processes, one that all of them see.
        validation: what to evaluate on, or None.
        observers: called as things happen, :class:`mambax.training.Progress` for one.

    Raises:
        ValueError: when the model cannot be trained; see :func:`mambax.training.engine.make_engine`.
    """

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        config: TrainingConfig,
        run: str | os.PathLike[str],
        *,
        validation: EvaluationData | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.model, self.data, self.config = model, data, config
        self.run = Path(run).expanduser()
        self.validation = validation
        self.observers = tuple(observers)
        self.engine = make_engine(model, config)
        self.checkpoints = Checkpoints(self.run / CHECKPOINTS)
        self.steps = Steps(self.engine, data, config, self._last_good)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.best: Evaluated | None = None
        self.evaluated: Evaluated | None = None
        self._saved_at = -1
        self._log: Log | None = None

    # --- the loop --------------------------------------------------------------------------------------------

    def train(self, *, resume: bool = False) -> Summary:
        """Train to the last step.

        Ctrl-C finishes the step, saves and returns. A killed run goes on from its last checkpoint and gives the
        same losses as one that was not killed.

        Args:
            resume: go on from the last checkpoint in the folder.

        Raises:
            NotFinite: when the loss or a gradient is NaN or infinite.
            ValueError: for a folder with checkpoints that is not resumed, one without that is, and a checkpoint of
                another configuration or other data, naming what differs.
            OSError: when something cannot be written, as on a full disk; the last checkpoint stays as it is.
            ProcessFailed: when another process raised one of these, or has ended.
        """
        with lost_means_failed(self.engine.process, self.engine.processes):
            return self._train(resume)

    def _train(self, resume: bool) -> Summary:
        with Together(self.engine, "opening the run"):
            last = self._open(resume)
        if last is not None:
            self._resume(last)
        try:
            with Together(self.engine, "opening the log"):
                self._log = Log(self.run, self.step) if self.engine.process == 0 else None
            self._tell("start", {"step": self.step, "steps": self.config.steps})
            with Interrupts() as interrupts:
                return self._run(interrupts)
        except OSError as error:
            raise self._stopped_by(error) from error
        finally:
            if self.engine.process == 0:
                self._observe("end", {"step": self.step})
            if self._log is not None:
                self._log.close()

    def _run(self, interrupts: Interrupts) -> Summary:
        began, first_token = time.perf_counter(), self.tokens
        before = self.seconds
        while self.step < self.config.steps and not self._asked(interrupts):
            numbers, tokens = self.steps.take(self.step)
            self.step += 1
            self.tokens += tokens
            spent = time.perf_counter() - began
            self.seconds = before + spent
            self._show(numbers, (self.tokens - first_token) / max(spent, 1e-9))
            if self._due(self.config.eval_every):
                self._evaluate()
            if self._due(self.config.save_every):
                self._save()
        return self._finish()

    def _asked(self, interrupts: Interrupts) -> bool:
        """Whether any process was asked to stop."""
        if self.engine.processes == 1:
            return interrupts.asked
        return self.engine.sum_over_processes([float(interrupts.asked)])[0] > 0

    def _stopped_by(self, error: OSError) -> OSError:
        """The same error with what it means for the run, and what to do."""
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = f"Make room for it on {self.run}" if full else "Put that right"
        checkpoint = self.checkpoints.latest()
        again = "go on with resume=True (--resume on the command line)" if checkpoint else "begin again"
        text = f"{what}; training stopped after step {self.step}; {self._last_good()}. {advice}, and {again}"
        return OSError(error.errno, text) if error.errno else OSError(text)

    def _last_good(self) -> str:
        last = self.checkpoints.latest()
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0 and self.step < self.config.steps

    def _show(self, numbers: dict[str, Any], speed: float) -> None:
        record = {"step": self.step, **numbers, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
        record |= {"tokens_per_second": round(speed, 1), "memory": self.engine.memory()}
        left = (self.config.steps - self.step) * self.seconds / self.step
        every = self.config.log_every
        due = bool(every) and (self.step % every == 0 or self.step in (1, self.config.steps))
        told = record | {"steps": self.config.steps, "seconds_left": left}
        self._tell("step", told, logged=record if due else None)

    def _tell(self, kind: str, record: Mapping[str, Any], *, logged: Mapping[str, Any] | None = None) -> None:
        """Say what happened and write it down, in process 0; where that fails, all processes stop."""
        with Together(self.engine, f"writing the log ({kind})"):
            if self.engine.process == 0:
                self._observe(kind, record)
                if logged is not None and self._log is not None:
                    self._log.write(logged)

    def _observe(self, kind: str, record: Mapping[str, Any]) -> None:
        for observer in self.observers:
            observer(kind, record)

    # --- evaluation and checkpoints --------------------------------------------------------------------------

    def _evaluate(self) -> None:
        if self.validation is None or (self.evaluated and self.evaluated[0] == self.step):
            return
        found = evaluate(self.engine, self.validation)
        if not math.isfinite(found.loss):
            raise NotFinite(
                f"step {self.step}: the validation loss is {found.loss}; {self._last_good()}. Look at those data"
            )
        self.evaluated = (self.step, found)
        record = {"step": self.step, **found.record()}
        self._tell("evaluation", record, logged=record)
        if self.best is None or found.loss < self.best[1].loss:
            self.best = self.evaluated
            self._save()

    def _save(self) -> Path:
        path = self.checkpoints.path(self.step)
        if self._saved_at != self.step:
            info = identity(self.config, self.data, self.engine) | {
                "tokens": self.tokens,
                "seconds": round(self.seconds, 3),
                "best": to_plain(self.best),
                "evaluation": to_plain(self.evaluated),
            }
            path = self.checkpoints.write(self.step, self.engine, self.steps.states, info)
            self._saved_at = self.step
            self._tell("checkpoint", {"step": self.step, "path": str(path)})
        self._prune()
        return path

    def _prune(self) -> None:
        """Keep the last checkpoint and the best."""
        with Together(self.engine, "deleting older checkpoints"):
            if self.engine.process == 0:
                self.checkpoints.prune({self.step} | ({self.best[0]} if self.best else set()))

    def _finish(self) -> Summary:
        done = self.step >= self.config.steps
        if done:
            self._evaluate()
        path = self._save()
        model = self._write_model(path) if done else None
        if done:
            self._draw()
        best_step, best = self.best or (None, None)
        last = None if self.evaluated is None else self.evaluated[1]
        return Summary(self.step, not done, last, best, best_step, path, model)

    def _write_model(self, last: Path) -> Path:
        """Put the best model where it is easy to find."""
        best = last if self.best is None else self.checkpoints.path(self.best[0])
        target = self.run / (MODEL if self.model.adapter is None else ADAPTER)
        with Together(self.engine, "writing the model"):
            self.engine.export(best, target)
        return target

    def _draw(self) -> None:
        with Together(self.engine, "drawing the curve"):
            if self.engine.process == 0:
                self._observe("note", {"text": curve.draw(self.run)})

    # --- resuming --------------------------------------------------------------------------------------------

    def _open(self, resume: bool) -> Path | None:
        """The folder; the checkpoint to go on from, None for a run that begins."""
        last = self.checkpoints.latest()
        if resume and last is None:
            raise ValueError(f"{self.run}: there is no checkpoint to resume from; train without resume to begin")
        if not resume and last is not None:
            raise ValueError(
                f"{self.run}: the folder has a run already, up to {last.name}; resume it, or name another folder"
            )
        self.run.mkdir(parents=True, exist_ok=True)
        return last

    def _resume(self, path: Path) -> None:
        with Together(self.engine, "reading the checkpoint"):
            saved = self.checkpoints.read(path, self.engine.process)
            check_same(saved.info, identity(self.config, self.data, self.engine), self.data, path)
            self.best, self.evaluated = (from_plain(saved.info[name], path) for name in ("best", "evaluation"))
            self.steps.states = [self.model.load_state(state) for state in saved.states]
        with Together(self.engine, "reading the checkpoint"):
            self.engine.load(path)
        info = saved.info
        self.step, self.tokens, self.seconds = info["step"], info["tokens"], info["seconds"]
        self._saved_at = self.step
        self._prune()
