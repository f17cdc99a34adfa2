"""Several processes of a run when something goes wrong in one of them: all end, each with a message, none waits.

Here they are threads, so that a process that waits for one which has gone is seen at once; test_distributed.py and
the last test of this file have real ones.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import WITH_GRADIENTS, backend_params
from training_runs import TEXT, tokens, trainer

from mambax.registry import is_installed
from mambax.training import Trainer, curve, prepared, setup
from mambax.training.processes import Processes, ProcessFailed, started_by
from mambax.training.recipe import parse
from mambax.training.together import lost_means_failed
from mambax.training.token_files import write_tokens

BACKEND = next((name for name in WITH_GRADIENTS if name in backend_params(WITH_GRADIENTS)), "")
pytestmark = pytest.mark.skipif(not BACKEND, reason="needs torch or mlx")


class LeftBehind(RuntimeError):
    """The other process has gone, and this one would have waited for it for ever."""


class Meeting:
    """Where two threads add up numbers, as processes do."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.come, self.gone = [0, 0], [False, False]
        self.values: list[list[float]] = [[], []]

    def wait(self, own: int) -> None:
        with self.changed:
            self.come[own] += 1
            self.changed.notify_all()
            here = self.come[own]
            self.changed.wait_for(lambda: self.come[1 - own] >= here or self.gone[1 - own], timeout=60)
            if self.come[1 - own] < here:
                raise LeftBehind(f"process {own}")

    def leave(self, own: int) -> None:
        with self.changed:
            self.gone[own] = True
            self.changed.notify_all()

    def sum(self, own: int, values: Any) -> list[float]:
        self.values[own] = list(values)
        self.wait(own)
        total = [a + b for a, b in zip(*self.values, strict=True)]
        self.wait(own)
        return total

    def processes(self, own: int) -> Processes:
        return Processes(own, 2, lambda: self.wait(own))


