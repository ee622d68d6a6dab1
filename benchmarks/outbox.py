"""Outbox: how fast a full one is emptied, by ours and by the peers, each in its own process.

A turn: an empty database and an empty stream, a few rows to warm up, then the backlog is written;
the clock runs from the word to go until no row is pending, and the stream must hold each event
once. PostgreSQL is as it comes, with fsync; it counts the statements and the dead row versions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks import cpu
from benchmarks.figures import Sample
from benchmarks.process import Process
from benchmarks.rig import Counted, Database, Rig, Stored, missing_peers
from tests.servers import missing

BASE, WITHOUT_PEERS = "nats-outbox", "ours"
BEST_PEER = "faststream 16/1000/100"
WARM_UP = 200
#: Seconds that a turn may take.
PATIENCE = 300


@dataclass(frozen=True)
class Ours:
    """A variant of ours: where, and with what."""

    database: str = "postgresql"
    ordered: bool = True
    conf: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """A variant of a peer: who, with what, and what its pending rows are."""

    module: str
    pending: str
    options: Mapping[str, Any] = field(default_factory=dict)


NATS_OUTBOX = ("benchmarks.peer_nats_outbox", "outbox_events WHERE status = 'pending'")
FASTSTREAM = ("benchmarks.peer_faststream", "outbox")
PEERS = {
    "nats-outbox": Peer(*NATS_OUTBOX),
    "nats-outbox 1000": Peer(*NATS_OUTBOX, {"batch_size": 1000}),
    "faststream": Peer(*FASTSTREAM),
    BEST_PEER: Peer(
        *FASTSTREAM,
        {"max_workers": 16, "fetch_batch_size": 1000, "terminal_flush_batch_size": 100},
    ),
}
OURS = {
    "ours": Ours(),
    "ours, deleted": Ours(conf={"jetstream_outbox_retention": 0}),
    "ours, unordered": Ours(ordered=False),
    "ours on MariaDB": Ours("mariadb"),
    "ours on SQLite": Ours("sqlite"),
}


class Outbox:
    """The servers, and the variants that can run here."""

    def __init__(self, rig: Rig, count: int) -> None:
        self._rig = rig
        self._count = count
        self.variants: dict[str, Callable[[], Sample]] = {}
        self.left_out: list[str] = []
        for name, peer in PEERS.items():
            if reason := missing_peers():
                self.left_out.append(f"{name}: {reason}")
            else:
                self.variants[name] = self._turn_of_peer(name, peer)
        for name, ours in OURS.items():
            if ours.database == "mariadb" and (reason := missing("mariadb")):
                self.left_out.append(f"{name}: {reason}")
            else:
                self.variants[name] = self._turn_of_ours(name, ours)

    def _turn_of_ours(self, name: str, ours: Ours) -> Callable[[], Sample]:
        def turn() -> Sample:
            database = self._rig.database(ours.database)
            self._rig.delete_stream()
            with self._rig.ours(database, ordered=ours.ordered, conf=dict(ours.conf)) as client:
                client.call("create")
                client.call("fill", first=-WARM_UP, count=WARM_UP)
                client.call("drain")
                self._fill(client, database)
                meter = self._meter(client, database)
                start = time.perf_counter()
                answer = client.call("drain")
                took = time.perf_counter() - start
                used = meter.read()
                assert answer["sent"] == self._count, answer
                assert not answer["duplicates"], answer
                assert "pending" not in client.call("pending")["rows"]
            counted = self._counted(database, answer["statements"])
            return self._sample(name, database, took, used, counted, ordered=ours.ordered)

        return turn

    def _turn_of_peer(self, name: str, peer: Peer) -> Callable[[], Sample]:
        def turn() -> Sample:
            database = self._rig.database()
            self._rig.delete_stream()
            self._rig.create_stream()
            with self._rig.peer(peer.module, database, dict(peer.options)) as client:
                client.call("create")
                client.call("fill", first=-WARM_UP, count=WARM_UP)
                client.call("start")
                self._rig.wait_drained(database, WARM_UP, peer.pending, PATIENCE)
                client.call("stop")
                self._fill(client, database)
                meter = self._meter(client, database)
                start = time.perf_counter()
                client.call("start")
                end = self._rig.wait_drained(database, self._count, peer.pending, PATIENCE)
                used = meter.read()
                client.call("stop")
            counted = self._counted(database, 0)
            return self._sample(name, database, end - start, used, counted, ordered=False)

        return turn

    def _fill(self, client: Process, database: Database) -> None:
        self._rig.purge()
        client.call("fill", first=0, count=self._count)
        self._rig.settle(database)

    def _meter(self, client: Process, database: Database) -> cpu.Meter:
        return cpu.Meter(
            {
                "client": lambda: [client.pid],
                "database": lambda: self._rig.pids(database.kind),
                "nats": lambda: [self._rig.nats.pid],
            }
        )

    def _counted(self, database: Database, statements: int) -> Counted | int:
        return self._rig.counted(database) if database.kind == "postgresql" else statements

    def _sample(
        self,
        name: str,
        database: Database,
        took: float,
        used: Mapping[str, float],
        counted: Counted | int,
        *,
        ordered: bool,
    ) -> Sample:
        stored: Stored = self._rig.read()
        stored.check(self._count)
        assert not (ordered and stored.inversions), f"{stored.inversions} inversions"
        self._rig.drop(database)
        count = self._count
        more = {
            "inversions": float(stored.inversions),
            "others_cores": used["others"] / took,
        }
        if isinstance(counted, Counted):
            more |= {
                "statements": counted.statements / count,
                "dead": counted.dead / (count + WARM_UP),
                "hot": counted.hot / (count + WARM_UP),
                "wal": counted.wal / count,
            }
        else:
            more["statements"] = counted / count
        process_cpu = {group: 1e6 * used[group] / count for group in ("client", "database", "nats")}
        return Sample(name, count / took, process_cpu, more)


@contextmanager
def running(count: int) -> Iterator[Outbox]:
    """An :class:`Outbox` with servers of its own."""
    with Rig() as rig:
        yield Outbox(rig, count)
