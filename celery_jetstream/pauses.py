"""Handlers that a bridge dispatches no more to for a while, since their database is away. Pure.

A worker says so on its ``-NAK``. After a pause one message is dispatched, as a probe; when its end
is heard, and is no outage, all may go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .breaker import Breaker

__all__ = ("Pauses",)

#: Seconds after which a probe of which nothing was heard is followed by another.
PATIENCE = 60.0


class Pauses:
    """Which handlers pause, and which messages are their probes. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._breaker = Breaker(clock)
        self._probes: dict[int, str] = {}
        self._sent: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._breaker)

    @property
    def names(self) -> list[str]:
        """The handlers that pause, or are being tried."""
        return self._breaker.names

    def outage(self, handler: str, sequence: int) -> bool:
        """A message of a handler ended in an outage; whether that is news."""
        news = handler not in self._breaker.names
        if news or self._probes.get(sequence) == handler:
            self._breaker.fail(handler, "its database is away")
            self._forget(handler)
        return news

    def ended(self, sequence: int) -> str | None:
        """A message ended in another way; the handler that may go on for it."""
        handler = self._probes.get(sequence)
        if handler is not None:
            self._breaker.succeed(handler)
            self._forget(handler)
        return handler

    def admits(self, handler: str, sequence: int) -> bool:
        """Whether a message may be dispatched now; a probe's place is taken by asking."""
        if not self or handler not in self._breaker.names:
            return True
        sent = self._sent.get(handler)
        probing = sent is not None and self._clock() - sent < PATIENCE
        if self._breaker.is_open(handler) or (probing and self._probes.get(sequence) != handler):
            return False
        self._probes[sequence] = handler
        self._sent[handler] = self._clock()
        return True

    def may_try(self, handler: str) -> bool:
        """Whether it is worth asking again."""
        return not self._breaker.is_open(handler)

    def _forget(self, handler: str) -> None:
        self._sent.pop(handler, None)
        self._probes = {s: name for s, name in self._probes.items() if name != handler}
