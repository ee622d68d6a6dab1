"""Work that may wait for a database, done in order in a thread of its own.

No child is forked in the middle of it: SQLite's mutexes (and whatever else a driver has) would be
locked in the child for ever. A worker forks a new child just when an old one was killed, and that
is when there is work here.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ("Aside",)

logger = logging.getLogger(__name__)

#: Seconds without work after which the thread ends.
IDLE = 60.0
#: Seconds that a fork waits for the work that is being done; a database may hang.
FORK_PATIENCE = 10.0


class Aside:
    """One thread's queue. Thread-safe; for one process (a forked child makes its own)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._at_work = threading.RLock()
        self._work: deque[Callable[[], None]] = deque()
        self._busy = False
        self._thread: threading.Thread | None = None
        _all.add(self)

    def put(self, work: Callable[[], None]) -> None:
        """Has it done soon; does not wait. What it raises is logged."""
        with self._changed:
            self._work.append(work)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="celery-jetstream-aside", daemon=True
                )
                self._thread.start()

    def drain(self, timeout: float) -> int:
        """Waits until all is done, ``timeout`` seconds at the most; returns what is left."""
        end = time.monotonic() + timeout
        with self._changed:
            while self._left and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._left

    @property
    def _left(self) -> int:
        return len(self._work) + self._busy

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._work and not self._changed.wait(IDLE) and not self._work:
                    self._thread = None
                    return
                if not self._work:
                    continue
                work, self._busy = self._work.popleft(), True
            try:
                with self._at_work:
                    work()
            except Exception:
                logger.exception("work aside failed")
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()


# -- forks -----------------------------------------------------------------------------------------

_all: weakref.WeakSet[Aside] = weakref.WeakSet()
_held: list[Any] = []


def _wait_for_work() -> None:
    for aside in list(_all):
        if aside._at_work.acquire(timeout=FORK_PATIENCE):
            _held.append(aside._at_work)
        else:
            logger.warning("a child is forked while a database hangs: it may hang as well")


def _go_on() -> None:
    while _held:
        _held.pop().release()


def _forget_in_child() -> None:
    _held.clear()
    _all.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_wait_for_work, after_in_parent=_go_on, after_in_child=_forget_in_child
    )
