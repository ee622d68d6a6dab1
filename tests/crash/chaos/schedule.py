"""What is broken, when and for how long: all of it follows from a seed.

What the processes do meanwhile does not, so a seed may have to be tried several times.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

__all__ = ("BOTH", "BRIDGE", "POINTS", "Fault", "Volley", "plan", "ways")


@dataclass(frozen=True)
class Fault:
    """One thing that is broken.

    Attributes:
        how: a signal's name; "FLUSHALL", "restart"; or "at" a named point.
        what: a process, a server, or the point.
        after: seconds from the volley's beginning.
        lasts: seconds of a standstill or of a server's absence; with SIGTERM (or SIGQUIT, Celery's
            cold shutdown) to a process, until SIGKILL follows.
        which: from 0 to 1, one of several processes.
    """

    how: str
    what: str
    after: float = 0.0
    lasts: float = 0.0
    which: float = 0.0

    @property
    def name(self) -> str:
        """As in the report."""
        return f"{self.how} {self.what}"

    def __str__(self) -> str:
        return f"+{self.after:.1f} s {self.name} ({self.lasts:.1f} s, {self.which:.2f})"


@dataclass(frozen=True)
class Volley:
    """Faults at about the same time, after so many seconds in which all went well."""

    pause: float
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.faults))


_SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM")
#: A worker or flusher: its main process, or all of it at once (systemd's default for SIGTERM).
_WORKERS = ("worker", "worker with children", "flusher", "flusher with children")
BOTH = (
    *((how, what) for how in _SIGNALS for what in (*_WORKERS, "child", "nats-server")),
    *(("SIGKILL", "flusher's child"), ("SIGSTOP", "flusher's child"), ("SIGKILL", "writer")),
    ("SIGQUIT", "worker"),
    *(("SIGKILL", "Redis"), ("SIGSTOP", "Redis"), ("FLUSHALL", "Redis")),
    *(("SIGKILL", "PostgreSQL"), ("SIGSTOP", "PostgreSQL"), ("restart", "PostgreSQL")),
)
#: In direct mode there is no bridge, and beat is its flusher's (``worker -B``) and ends with it.
BRIDGE = tuple((how, what) for how in _SIGNALS for what in ("bridge", "beat"))

#: Where a process is ended in the middle of something; in the name, what it is of.
POINTS = (
    "outbox-claimed",
    "outbox-sending",
    "outbox-published",
    "outbox-flushed",
    "writer-committing",
    "writer-committed",
    "worker-received",
    "handler-begun",
    "handler-done",
    "handler-failing",
    "handler-committed",
    "around-effect",
    "settled",
    "dead-lettered",
)
BRIDGE_POINTS = ("bridge-received", "bridge-dispatched")
#: At these the worker's main process is killed as well as the child.
PARENTS = ("outbox-published", "handler-done", "handler-committed", "settled")


def ways(direct: bool) -> list[tuple[str, str]]:
    """All ways to break something: how, and what."""
    points = POINTS if direct else (*POINTS, *BRIDGE_POINTS)
    return [
        *BOTH,
        *(() if direct else BRIDGE),
        *(("SIGKILL at", point) for point in points),
        *(("SIGKILL of the parent at", point) for point in PARENTS),
    ]


def plan(seed: int, direct: bool, volleys: int) -> list[Volley]:
    """The volleys of a seed. A shorter plan is the beginning of a longer one."""
    dice = random.Random(f"{seed}, {'direct' if direct else 'bridge'}")
    return list(islice(_volleys(dice, _drawn(dice, ways(direct))), volleys))


def _drawn(dice: random.Random, ways: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Each once, then each once more."""
    while True:
        yield from dice.sample(ways, len(ways))


def _volleys(dice: random.Random, drawn: Iterator[tuple[str, str]]) -> Iterator[Volley]:
    while True:
        count = dice.choices((1, 2, 3), (5, 3, 2))[0]
        faults = [
            _fault(dice, how, what, 0.0 if number == 0 else dice.uniform(0, 1.5))
            for number, (how, what) in enumerate(islice(drawn, count))
        ]
        yield Volley(dice.uniform(0.3, 2), tuple(faults))


def _fault(dice: random.Random, how: str, what: str, after: float) -> Fault:
    lasts = dice.choice((0.0, dice.uniform(0, 4)))
    if how == "SIGSTOP":
        lasts = dice.uniform(0.3, dice.choice((2, 6, 6, 15)))
    elif how in ("SIGTERM", "SIGQUIT"):
        lasts = dice.choice((10.0, 45.0))
    return Fault(how, what, round(after, 2), round(lasts, 2), round(dice.random(), 2))
