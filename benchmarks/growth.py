"""Growth, one axis at a time: a longer backlog, larger payloads, more handlers, more bridges.

As ``drain``. The time is that of ``count`` messages; of a longer backlog they are the first ones,
and the rest is purged. A figure beside that of the axis' first step says what growing costs.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.drain import BRIDGED, DIRECT, NEVER, Drain, event
from benchmarks.figures import Sample
from tests.stack import CeleryProcess

BACKLOGS = (1_000, 10_000, 100_000, 1_000_000)
PAYLOADS = (100, 1_000, 10_000, 100_000)
HANDLERS = (1, 2, 4, 8)
BRIDGES = (1, 2, 4)
#: Messages that are stored with one call.
BLOCK = 10_000


class Growth(Drain):
    """As a drain, with more of one thing."""

    _more_bridges: list[int] = []  # noqa: RUF012 - replaced, never changed

    def _meters(self) -> dict[str, Callable[[], list[int]]]:
        return {"more bridges": lambda: self._more_bridges}

    def samples(self, rounds: int, most: int) -> Iterator[Sample]:
        """All axes, in rounds; ``most`` bounds the backlog."""
        for number in range(rounds):
            turns = list(self.turns(most).items())
            for name, turn in reversed(turns) if number % 2 else turns:
                sample = turn()
                sample.variant = name
                yield sample

    def turns(self, most: int) -> dict[str, Callable[[], Sample]]:
        """Each step of each axis, by name."""
        found: dict[str, Callable[[], Sample]] = {}
        for mode in (DIRECT, BRIDGED):
            for backlog in BACKLOGS:
                if backlog <= most:
                    found[f"{mode}, backlog {backlog:,}"] = self._out_of(mode, backlog)
            for size in PAYLOADS:
                found[f"{mode}, payload {size:,} B"] = self._of_size(mode, size)
            for handlers in HANDLERS:
                found[f"{mode}, handlers {handlers}"] = self._by_type(mode, handlers)
        for bridges in BRIDGES:
            found[f"{BRIDGED}, bridges {bridges}"] = self._with_bridges(bridges)
        return found

    def _out_of(self, mode: str, backlog: int) -> Callable[[], Sample]:
        count = min(self.count, backlog)
        return lambda: self._grown(mode, map(event, range(backlog)), count, backlog)

    def _of_size(self, mode: str, size: int) -> Callable[[], Sample]:
        count = min(self.count, 50_000_000 // size)

        def sized(number: int) -> dict[str, Any]:
            return {**event(number), "payload": {"id": number, "text": "x" * size}}

        return lambda: self._grown(mode, map(sized, range(count)), count, count)

    def _by_type(self, mode: str, handlers: int) -> Callable[[], Sample]:
        def typed(number: int) -> dict[str, Any]:
            return {**event(number), "event_type": f"many{number % handlers}.created"}

        return lambda: self._grown(mode, map(typed, range(self.count)), self.count, self.count)

    def _with_bridges(self, bridges: int) -> Callable[[], Sample]:
        def turn() -> Sample:
            more = [self._bridge(number) for number in range(1, bridges)]
            self._more_bridges = [bridge.pid for bridge in more]
            try:
                return self._grown(BRIDGED, map(event, range(self.count)), self.count, self.count)
            finally:
                self._more_bridges = []
                for bridge in more:
                    bridge.stop(20)

        return turn

    def _bridge(self, number: int) -> CeleryProcess:
        bridge = self._celery(self.bridged_app, BRIDGED, "jetstream", "bridge", mark=str(number))
        bridge.wait_for("bridge is ready", 60)
        return bridge

    def _grown(
        self, mode: str, events: Iterator[dict[str, Any]], count: int, backlog: int
    ) -> Sample:
        self._pause(mode, NEVER)
        stored = 0
        while stored < backlog:
            block = list(itertools.islice(events, BLOCK))
            results = self.hubs[mode].publish_batch(block, timeout=300)
            assert all(results), next(result.error for result in results if not result)
            stored += len(block)
        return self._turn(mode, count, None, leave=backlog > count)


@contextmanager
def running(count: int) -> Iterator[Growth]:
    """A :class:`Growth` with a directory of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        Growth(Path(directory), count) as growth,
    ):
        yield growth
