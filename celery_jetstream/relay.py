"""The relay: a process that flushes the outbox for as long as it runs."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any

from .exceptions import ConfigurationError, OutboxUnavailableError
from .flusher import FlushResult

__all__ = ("Drain", "Relay")

logger = logging.getLogger(__name__)

#: ``Outbox.drain``.
Drain = Callable[[float, Callable[[], bool]], FlushResult]

#: Seconds of one flush; between two, commands get at the buckets' leases, even where there is
#: always something to publish.
FLUSH, GAP = 3.0, 0.04
#: Seconds between two looks, at the most: at an idle outbox, and in an outage.
IDLE, OUTAGE = 0.5, 2.0
#: Seconds until :meth:`Relay.stop` is noticed.
TICK = 0.05


class Relay:
    """Flushes again and again until it is stopped. No outage ends it.

    Args:
        drain: ``Outbox.drain``.
        interval: seconds between two looks at an idle outbox; they grow to 0.5 s.
        once: end when the outbox is empty.
    """

    def __init__(self, drain: Drain, *, interval: float = 0.2, once: bool = False) -> None:
        self._drain = drain
        self._interval = interval
        self._once = once
        self._stopped = False
        self._trouble: str | None = None
        self._turned = time.monotonic()
        self.sent = 0

    def tell(self) -> dict[str, Any]:
        """How it is, as plain values (docs/reference/health.md). Any thread; does not wait."""
        return {
            "sent": self.sent,
            "trouble": self._trouble,
            "turned": round(time.monotonic() - self._turned, 1),
        }

    def stop(self) -> None:
        """Ends :meth:`run` within seconds; from a signal handler or any thread."""
        self._stopped = True

    def run(self) -> None:
        """Relays until :meth:`stop`, or with ``once`` until nothing is due.

        Raises:
            ConfigurationError: at start, the tables are not there.
        """
        pause = self._interval
        started = False
        while not self._stopped:
            self._turned = time.monotonic()
            try:
                result = self._drain(FLUSH, lambda: self._stopped)
            except ConfigurationError as error:
                if not started:
                    raise
                self._out(str(error))  # migrations are under way, or the database is another
                pause = self._wait(pause, OUTAGE)
            except OutboxUnavailableError as error:
                self._out(str(error))
                pause = self._wait(pause, OUTAGE)
            except Exception:
                logger.exception("the relay's flush failed; another follows")
                pause = self._wait(max(pause, 1.0), OUTAGE)
            else:
                started = True
                self._heed(result)
                if self._once and not (result.outage or result.more or result.busy):
                    return
                if result.sent:
                    pause = self._interval
                if result.more and result.sent:
                    self._sleep(random.uniform(0.5, 1.0) * GAP)
                else:
                    pause = self._wait(pause, OUTAGE if result.outage else IDLE)

    def _heed(self, result: FlushResult) -> None:
        self.sent += result.sent
        if result.outage:
            self._out(result.outage)
        elif self._trouble is not None:
            logger.info("the outbox is published again")
            self._trouble = None

    def _out(self, trouble: str) -> None:
        if self._trouble is None:
            logger.warning("the outbox waits for the end of an outage: %s", trouble)
        self._trouble = trouble

    def _wait(self, pause: float, most: float) -> float:
        """Waits, with jitter; returns how long to wait the next time."""
        most = max(most, self._interval)
        pause = min(pause, most)
        self._sleep(random.uniform(0.5, 1.0) * pause)
        return min(most, pause * 1.5)

    def _sleep(self, seconds: float) -> None:
        """Not by an Event: a signal handler must not need its lock."""
        end = time.monotonic() + seconds
        while not self._stopped and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, TICK))
