"""nats-outbox in a process of its own (``.venv-bench``): its relay, and a writer."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import nats
from nats_outbox.core.models import OutboxEvent, create_tables
from nats_outbox.core.outbox import outbox_transaction
from nats_outbox.publishers.nats_publisher import NatsPublisher
from nats_outbox.relay.polling import PollingRelay
from nats_outbox.settings import OutboxSettings
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from benchmarks import events, process

SUBJECT = "bench.created"


class Peer:
    """As its ``relay start`` has it: that pool, the publisher, no metrics."""

    def __init__(self, database: str, nats: str, options: dict[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._nats_url = nats
        self._settings = OutboxSettings(database_url=database, nats_url=nats, **options)
        self._engine = create_async_engine(
            database, pool_pre_ping=True, pool_size=5, max_overflow=10
        )
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._publisher: NatsPublisher | None = None

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def create(self) -> None:
        self._run(create_tables(self._engine))

    def fill(self, first: int, count: int) -> None:
        self._run(self._fill(range(first, first + count)))

    async def _fill(self, numbers: range) -> None:
        rows = [
            {
                "subject": SUBJECT,
                "headers": {},
                "payload": events.payload(number),
                "aggregate_type": "customer",
                "aggregate_id": events.key(number),
            }
            for number in numbers
        ]
        async with self._engine.begin() as connection:
            for start in range(0, len(rows), 1000):
                await connection.execute(insert(OutboxEvent), rows[start : start + 1000])

    def start(self) -> None:
        """Starts the relay; it is connected before."""
        self._run(self._start())

    async def _start(self) -> None:
        if self._publisher is None:
            client = await nats.connect(self._nats_url)
            self._publisher = await NatsPublisher.from_nats_client(client)
        self._relay = PollingRelay(self._sessions, self._publisher, self._settings)
        self._running = asyncio.ensure_future(self._relay.start())

    def stop(self) -> None:
        self._run(self._stop())

    async def _stop(self) -> None:
        self._running.cancel()
        await asyncio.wait([self._running])

    def write(self, count: int, gap: float) -> dict[str, Any]:
        """Writes events one by one; when each commit was, by the clock on the wall."""
        return {"committed": [self._run(self._write(number, gap)) for number in range(count)]}

    async def _write(self, number: int, gap: float) -> int:
        await asyncio.sleep(gap)
        async with self._sessions() as session, outbox_transaction(session) as transaction:
            transaction.publish_event(SUBJECT, events.payload(number))
        return time.time_ns()


if __name__ == "__main__":
    peer = Peer(**process.settings())
    process.serve(
        {
            "create": peer.create,
            "fill": peer.fill,
            "start": peer.start,
            "stop": peer.stop,
            "write": peer.write,
        }
    )
