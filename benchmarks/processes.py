"""A measuring process seen from the harness: requests, answers, time limits, and what is known of a crash."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.contender import Spec

ROOT = Path(__file__).resolve().parent.parent
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Failed(Exception):
    """The process crashed or took too long; the message is for the results."""


class Skipped(Exception):
    """The contender is not available for this; the message is for the results."""


def environment(threads: int) -> dict[str, str]:
    """The environment of a measuring process: so many threads in every library, no network."""
    names = ("OMP", "MKL", "OPENBLAS", "VECLIB_MAXIMUM", "NUMEXPR")
    limits = {f"{name}_NUM_THREADS": str(threads) for name in names}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **limits, **offline, **quiet, "PYTHONPATH": path, "PYTHONUTF8": "1"}


class Process:
    """One contender in a process of its own.

    Args:
        spec: the contender.
        threads: how many threads it may use.
    """

    def __init__(self, spec: Spec, threads: int) -> None:
        self.spec = spec
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 closed in end
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT, env=environment(threads), encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._ended = False
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, do: str, timeout: float, **values: Any) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            Skipped: when the contender says that it cannot do this here.
            Failed: when the process ended, or did not answer within `timeout` seconds; it is gone then.
        """
        assert self._process.stdin is not None
        if self._ended:
            raise Failed("its process has ended")
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.end()
            raise Failed(f"stopped after {timeout:.0f} s without an answer") from None
        except OSError:
            line = None
        if line is None:
            raise Failed(self._last_words())
        answer = json.loads(line)
        if "unavailable" in answer:
            raise Skipped(answer["unavailable"])
        return answer

    def end(self) -> None:
        """End the process, at once."""
        self._ended = True
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._errors):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except OSError:  # what was still to be written to a process that is gone
                    continue

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._answers.put(line)
        self._answers.put(None)

    def _last_words(self) -> str:
        """Why it ended: the exit status and the last line that it wrote, without the paths of this machine."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        self.end()
        words = _ESCAPES.sub("", lines[-1])[:300] if lines else "nothing on standard error"
        for path in (str(ROOT), tempfile.gettempdir(), str(Path.home())):
            words = words.replace(path, "...")
        return f"ended with status {status}: {words}"
