"""The processes of a chaos run, and who sees to them, as systemd would."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import alive
from tests.stack import CeleryProcess

__all__ = ("End", "Service", "children", "left_of")

#: Seconds until what has ended is started again.
RESTART = 0.3
#: By frames of Celery 5.7.0 and kombu 5.7.0 alone: ``Connection.collect()`` has dropped the
#: transport, a channel that could not be closed is closed once more, wants to restore its copies
#: through that transport, and the worker ends with 1. When Redis goes away, and not each time.
CELERYS_OWN = "Unrecoverable error: AttributeError(\"'NoneType' object has no attribute 'hostname"


@dataclass
class End:
    """How a process ended."""

    service: str
    pid: int
    status: int
    #: The signals that it was sent, in order; None where it ended by itself.
    signals: list[int]
    was_ready: bool
    log: Path
    #: By a defect of Celery's that is known, and costs no event.
    celerys_own: bool = False

    @property
    def wrong(self) -> str | None:
        """What was wrong with it.

        One that is not ready yet may be ended by SIGTERM itself, or give up: its server is away.
        """
        if (
            self.celerys_own
            or self.status == 0
            or {signal.SIGKILL, signal.SIGQUIT} & set(self.signals)
        ):
            return None
        if signal.SIGTERM in self.signals:
            early = self.status == -signal.SIGTERM and not self.was_ready
            return None if early else f"exit status {self.status} upon SIGTERM"
        return f"it ended by itself with {self.status}" if self.was_ready else None


@dataclass
class Service:
    """A program that is to run: started again when it has ended, until it is told to stop.

    Args:
        name: of the kind.
        start: starts a new process.
        ready: what its log says when it has begun.
        whole: what it has started is ended with it, as systemd does; else it ends alone.
    """

    name: str
    start: Callable[[], CeleryProcess]
    ready: str = ""
    whole: bool = False
    ends: list[End] = field(default_factory=list)
    starts: int = 0

    def __post_init__(self) -> None:
        self._ended_at = 0.0
        self._stopped = False
        self._begin()

    def _begin(self) -> None:
        self.signals: list[int] = []
        self._is_ready = not self.ready
        self.process = self.start()
        self.starts += 1

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it has begun, and runs."""
        self._is_ready = self._is_ready or self.ready in self.process.text()
        return self._is_ready and self.running

    def look(self) -> None:
        """Starts it again, a moment after it has ended."""
        if self.running or self._stopped:
            return
        if not self._ended_at:
            self._note_end()
            self._ended_at = time.monotonic()
        elif time.monotonic() - self._ended_at > RESTART:
            self._ended_at = 0.0
            self._begin()

    def send(self, number: signal.Signals, *, group: bool = False) -> bool:
        """Whether it was there to get it."""
        if not self.running:
            return False
        self.signals.append(number)
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)
        return True

    def heard(self, pid: int, number: signal.Signals) -> None:
        """If the process was its own: it has been sent a signal by another one, or by itself."""
        if self.pid == pid:
            self.signals.append(number)
        for end in self.ends:
            if end.pid == pid and end.signals is not self.signals:
                end.signals.append(number)

    def stop(self) -> None:
        """SIGTERM, and it is not started again."""
        self._stopped = True
        self.send(signal.SIGTERM)

    def wait(self, deadline: float) -> bool:
        """For its end; whether it came in time."""
        try:
            self.process.wait(max(0.1, deadline - time.monotonic()))
        except Exception:  # subprocess's own
            return False
        if not self._ended_at:
            self._note_end()
            self._ended_at = time.monotonic()
        return True

    def _note_end(self) -> None:
        said, status = self.process.text(), self.process.poll() or 0
        ready, celerys_own = self._is_ready or self.ready in said, CELERYS_OWN in said
        log = self.process.log
        self.ends.append(End(self.name, self.pid, status, self.signals, ready, log, celerys_own))
        if self.whole:
            self.process.end()


def children(pid: int) -> list[int]:
    """Of a process, oldest first."""
    try:
        return [
            int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except FileNotFoundError:
        return []


def left_of(mark: str) -> list[str]:
    """The processes that have a text in their environment, as "pid: command line"."""
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if mark.encode() in (directory / "environ").read_bytes():
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if alive(int(directory.name)):
                    found.append(f"{directory.name}: {command}")
    return found
