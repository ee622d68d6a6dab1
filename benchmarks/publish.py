"""Publish: one by one, in batches, and from a coroutine; each event confirmed by JetStream."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery

from benchmarks import cpu
from benchmarks.figures import Sample
from celery_jetstream import JetStream
from celery_jetstream.testing import NatsServer

BASE = "publish"
BATCH = 1000
AT_ONCE = 100


class Publish:
    """One server, one publisher, four ways."""

    def __init__(self, server: NatsServer, count: int) -> None:
        self._server = server
        self._count = count
        app = Celery("hub", broker="memory://", set_as_current=False)
        app.conf.update(
            jetstream_nats_urls=server.url,
            jetstream_app_name="hub",
            jetstream_destination_app="desk",
        )
        self.jetstream = JetStream(app)
        self.jetstream.provision()
        self.variants: dict[str, Callable[[], Sample]] = {
            "publish": lambda: self._turn("publish", self._one_by_one),
            "publish_batch": lambda: self._turn("publish_batch", self._batches),
            "apublish": lambda: self._turn("apublish", self._awaited),
            f"apublish x{AT_ONCE}": lambda: self._turn(f"apublish x{AT_ONCE}", self._gathered),
        }

    def _turn(self, variant: str, publish: Callable[[], int]) -> Sample:
        """Publishes and takes the stream's messages away again."""
        meter = cpu.Meter({"publisher": lambda: [os.getpid()], "nats": lambda: [self._server.pid]})
        start = time.perf_counter()
        count = publish()
        took = time.perf_counter() - start
        used = meter.read()
        answer = self.jetstream.connection.run(
            self.jetstream._api, "STREAM.PURGE.jetstream-bridge-stream", {}
        )
        assert answer["purged"] == count, f"{answer['purged']} stored, {count} published"
        ours = {name: 1e6 * used[name] / count for name in ("publisher", "nats")}
        return Sample(variant, count / took, ours, {"others_cores": used["others"] / took})

    def _one_by_one(self) -> int:
        for number in range(self._count):
            assert self.jetstream.publish(**_event(number))
        return self._count

    def _batches(self) -> int:
        count = 5 * self._count
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            assert all(self.jetstream.publish_batch([_event(number) for number in numbers]))
        return count

    def _awaited(self) -> int:
        async def run() -> None:
            for number in range(self._count):
                assert await self.jetstream.apublish(**_event(number))

        asyncio.run(run())
        return self._count

    def _gathered(self) -> int:
        async def run() -> None:
            for start in range(0, self._count, AT_ONCE):
                numbers = range(start, min(start + AT_ONCE, self._count))
                results = await asyncio.gather(
                    *(self.jetstream.apublish(**_event(number)) for number in numbers)
                )
                assert all(results)

        asyncio.run(run())
        return self._count


def _event(number: int) -> dict[str, Any]:
    return {
        "event_type": "bench.created",
        "payload": {"id": number, "name": "a user of ordinary length", "email": "u@example.com"},
    }


@contextmanager
def running(count: int) -> Iterator[Publish]:
    """A :class:`Publish` with a server of its own."""
    with NatsServer() as server:
        publish = Publish(server, count)
        try:
            yield publish
        finally:
            publish.jetstream.close()
