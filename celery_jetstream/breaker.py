"""A circuit breaker: what does not answer is left alone for a while, then asked once.

Keeps one circuit for each name (a subject, or :data:`EVERYTHING`). Pure, but for the clock.
Thread-safe: each step is one dictionary operation.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ("EVERYTHING", "Breaker")

#: The circuit of the server as a whole.
EVERYTHING = ""
#: Seconds: the first pause, and the longest.
PAUSE = (0.5, 10.0)


@dataclass(frozen=True)
class _Circuit:
    error: str
    since: float
    until: float
    pause: float


class Breaker:
    """Open circuits, each with the time at which it may be tried again (jittered, doubling)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._circuits: dict[str, _Circuit] = {}

    def __bool__(self) -> bool:
        """Whether anything is left alone, or being tried."""
        return bool(self._circuits)

    def fail(self, name: str, error: str) -> None:
        """It failed: leave it alone for twice as long as last time."""
        now, before = self._clock(), self._circuits.get(name)
        least, most = PAUSE
        pause = least if before is None else min(most, before.pause * 2)
        until = now + pause * random.uniform(0.5, 1.0)
        since = now if before is None else before.since
        self._circuits[name] = _Circuit(error, since, until, pause)

    def succeed(self, name: str) -> None:
        """It works."""
        self._circuits.pop(name, None)

    def reset(self) -> None:
        """Everything may have changed: a new connection."""
        self._circuits.clear()

    def is_open(self, name: str) -> bool:
        """Whether it is to be left alone now."""
        circuit = self._circuits.get(name)
        return circuit is not None and self._clock() < circuit.until

    def is_trying(self, name: str) -> bool:
        """Whether it failed, and may now be asked once."""
        circuit = self._circuits.get(name)
        return circuit is not None and self._clock() >= circuit.until

    def error(self, name: str) -> str | None:
        """Why it is open, or was last."""
        circuit = self._circuits.get(name)
        return None if circuit is None else circuit.error

    def failing_for(self, name: str) -> float:
        """Seconds since it began to fail; 0 where it does not."""
        circuit = self._circuits.get(name)
        return 0.0 if circuit is None else self._clock() - circuit.since

    def tell(self) -> dict[str, Any]:
        """What is left alone, as plain values: ``outage`` (why all is) and ``subjects``."""
        return {
            "outage": self.error(EVERYTHING),
            "subjects": {name: self.error(name) for name in self.open_names},
        }

    @property
    def names(self) -> list[str]:
        """What failed and has not worked since, but for :data:`EVERYTHING`."""
        return [name for name in list(self._circuits) if name != EVERYTHING]

    @property
    def open_names(self) -> list[str]:
        """What is to be left alone now, but for :data:`EVERYTHING`."""
        return [name for name in self.names if self.is_open(name)]
