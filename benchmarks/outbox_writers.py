"""Outbox writers: what an event in the transaction costs those who write it.

``outbox-writers``: commits per second of a small business transaction (one order) from 1 and 8
threads, without an event, with one, and with one whose commit nudges a flush; beside them one with
PostgreSQL's NOTIFY instead, and somebody who listens. A flush that is nudged runs in the same
process meanwhile, and publishes what was committed: that is part of the price.

``outbox-add``: events per second written in one transaction, before its commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from sqlalchemy import text

from benchmarks import cpu
from benchmarks.figures import Sample
from benchmarks.process import Process
from benchmarks.rig import Database, Rig
from tests.servers import RedisServer, missing

BASE, ADD_BASE = "order alone, 1", "INSERT"
#: Seconds that a turn lasts.
SECONDS = 3.0
THREADS = (1, 8)
#: Events in one transaction, and transactions, of ``outbox-add``.
SIZE, TRANSACTIONS = 100, 50
#: What else there is in the transaction, and how its commit is told of.
KINDS = {
    "order alone": ("nothing", "nobody"),
    "event": ("event", "nobody"),
    "event, nudge here": ("event", "here"),
    "event, nudge by task": ("event", "task"),
    "event, NOTIFY": ("notify", "nobody"),
}


class Writers:
    """The servers, and the variants that can run here."""

    def __init__(self, rig: Rig, seconds: float = SECONDS) -> None:
        self._rig = rig
        self._seconds = seconds
        self.left_out: list[str] = []
        self.variants: dict[str, Callable[[], Sample]] = {}
        for threads in THREADS:
            for kind, (extra, nudge) in KINDS.items():
                if nudge == "task" and (reason := missing("redis")):
                    self.left_out.append(f"{kind}, {threads}: {reason}")
                    continue
                name = f"{kind}, {threads}"
                self.variants[name] = self._commits(name, extra, nudge, threads)
        self.adding = {name: self._adds(name) for name in (ADD_BASE, "add", "add_many")}

    def _commits(self, name: str, extra: str, nudge: str, threads: int) -> Callable[[], Sample]:
        def turn() -> Sample:
            database = self._rig.database()
            self._rig.delete_stream()
            with ExitStack() as stack:
                writer = self._writer(stack, database, nudge)
                if extra == "notify":
                    listener = stack.enter_context(self._rig.watch(database.name))
                    listener.execute(text("LISTEN bench"))
                meter = self._meter(writer)
                answer = writer.call("commit", threads=threads, seconds=self._seconds, extra=extra)
                used = meter.read()
                if extra != "nothing":
                    self._check(writer, answer["commits"])
            self._rig.drop(database)
            count, took = answer["commits"], answer["seconds"]
            more = {"add_us": answer["add_us"], "others_cores": used.pop("others") / took}
            each = {group: 1e6 * seconds / count for group, seconds in used.items()}
            return Sample(name, count / took, each, more)

        return turn

    def _writer(self, stack: ExitStack, database: Database, nudge: str) -> Process:
        conf = {}
        if nudge == "task":  # nobody takes them: their sending is what is measured
            conf = {"broker_url": stack.enter_context(RedisServer()).url}
        writer = stack.enter_context(self._rig.ours(database, nudged=nudge != "nobody", conf=conf))
        writer.call("create")
        if nudge == "here":
            writer.call("connect")
        return writer

    def _check(self, writer: Process, count: int) -> None:
        """What was committed, and only that, gets into the stream."""
        time.sleep(0.2)  # a nudge may still be at work
        while (answer := writer.call("drain"))["sent"] or answer["busy"]:
            pass
        assert self._rig.stored == count, f"{self._rig.stored} stored, {count} committed"

    def _meter(self, writer: Process) -> cpu.Meter:
        return cpu.Meter(
            {"writer": lambda: [writer.pid], "database": lambda: self._rig.postgres.pids}
        )

    def _adds(self, how: str) -> Callable[[], Sample]:
        def turn() -> Sample:
            database = self._rig.database()
            self._rig.delete_stream()
            with self._rig.ours(database) as writer:
                writer.call("create")
                writer.call("add", how=how, transactions=5, size=SIZE)
                meter = self._meter(writer)
                start = time.perf_counter()
                answer = writer.call("add", how=how, transactions=TRANSACTIONS, size=SIZE)
                took = time.perf_counter() - start
                used = meter.read()
            self._rig.drop(database)
            others = used.pop("others") / took
            each = {name: 1e6 * value / (SIZE * TRANSACTIONS) for name, value in used.items()}
            more: dict[str, Any] = {"us_per_event": answer["us"], "others_cores": others}
            return Sample(how, 1e6 / answer["us"], each, more)

        return turn


@contextmanager
def running(seconds: float = SECONDS) -> Iterator[Writers]:
    """A :class:`Writers` with servers of its own."""
    with Rig() as rig:
        yield Writers(rig, seconds)
