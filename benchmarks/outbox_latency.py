"""Outbox latency: from the commit of a lone event until JetStream has stored it, in milliseconds.

Each event has a transaction of its own, some time after the one before, and nothing else happens.
The commit's time is taken when ``commit()`` has returned, the other one is the stream's; both are
of one clock. A turn's figure is its median; the 95th percentile and the worst are beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from benchmarks import cpu
from benchmarks.figures import Sample
from benchmarks.outbox import PEERS
from benchmarks.process import Process
from benchmarks.rig import Database, Rig, missing_peers
from celery_jetstream.testing import wait_until
from tests.servers import RedisServer, missing
from tests.stack import CeleryProcess

BASE = "ours, connected"
#: Seconds between two events.
GAP = 0.05
#: Events before those that count.
WARM_UP = 5
WORKER = ("worker", "-l", "WARNING", "-c", "1", "--without-gossip", "--without-mingle",
          "--without-heartbeat", "-O", "fair", "-Q", "outbox", "-n", "outbox@%h")  # fmt: skip
RELAY = ("jetstream", "outbox", "relay")


class Latency:
    """The servers, and the variants that can run here."""

    def __init__(self, rig: Rig, count: int) -> None:
        self._rig = rig
        self._count = count
        self.left_out: list[str] = []
        self.variants: dict[str, Callable[[], Sample]] = {
            BASE: lambda: self._turn(BASE, self._connected),
            "ours, by the relay": lambda: self._turn("ours, by the relay", self._relay),
        }
        if reason := missing("redis"):
            self.left_out.append(f"ours, by a task: {reason}")
        else:
            self.variants["ours, by a task"] = lambda: self._turn("ours, by a task", self._task)
        for name in ("faststream", "nats-outbox"):
            if reason := missing_peers():
                self.left_out.append(f"{name}: {reason}")
            else:
                self.variants[name] = self._turn_of_peer(name)

    # -- the variants: each gives the process that writes ----------------------------------------

    def _connected(self, stack: ExitStack, database: Database) -> Process:
        """The process that writes is connected to NATS, and flushes itself."""
        writer = stack.enter_context(self._rig.ours(database, nudged=True))
        writer.call("create")
        writer.call("connect")
        return writer

    def _task(self, stack: ExitStack, database: Database) -> Process:
        """It is not, and has a Celery worker do it."""
        redis = stack.enter_context(RedisServer())
        conf = {"broker_url": redis.url, "jetstream_outbox_queue": "outbox"}
        writer = stack.enter_context(self._rig.ours(database, nudged=True, conf=conf))
        writer.call("create")
        self._celery(stack, database, conf, *WORKER)
        return writer

    def _relay(self, stack: ExitStack, database: Database) -> Process:
        """Nobody nudges; the relay looks by itself."""
        writer = stack.enter_context(self._rig.ours(database))
        writer.call("create")
        self._celery(stack, database, {"broker_url": "memory://"}, *RELAY)
        return writer

    def _celery(
        self, stack: ExitStack, database: Database, conf: dict[str, Any], *arguments: str
    ) -> None:
        settings = {"database": database.url, "nats": self._rig.nats.url, "conf": conf}
        log = self._rig.directory / f"{database.name}-{arguments[0]}.log"
        process = CeleryProcess(
            log,
            [sys.executable, "-m", "celery", "-A", "benchmarks.app_outbox", *arguments],
            {"BENCH_CONF": json.dumps(settings)},
        )

        def stop() -> None:
            with suppress(Exception):
                process.stop(20)

        stack.callback(stop)
        self._processes.append(process)

    # -- a turn ----------------------------------------------------------------------------------

    def _turn(self, name: str, start: Callable[[ExitStack, Database], Process]) -> Sample:
        self._processes: list[CeleryProcess] = []
        database = self._rig.database()
        self._rig.delete_stream()
        with ExitStack() as stack:
            return self._measure(name, database, start(stack, database))

    def _turn_of_peer(self, name: str) -> Callable[[], Sample]:
        peer = PEERS[name]

        def start(stack: ExitStack, database: Database) -> Process:
            self._rig.create_stream()
            relay, writer = (
                stack.enter_context(self._rig.peer(peer.module, database, dict(peer.options)))
                for _ in range(2)
            )
            writer.call("create")
            relay.call("start")
            return writer

        return lambda: self._turn(name, start)

    def _measure(self, name: str, database: Database, writer: Process) -> Sample:
        writer.call("write", count=WARM_UP, gap=GAP)
        self._wait_stored(WARM_UP)
        time.sleep(0.5)
        self._rig.purge()
        meter = cpu.Meter({})
        began = time.perf_counter()
        committed = writer.call("write", count=self._count, gap=GAP)["committed"]
        self._wait_stored(self._count)
        others = meter.read()["others"] / (time.perf_counter() - began)
        stored = self._rig.read()
        stored.check(self._count)
        assert not stored.inversions
        took = sorted(
            1e3 * at - committed[number] / 1e6
            for (number, _), at in zip(stored.events, stored.times, strict=True)
        )
        more = {
            "p95": took[max(0, round(0.95 * len(took)) - 1)],
            "max": took[-1],
            "all_cores": others,
        }
        return Sample(name, statistics.median(took), {}, more)

    def _wait_stored(self, count: int) -> None:
        def is_stored() -> bool:
            for process in self._processes:
                assert process.process.poll() is None, process.text()[-3000:]
            return self._rig.stored >= count

        wait_until(is_stored, 60, f"{count} events to be stored")


@contextmanager
def running(count: int) -> Iterator[Latency]:
    """A :class:`Latency` with servers of its own."""
    with Rig() as rig:
        yield Latency(rig, count)
