"""How much a worker of direct mode holds: as many messages as begin soon, by its own pace."""

from __future__ import annotations

import time
from collections.abc import Callable

from celery.worker import state as worker_state

__all__ = ("MOST_AHEAD", "Pace")

#: Seconds of work that a worker holds beside what it runs, by the pace of its last tenth of one.
AHEAD = 0.2
#: The most messages that it holds so.
MOST_AHEAD = 256
#: Seconds without a beginning after which nothing is known of the pace.
PACE_KEPT = 0.25


class Pace:
    """How many messages it is worth to have ready: those that begin in the next 0.2 s.

    Those of the whole pool: beside a broker's tasks, ours alone would take the less room the less
    room they had.

    Args:
        clock: of seconds.
        total: how many tasks the pool has begun.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        total: Callable[[], int] = lambda: int(worker_state.all_total_count[0]),
    ) -> None:
        self._clock = clock
        self._total = total
        self._since = self._last = clock()
        self._before = total()
        self._rate = 0.0

    def began(self) -> None:
        """One has begun."""
        now, total = self._clock(), self._total()
        if now - self._last > PACE_KEPT:
            self._since, self._before, self._rate = now, total, 0.0
        self._last = now
        if now - self._since >= AHEAD / 2:
            self._rate = (total - self._before) / (now - self._since)
            self._since, self._before = now, total

    def ahead(self) -> int:
        """So many."""
        if self._clock() - self._last > PACE_KEPT:
            return 0
        return min(MOST_AHEAD, int(self._rate * AHEAD))
