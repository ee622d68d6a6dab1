"""faststream-outbox in a process of its own (``.venv-bench``): its relay to JetStream, a writer."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any

from faststream.nats import NatsBroker
from faststream_outbox import OutboxBroker, make_outbox_table
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import events, process

SUBJECT, STREAM, QUEUE = "bench.created", "bench", "events"


class Peer:
    """As its documentation has it: the relay is a subscriber that is a publisher, too."""

    def __init__(self, database: str, nats: str, options: dict[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._engine = create_async_engine(database, pool_size=20)
        self._metadata = MetaData()
        self._table = make_outbox_table(self._metadata)
        self._options = options
        self._nats = NatsBroker(nats, log_level=logging.WARNING)
        self._publisher = self._nats.publisher(SUBJECT, stream=STREAM)
        self._broker = self._make()
        self._connected = False

    def _make(self) -> OutboxBroker:
        broker = OutboxBroker(
            self._engine, outbox_table=self._table, log_level=logging.WARNING, logger=None
        )

        @self._publisher
        @broker.subscriber(QUEUE, **self._options)
        async def relay(body: dict[str, Any]) -> dict[str, Any]:
            return body

        return broker

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def create(self) -> None:
        async def create() -> None:
            async with self._engine.begin() as connection:
                await connection.run_sync(self._metadata.create_all)

        self._run(create())

    def fill(self, first: int, count: int) -> None:
        async def fill() -> None:
            async with self._engine.begin() as connection:
                for start in range(first, first + count, 1000):
                    numbers = range(start, min(start + 1000, first + count))
                    bodies = [events.payload(number) for number in numbers]
                    await self._broker.publish_batch(*bodies, queue=QUEUE, session=connection)

        self._run(fill())

    def start(self) -> None:
        """Starts the relay; it is connected to NATS before."""

        async def start() -> None:
            if not self._connected:
                await self._nats.start()
                self._connected = True
            await self._broker.start()

        self._run(start())

    def stop(self) -> None:
        async def stop() -> None:
            await self._broker.stop()

        self._run(stop())
        self._broker = self._make()

    def write(self, count: int, gap: float) -> dict[str, Any]:
        """Writes events one by one; when each commit was, by the clock on the wall."""

        async def write(number: int) -> int:
            await asyncio.sleep(gap)
            async with self._engine.begin() as connection:
                await self._broker.publish(events.payload(number), queue=QUEUE, session=connection)
            return time.time_ns()

        return {"committed": [self._run(write(number)) for number in range(count)]}


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