def both(work: Callable[[int, Meeting], Any]) -> list[Any]:
    """What each of two processes returns or raises."""
    meeting = Meeting()
    found: list[Any] = [None, None]

    def one(own: int) -> None:
        try:
            found[own] = work(own, meeting)
        except (ValueError, OSError, RuntimeError) as error:
            found[own] = error
        finally:
            meeting.leave(own)

    threads = [threading.Thread(target=one, args=(own,)) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(isinstance(error, LeftBehind) for error in found), found
    return found


def spread(tmp_path: Path, own: int, meeting: Meeting, **options: Any) -> Trainer:
    """A trainer that takes itself for one of two processes."""
    options = {"micro_batch_size": 1} | options
    made = trainer(BACKEND, tmp_path / "run", tmp_path, **options)
    engine: Any = made.engine
    engine.process, engine.processes = own, 2
    engine.sum_over_processes = lambda values: meeting.sum(own, values)
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    tokens(tmp_path)
    tokens(tmp_path, "held out", TEXT[:100])
    return tmp_path


def steps_in(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())


def full(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


FAILURES = {
    "the weights": lambda made: setattr(made.engine, "save_model", full),
    "older checkpoints": lambda made: setattr(made.checkpoints, "prune", full),
    "the log": lambda made: setattr(made._log, "write", full),
}
"""What fails in process 0 after step 5, at whose end it writes a checkpoint."""


@pytest.mark.parametrize("what", FAILURES)
def test_what_process_0_cannot_write_ends_all_of_them(data, what):
    def work(own: int, meeting: Meeting) -> Any:
        def fails(kind: str, record: Any) -> None:
            if kind == "step" and record["step"] == 5:
                FAILURES[what](made)

        made = spread(data, own, meeting, observers=(fails,))
        return made.train()

    first, second = both(work)
    assert isinstance(first, OSError)
    assert first.errno == errno.ENOSPC
    assert "training stopped after step 5; the last good checkpoint is" in str(first)
    assert "Make room for it" in str(first)
    assert isinstance(second, ProcessFailed)
    assert "process 1 stops, because process 0 failed while" in str(second)
    assert "step-00000004" in steps_in(data)
    assert not [name for name in steps_in(data) if name.startswith(".")]


def test_what_another_process_cannot_write_ends_process_0(data, monkeypatch):
    def work(own: int, meeting: Meeting) -> Any:
        made = spread(data, own, meeting)
        if own:
            take = made.steps.take

            def fail_to_save(step: int) -> Any:
                taken = take(step)
                if step == 3:
                    for state in made.steps.states:
                        state.save = full
                return taken

            made.steps.take = fail_to_save
        return made.train()

    first, second = both(work)
    assert isinstance(first, ProcessFailed)
    assert "process 0 stops, because process 1 failed while writing a checkpoint" in str(first)
    assert isinstance(second, OSError)
    assert steps_in(data) == ["step-00000002"]


@pytest.mark.parametrize("at_the_end", ["export", "draw"])
def test_what_process_0_cannot_write_at_the_end(data, monkeypatch, at_the_end):
    def work(own: int, meeting: Meeting) -> Any:
        made = spread(data, own, meeting, steps=2)
        if at_the_end == "export" and not own:
            made.engine.export = full
        return made.train()

    if at_the_end == "draw":
        monkeypatch.setattr(curve, "draw", full)
    first, second = both(work)
    assert isinstance(first, OSError)
    assert isinstance(second, ProcessFailed)
    assert steps_in(data) == ["step-00000002"]


# --- states of other processes -----------------------------------------------------------------------------------


def test_states_of_every_process_must_be_there(data):
    both(lambda own, meeting: spread(data, own, meeting, steps=4).train())
    path = data / "run" / "checkpoints" / "step-00000004"
    names = {"state-0.safetensors", "state-1.safetensors", "state-1-0.safetensors", "state-1-1.safetensors"}
    assert json.loads((path / "training.json").read_text("utf-8"))["states"].keys() == names

    def resume(own: int, meeting: Meeting) -> Any:
        return spread(data, own, meeting, steps=4).train(resume=True)

    assert [summary.step for summary in both(resume)] == [4, 4]
    missing = path / "state-1-1.safetensors"
    kept = missing.read_bytes()
    missing.unlink()
    for error in both(resume):
        assert isinstance(error, ValueError)
        assert "expected the states that its rows carry on, 4 files" in str(error)
        assert "found 3 of them: state-1-1.safetensors is missing; copy all files" in str(error)
        assert "To go on from the one before, delete this folder" in str(error)
    shutil.copyfile(path / "state-1-0.safetensors", missing)
    first, second = both(resume)
    assert isinstance(first, ProcessFailed)
    assert "state-1-1.safetensors is not the state that was saved" in str(second)
    missing.write_bytes(kept)
    assert [summary.step for summary in both(resume)] == [4, 4]


def test_a_checkpoint_from_before_states_were_listed(data):
    both(lambda own, meeting: spread(data, own, meeting, steps=4).train())
    path = data / "run" / "checkpoints" / "step-00000004" / "training.json"
    info = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(info | {"states": 2}), "utf-8")

    def resume(own: int, meeting: Meeting) -> Any:
        made = spread(data, own, meeting, steps=4)
        made.train(resume=True)
        return len(made.steps.states)

    assert both(resume) == [2, 2]


def test_another_number_of_processes(data):
    both(lambda own, meeting: spread(data, own, meeting, steps=4).train())
    with pytest.raises(ValueError, match="processes: 2 in the checkpoint, 1 now, and their rows carry states"):
        trainer(BACKEND, data / "run", data, steps=4, micro_batch_size=1).train(resume=True)


# --- the tokens --------------------------------------------------------------------------------------------------


def recipe_of(tmp_path: Path, text: Path) -> Any:
    return parse(
        {
            "run": str(tmp_path / "runs" / "run"), "backend": BACKEND,
            "model": {"d_model": 8, "n_layer": 1, "d_state": 4},
            "data": {"train": [str(text)], "tokenizer": "bytes", "length": 16},
            "training": {"steps": 2, "batch_size": 2},
        }, "here",
    )  # fmt: skip


def test_process_0_alone_makes_the_tokens(tmp_path, monkeypatch):
    """Even where the copy of the text that another process has is of another time."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    made = {"first": setup.check(recipe_of(tmp_path, text))}
    os.utime(text, (1, 1))
    made["second"] = setup.check(recipe_of(tmp_path, text))
    writers = []

    def write(*arguments: Any, **options: Any) -> Any:
        writers.append(threading.current_thread().name)
        return write_tokens(*arguments, **options)

    monkeypatch.setattr(prepared, "write_tokens", write)

    def work(own: int, meeting: Meeting) -> Any:
        checked = made["second" if own else "first"]
        return setup.build(checked, meeting.processes(own)).data.fingerprint()

    first, second = both(work)
    assert first == second
    assert len(writers) == 2  # to learn from and held out
    assert len(set(writers)) == 1


def test_bad_text_ends_all_processes_and_leaves_nothing(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": TEXT}) + "\n{bad\n", "utf-8")
    checked = setup.check(recipe_of(tmp_path, text))
    first, second = both(lambda own, meeting: setup.build(checked, meeting.processes(own)))
    assert isinstance(first, ValueError)
    assert "text.jsonl, line 2: not valid JSON" in str(first)
    assert isinstance(second, ProcessFailed)
    assert "process 0 has not made the tokens" in str(second)
    assert list(tmp_path.iterdir()) == [text]


# --- processes that are gone, and how to start them ---------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10660. GLHF!\nmore",
        "[ring] connection to a peer was lost",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ],
)
def test_a_process_that_was_killed(data, said):
    made = trainer(BACKEND, data / "run", data)
    made.engine.processes = 2

    def lost(values: Any) -> Any:
        raise RuntimeError(said)

    made.engine.sum_over_processes = lost
    with pytest.raises(ProcessFailed, match="process 0 stops, because another process has ended") as caught:
        made.train()
    assert "GLHF" not in str(caught.value)


def test_other_errors_of_a_framework_stay_as_they_are(data):
    with pytest.raises(RuntimeError, match=r"^out of memory$"), lost_means_failed(0, 2):
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$"), lost_means_failed(0, 1):
        raise RuntimeError("Connection closed by peer")


def test_what_begins_a_command():
    assert started_by("torch", 1) == started_by("mlx", 1) == "mambax"
    assert started_by("torch", 4) == "torchrun --nproc-per-node=4 -m -- mambax.cli"
    assert started_by("mlx", 2) == "mlx.launch -n 2 -- command.py"


def test_every_command_that_is_shown_ends_the_options_of_its_launcher():
    """torchrun -m mambax.cli train --run ... fails: torchrun has options that begin so."""
    root = Path(__file__).resolve().parent.parent
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("mambax/**/*.py")]
    shown = [line for page in pages for line in page.read_text("utf-8").splitlines() if "mambax.cli" in line]
    launched = [line for line in shown if "torchrun" in line or "torch.distributed.run" in line]
    assert launched
    assert all("-m -- mambax.cli" in line for line in launched), launched


# --- as a person starts it ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("torch"), reason="needs torch")
@pytest.mark.skipif(sys.platform == "win32", reason="gloo is tried on Linux and macOS")
def test_a_checkpoint_that_cannot_be_written_by_the_command_in_two_processes(tmp_path):
    """The form of the command is that of the documentation, with --run for mambax and not for torchrun."""
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT, "utf-8")
    run.mkdir()
    (run / "checkpoints").write_text("in the way", "utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    small = ["-s", "data.tokenizer=bytes", "--length", "16", "--d-model", "8", "--n-layer", "1", "--steps", "1",
             "--batch-size", "2", "--device", "cpu", "-b", "torch"]  # fmt: skip
    command = [*launcher, "-m", "--", "mambax.cli", "train", "--run", str(run), "--text", str(text), *small]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 1
    assert done.stderr.count("training stopped after step 1; there is no checkpoint yet") == 1, done.stderr
    assert "Connection closed by peer" not in done.stderr
