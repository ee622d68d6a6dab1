"""The demo's programs: started in sessions of their own, and ended with all their children."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Program:
    """One Python program of the demo; what it prints goes to a log."""

    def __init__(self, name: str, arguments: list[str], log: Path, **environment: str) -> None:
        self.name = name
        self.log = log
        self.killed = False
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*_guard(), sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**_environment(), **environment},
                cwd=ROOT,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends them in order
            )

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def says(self, text: str) -> bool:
        return text in self.log.read_text(errors="replace")

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([f"--- {self.name}, exit status {self.status}", *lines])

    def signal(self, number: signal.Signals) -> None:
        """To the program and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def ask_to_end(self) -> None:
        if self.status is None:
            self._process.terminate()

    def wait_until(self, deadline: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """SIGKILL, on purpose."""
        self.killed = True
        self.end()

    def end(self) -> None:
        """Ends whatever is left of it."""
        self.signal(signal.SIGKILL)
        self._process.wait()


def end(programs: list[Program], patience: float) -> None:
    """Asks all to end, and ends those that have not after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    for program in programs:
        program.ask_to_end()
    for program in programs:
        program.wait_until(deadline)
        program.end()


def _environment() -> Mapping[str, str]:
    """Ours, without what would lead the demo's programs to other servers."""
    others = ("CELERY_", "NATS_", "JETSTREAM_")
    return {name: value for name, value in os.environ.items() if not name.startswith(others)}


def _guard() -> list[str]:
    """On Linux the kernel ends them should the demo be killed."""
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
