"""The training loop, written once over the engine of a framework.

Dimensions: B batch, L length.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambax.state import InferenceParams
from mambax.training import curve
from mambax.training.batches import Batch, EvaluationData, TrainingData
from mambax.training.checkpoints import Checkpoints
from mambax.training.config import HARMLESS, TrainingConfig
from mambax.training.engine import make_engine
from mambax.training.evaluation import Evaluation, continued, evaluate, known
from mambax.training.interrupts import Interrupts
from mambax.training.logs import Log
from mambax.training.weights import by_path, copy_adapter

Observer = Callable[[str, Mapping[str, Any]], None]
"""Called with what happened ("start", "step", "evaluation", "checkpoint", "note", "end") and its numbers."""

MODEL, ADAPTER, CHECKPOINTS = "model", "adapter", "checkpoints"


class NotFinite(ArithmeticError):
    """A loss or a gradient that is NaN or infinite. Nothing was learnt from it."""


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
    ``loss.png`` the curve, and ``model/`` at the end the best model in Hugging Face layout.

    Args:
        model: a model of a backend that has gradients, in float32. It is trained in place.
        data: what to learn from; :mod:`mambax.training.token_data` has most of what one needs.
        config: how.
        run: the folder; made if need be.
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
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.best: tuple[int, Evaluation] | None = None
        self.evaluation: Evaluation | None = None
        self._evaluated_at = self._saved_at = -1
        self._states: dict[int, InferenceParams] = {}  # of each part of a batch, where they are carried on
        self._schedule = config.make_schedule()
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
            OSError: when something cannot be written; the last checkpoint stays as it is.
        """
        self._open(resume)
        self._log = Log(self.run, self.step) if self.engine.process == 0 else None
        self._tell("start", {"step": self.step, "steps": self.config.steps})
        began, first_token = time.perf_counter(), self.tokens
        before = self.seconds
        try:
            with Interrupts() as interrupts:
                while self.step < self.config.steps and not self._asked(interrupts):
                    record = self._one_step()
                    spent = time.perf_counter() - began
                    self.seconds = before + spent
                    self._show(record, (self.tokens - first_token) / max(spent, 1e-9))
                    if self._due(self.config.eval_every):
                        self._evaluate()
                    if self._due(self.config.save_every):
                        self._save()
                return self._finish()
        finally:
            self._tell("end", {"step": self.step})
            if self._log is not None:
                self._log.close()

    def _asked(self, interrupts: Interrupts) -> bool:
        """Whether any process was asked to stop."""
        if self.engine.processes == 1:
            return interrupts.asked
        return self.engine.sum_over_processes([float(interrupts.asked)])[0] > 0

    def _one_step(self) -> dict[str, Any]:
        """Gradients of all parts of the batch, and an update."""
        whole = self.data.batch(self.step)
        engine, items = self.engine, max(1, whole.items)
        first = whole.rows * engine.process // engine.processes
        batch = whole.part(first, whole.rows * (engine.process + 1) // engine.processes)
        size = self.config.micro_batch_size or batch.rows
        loss = right = 0.0
        for i, start in enumerate(range(0, batch.rows, size)):
            rows = batch.part(start, min(start + size, batch.rows))
            part = engine.accumulate(rows, items, self._state(i, rows), last=start + size >= batch.rows)
            if not math.isfinite(part.loss):
                self._refuse("the loss", part.loss, first + start, rows)
            if self.data.carries_state:
                self._states[i] = part.state
            loss += part.loss
            right += part.accuracy * rows.items if rows.items else 0.0
        engine.reduce_gradients()
        loss, right = engine.sum_over_processes([loss, right])
        norm = engine.clip_gradients(self.config.clip_norm)
        if not math.isfinite(norm):
            self._refuse("the norm of the gradient", norm, first, batch)
        rate = self._schedule(self.step)
        engine.update(rate)
        self.step += 1
        self.tokens += whole.tokens
        return {"loss": loss, "accuracy": known(right / items), "learning_rate": rate, "gradient_norm": norm}

    def _state(self, i: int, rows: Batch) -> InferenceParams | None:
        return continued(self.model, rows, self._states.get(i)) if self.data.carries_state else None

    def _refuse(self, what: str, value: float, first: int, rows: Batch) -> None:
        raise NotFinite(
            f"step {self.step}: {what} is {value} (rows {first} to {first + rows.rows - 1} of its batch), so that "
            f"training stopped before the update; {self._last_good()}. Try a lower learning_rate, a longer "
            "warmup_steps or a smaller clip_norm, and look at the data of this step"
        )

    def _last_good(self) -> str:
        last = self.checkpoints.latest()
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0 and self.step < self.config.steps

    def _show(self, record: dict[str, Any], speed: float) -> None:
        record = {"step": self.step, **record, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
        record |= {"tokens_per_second": round(speed, 1), "memory": self.engine.memory()}
        left = (self.config.steps - self.step) * self.seconds / self.step
        self._tell("step", record | {"steps": self.config.steps, "seconds_left": left})
        every = self.config.log_every
        if self._log is not None and every and (self.step % every == 0 or self.step in (1, self.config.steps)):
            self._log.write(record)

    def _tell(self, kind: str, record: Mapping[str, Any]) -> None:
        if self.engine.process == 0:
            for observer in self.observers:
                observer(kind, record)

    # --- evaluation and checkpoints --------------------------------------------------------------------------

    def _evaluate(self) -> None:
        if self.validation is None or self._evaluated_at == self.step:
            return
        found = self.evaluation = evaluate(self.engine, self.validation)
        if not math.isfinite(found.loss):
            raise NotFinite(
                f"step {self.step}: the validation loss is {found.loss}; {self._last_good()}. Look at those data"
            )
        self._evaluated_at = self.step
        record = {"step": self.step, **found.record()}
        if self._log is not None:
            self._log.write(record)
        self._tell("evaluation", record)
        if self.best is None or found.loss < self.best[1].loss:
            self.best = (self.step, found)
            self._save()

    def _save(self) -> Path:
        info = {
            "config": self.config.to_dict(),
            "data": self.data.fingerprint(),
            "backend": self.model.nn.name,
            "processes": self.engine.processes,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "best": None if self.best is None else {"step": self.best[0], **vars(self.best[1])},
            "evaluation": None
            if self.evaluation is None
            else {"step": self._evaluated_at, **vars(self.evaluation)},
        }
        path = self.checkpoints.path(self.step)
        if self._saved_at != self.step:
            self._saved_at = self.step
            path = self.checkpoints.write(self.step, self.engine, list(self._states.values()), info)
            self._tell("checkpoint", {"step": self.step, "path": str(path)})
        if self.engine.process == 0:
            self.checkpoints.prune({self.step} | ({self.best[0]} if self.best else set()))
        return path

    def _finish(self) -> Summary:
        done = self.step >= self.config.steps
        if done:
            self._evaluate()
        path = self._save()
        model = self._write_model(path) if done else None
        if done and self.engine.process == 0:
            self._tell("note", {"text": curve.draw(self.run)})
        best_step, best = self.best or (None, None)
        return Summary(self.step, not done, self.evaluation, best, best_step, path, model)

    def _write_model(self, last: Path) -> Path:
        """Put the best model where it is easy to find."""
        from mambax.checkpoint import load

        best = last if self.best is None else self.checkpoints.path(self.best[0])
        adapted = self.model.adapter is not None
        target = self.run / (ADAPTER if adapted else MODEL)
        if self.engine.process == 0 and adapted:
            copy_adapter(best, target)
        elif self.engine.process == 0:
            load(best, backend="numpy", dtype="float32").save_pretrained(target)
        self.engine.sum_over_processes([0.0])  # until it is there
        return target

    # --- resuming --------------------------------------------------------------------------------------------

    def _open(self, resume: bool) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        last = self.checkpoints.latest()
        if resume and last is None:
            raise ValueError(f"{self.run}: there is no checkpoint to resume from; train without resume to begin")
        if not resume and last is not None:
            raise ValueError(
                f"{self.run}: the folder has a run already, up to {last.name}; resume it, or name another folder"
            )
        if last is not None:
            self._resume(last)

    def _resume(self, path: Path) -> None:
        saved = self.checkpoints.read(path, self.engine.process)
        self._check_same(saved.info, path)
        self.engine.restore(by_path(self.model, saved.weights), saved.arrays)
        self._states = {i: self.model.load_state(state) for i, state in enumerate(saved.states)}
        info = saved.info
        self.step, self.tokens, self.seconds = info["step"], info["tokens"], info["seconds"]
        self._saved_at = self.step
        self.best = _evaluation(info["best"])
        self._evaluated_at, self.evaluation = _evaluation(info["evaluation"]) or (-1, None)
        self.engine.sum_over_processes([0.0])  # until all have read it
        if self.engine.process == 0:
            self.checkpoints.prune({self.step} | ({self.best[0]} if self.best else set()))

    def _check_same(self, info: Mapping[str, Any], path: Path) -> None:
        old, new = info["config"], self.config.to_dict()
        new = {key: list(value) if isinstance(value, tuple) else value for key, value in new.items()}
        different = [
            f"{key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} now"
            for key in sorted(old.keys() | new.keys())
            if key not in HARMLESS and old.get(key) != new.get(key)
        ]
        if info["data"] != self.data.fingerprint():
            different.append(f"data: {info['data']!r} in the checkpoint, {self.data.fingerprint()!r} now")
        if info["backend"] != self.model.nn.name:
            different.append(f"backend: {info['backend']!r} in the checkpoint, {self.model.nn.name!r} now")
        before, now = info.get("processes", 1), self.engine.processes
        if self.data.carries_state and before != now:
            different.append(f"processes: {before} in the checkpoint, {now} now, and their rows carry states")
        if different:
            raise ValueError(
                f"{path}: not resumed, because the run would not be the same one:\n  "
                + "\n  ".join(different)
                + "\nUse the values of the checkpoint, or begin another run in another folder"
            )


def _evaluation(numbers: Mapping[str, Any] | None) -> tuple[int, Evaluation] | None:
    """(step, evaluation) as a checkpoint has it."""
    if numbers is None:
        return None
    return numbers["step"], Evaluation(**{name: value for name, value in numbers.items() if name != "step"})
