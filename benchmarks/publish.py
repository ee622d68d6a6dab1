"""Publish: one by one, in batches, by a task; each event confirmed by JetStream.

Beside what nats-py itself reaches on the same server: ``nats-py`` awaits ``js.publish`` for one
message after the other; ``nats-py, pipelined`` sends all of a batch and then awaits all answers, on
one inbox, which is the most that a connection of nats-py gives. Both publish the same bytes and
headers.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nats
from celery import Celery

from benchmarks import cpu
from benchmarks.drain import OPTIONS, PREFORK, event
from benchmarks.figures import Sample
from celery_jetstream import JetStream
from celery_jetstream.testing import NatsServer, wait_until
from tests.servers import RedisServer, missing
from tests.stack import CeleryProcess

BASE, PIPELINED = "nats-py", "nats-py, pipelined"
TASK = "publish_event.delay"
BATCH = 1000
AT_ONCE = 100
STREAM = "jetstream-bridge-stream"
_CELERY = (sys.executable, "-m", "celery", "-A", "benchmarks.app_bridged")


class Publish:
    """One server, one publisher, and the ways to publish."""

    def __init__(self, server: NatsServer, count: int) -> None:
        self._server = server
        self._count = count
        self._conf = {
            "jetstream_nats_urls": server.url,
            "jetstream_app_name": "hub",
            "jetstream_destination_app": "desk",
        }
        app = Celery("hub", broker="memory://", set_as_current=False)
        app.conf.update(self._conf)
        self.jetstream = JetStream(app)
        self.jetstream.provision()
        ways: dict[str, Callable[[], int]] = {
            BASE: self._bare,
            "apublish": self._awaited,
            "publish": self._one_by_one,
            PIPELINED: self._pipelined,
            "publish_batch": self._batches,
            f"apublish x{AT_ONCE}": self._gathered,
        }
        self.variants = {name: self._turn(name, way) for name, way in ways.items()}
        self._stack = ExitStack()

    def close(self) -> None:
        self._stack.close()
        self.jetstream.close()

    def with_tasks(self, directory: Path) -> None:
        """Adds ``publish_event.delay``: a worker of two that publishes."""
        redis = self._stack.enter_context(RedisServer())
        conf = {**self._conf, "broker_url": redis.url, "task_ignore_result": True}
        worker = CeleryProcess(
            directory / "worker.log",
            [*_CELERY, "worker", *OPTIONS, *PREFORK],
            {"BENCH_CONF": json.dumps(conf)},
        )
        self._stack.callback(worker.end)
        sender = Celery("sender", broker=redis.url, set_as_current=False)
        self._stack.callback(sender.close)

        def delayed() -> int:
            for number in range(self._count):
                sender.send_task("celery_jetstream.publish_event", kwargs=event(number))
            wait_until(lambda: self._stored() >= self._count, 120, "all to be stored")
            return self._count

        self.variants[TASK] = self._turn(TASK, delayed)

    def _stored(self) -> int:
        answer = self._api(f"STREAM.INFO.{STREAM}")
        return int(answer["state"]["messages"])

    def _api(self, operation: str) -> dict[str, Any]:
        return self.jetstream.connection.run(self.jetstream._api, operation, {})

    def _turn(self, variant: str, publish: Callable[[], int]) -> Callable[[], Sample]:
        """Publishes and takes the stream's messages away again."""

        def turn() -> Sample:
            meter = cpu.Meter(
                {"publisher": lambda: [os.getpid()], "nats": lambda: [self._server.pid]}
            )
            start = time.perf_counter()
            count = publish()
            took = time.perf_counter() - start
            used = meter.read()
            answer = self._api(f"STREAM.PURGE.{STREAM}")
            assert answer["purged"] == count, f"{answer['purged']} stored, {count} published"
            ours = {name: 1e6 * used[name] / count for name in ("publisher", "nats")}
            return Sample(variant, count / took, ours, {"others_cores": used["others"] / took})

        return turn

    # -- ours ------------------------------------------------------------------------------------

    def _one_by_one(self) -> int:
        for number in range(self._count):
            assert self.jetstream.publish(**event(number))
        return self._count

    def _batches(self) -> int:
        count = 5 * self._count
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            assert all(self.jetstream.publish_batch([event(number) for number in numbers]))
        return count

    def _awaited(self) -> int:
        async def run() -> None:
            for number in range(self._count):
                assert await self.jetstream.apublish(**event(number))

        asyncio.run(run())
        return self._count

    def _gathered(self) -> int:
        async def run() -> None:
            for start in range(0, self._count, AT_ONCE):
                numbers = range(start, min(start + AT_ONCE, self._count))
                results = await asyncio.gather(
                    *(self.jetstream.apublish(**event(number)) for number in numbers)
                )
                assert all(results)

        asyncio.run(run())
        return self._count

    # -- nats-py's -------------------------------------------------------------------------------

    def _bare(self) -> int:
        async def run() -> None:
            client = await nats.connect(self._server.url)
            stream = client.jetstream()
            for number in range(self._count):
                message = self.jetstream.publisher.message(**event(number))
                await stream.publish(message.subject, message.body, headers=message.headers)
            await client.close()

        asyncio.run(run())
        return self._count

    def _pipelined(self) -> int:
        count = 5 * self._count

        async def run() -> None:
            client = await nats.connect(self._server.url)
            inbox, answered, answers = client.new_inbox(), 0, asyncio.Event()

            async def hear(message: Any) -> None:
                nonlocal answered
                assert b'"seq"' in message.data, message.data
                answered += 1
                if answered == wanted:
                    answers.set()

            await client.subscribe(f"{inbox}.*", cb=hear)
            wanted = 0
            for start in range(0, count, BATCH):
                numbers = range(start, min(start + BATCH, count))
                wanted += len(numbers)
                answers.clear()
                for number in numbers:
                    message = self.jetstream.publisher.message(**event(number))
                    await client.publish(
                        message.subject,
                        message.body,
                        reply=f"{inbox}.{number}",
                        headers=message.headers,
                    )
                await answers.wait()
            await client.close()

        asyncio.run(run())
        return count


@contextmanager
def running(count: int) -> Iterator[Publish]:
    """A :class:`Publish` with a server of its own."""
    with NatsServer() as server, tempfile.TemporaryDirectory(prefix="bench-") as directory:
        publish = Publish(server, count)
        try:
            if not missing("redis"):
                publish.with_tasks(Path(directory))
            yield publish
        finally:
            publish.close()
