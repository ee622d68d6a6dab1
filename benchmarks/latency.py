"""Latency at low load: from the call that publishes until the handler begins, in milliseconds.

One message at a time, some time after the one before. Both times are of one clock. A turn's figure
is its median (p50); p99 and the worst are beside it. ``committed`` is the way through an outbox on
PostgreSQL: from the return of ``commit()`` in a process that is connected to NATS, to a direct
worker.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, text

from benchmarks.drain import BASE, BRIDGED, DIRECT, PREFORK, Drain, event
from benchmarks.figures import Sample
from celery_jetstream import JetStream
from celery_jetstream.testing import wait_until
from tests.servers import PostgresServer, missing

COMMITTED = "committed, direct"
#: Seconds between two messages.
GAP = 0.03


class Latency(Drain):
    """As a drain, one message at a time."""

    def _start(self) -> None:
        self._name = f"benchmarks.{self.plain_app}.handle"
        self._outbox: JetStream | None = None
        super()._start()
        self._sender = Celery("sender", broker=self.redis_server.url, set_as_current=False)
        self._stack.callback(self._sender.close)
        if not missing("postgresql"):
            self._start_outbox()

    def _start_outbox(self) -> None:
        postgres = self._stack.enter_context(PostgresServer())
        app = Celery("hub", broker="memory://", set_as_current=False)
        app.conf.update(
            **self._jetstream("hub", "desk", DIRECT),
            jetstream_database_url=postgres.url("postgres"),
        )
        self._outbox = JetStream(app)
        self._stack.callback(self._outbox.close)
        self._outbox.outbox.create_tables()
        self._outbox.connect()
        self._engine = create_engine(postgres.url("postgres"))
        self._stack.callback(self._engine.dispose)

    @property
    def turns(self) -> dict[str, Callable[[], Sample]]:
        """The variants by name."""
        found = {
            BASE: lambda: self._lone(BASE, self._send),
            BRIDGED: lambda: self._lone(BRIDGED, self._publish(BRIDGED)),
            DIRECT: lambda: self._lone(DIRECT, self._publish(DIRECT)),
        }
        if self._outbox is not None:
            found[COMMITTED] = lambda: self._lone(COMMITTED, self._commit)
        return found

    def _lone(self, variant: str, send: Callable[[int], float]) -> Sample:
        self.tally.mark()
        sent = []
        for number in range(self.count):
            time.sleep(GAP)
            sent.append(send(number))
            wait_until(lambda n=number: self.tally.count > n, 30, "the handler to begin")
        took = sorted(
            1e3 * (begun - at) for at, begun in zip(sent, self.tally.times(), strict=True)
        )
        more = {"p99": took[max(0, round(0.99 * len(took)) - 1)], "max": took[-1]}
        return Sample(variant, statistics.median(took), {}, more)

    # each sends one message; when that began, by the monotonic clock

    def _send(self, number: int) -> float:
        at = time.monotonic()
        self._sender.send_task(self._name, (event(number),), queue=BASE, ignore_result=True)
        return at

    def _publish(self, name: str) -> Callable[[int], float]:
        def publish(number: int) -> float:
            at = time.monotonic()
            assert self.hubs[name].publish(**event(number))
            return at

        return publish

    def _commit(self, number: int) -> float:
        assert self._outbox
        with self._engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            self._outbox.outbox.add(connection, **event(number))
            connection.commit()
            return time.monotonic()


@contextmanager
def running(count: int, pool: tuple[str, ...] = PREFORK, **options: Any) -> Iterator[Latency]:
    """A :class:`Latency` with a directory of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        Latency(Path(directory), count, pool=pool, **options) as latency,
    ):
        yield latency
