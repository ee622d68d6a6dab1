"""Work that may wait for a database, done in order in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ("Aside",)

logger = logging.getLogger(__name__)

#: Seconds without work after which the thread ends.
IDLE = 60.0


class Aside:
    """One thread's queue. Thread-safe; for one process (a forked child makes its own)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._work: deque[Callable[[], None]] = deque()
        self._busy = False
        self._thread: threading.Thread | None = None

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
                work()
            except Exception:
                logger.exception("work aside failed")
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
