"""A process of its own for what is measured, told what to do by lines of JSON.

The process, in whichever environment, calls :func:`serve` with its actions; the benchmark has a
:class:`Process` and calls them. Needs nothing but Python: the peers' environment has no more.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Process:
    """``python -m module '<settings>'``, and its actions.

    Args:
        python: the interpreter, and by that the environment.
        module: what to run.
        log: where its standard error goes.
        settings: what it is told at its start.
    """

    def __init__(self, python: str | Path, module: str, log: Path, **settings: Any) -> None:
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", module, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                preexec_fn=_end_with_the_parent,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()  # what serve() ends by
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Has the process do something, and waits for what it answers."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([action, arguments]).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            log = self._log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{action} failed: {answer['error']}\n{log}")
        return answer


def settings() -> dict[str, Any]:
    """What the process was told at its start."""
    told: dict[str, Any] = json.loads(sys.argv[1])
    return told


def serve(actions: Mapping[str, Callable[..., dict[str, Any] | None]]) -> None:
    """Does what it is told until there is nobody to tell it anything."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        action, arguments = json.loads(line)
        try:
            answer = actions[action](**arguments) or {}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def _end_with_the_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
