"""Outbox growth: whether a long backlog makes the outbox slow.

The rate of the first 5,000 events out of backlogs of 10,000, 100,000 and a million rows, on
PostgreSQL. One table grows; between two turns as much is written as was published. The rows that
were sent stay, as is the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks import cpu
from benchmarks.figures import Sample
from benchmarks.rig import Rig

BACKLOGS = (10_000, 100_000, 1_000_000)
FIRST = 5_000
BASE = f"{BACKLOGS[0]:,}"


class Growth:
    """One table, and its turns in the order of its growth.

    Args:
        rig: the servers.
        rounds: turns for each backlog.
        rows: the longest backlog.
    """

    def __init__(self, rig: Rig, rounds: int, rows: int) -> None:
        self._rig = rig
        self._rounds = rounds
        self._backlogs = [backlog for backlog in BACKLOGS if backlog < rows] + [rows]

    def samples(self) -> Iterator[Sample]:
        """The turns, one by one."""
        database = self._rig.database()
        with self._rig.ours(database) as client:
            client.call("create")
            pending = written = 0
            for backlog in self._backlogs:
                for _ in range(self._rounds):
                    client.call("fill_fast", first=written, count=backlog - pending)
                    written += backlog - pending
                    self._rig.settle(database, checkpoint=True)
                    meter = cpu.Meter(
                        {
                            "client": lambda: [client.pid],
                            "database": lambda: self._rig.postgres.pids,
                        }
                    )
                    answer = client.call("drain", first=FIRST)
                    used = meter.read()
                    sent = answer["sent"]
                    assert sent >= FIRST, answer
                    pending = backlog - sent
                    others = used.pop("others") / answer["seconds"]
                    yield Sample(
                        f"{backlog:,}",
                        sent / answer["seconds"],
                        {name: 1e6 * value / sent for name, value in used.items()},
                        {"others_cores": others},
                    )
        stored = self._rig.read()
        stored.check(written - pending)
        assert not stored.inversions, f"{stored.inversions} inversions"


@contextmanager
def running(rounds: int, rows: int) -> Iterator[Growth]:
    """A :class:`Growth` with servers of its own."""
    with Rig() as rig:
        yield Growth(rig, rounds, rows)
