"""Intake: a stored backlog is received and settled, with no Celery behind it.

``nats-py, fetch`` is the loop of its documentation: ``fetch(100)``, and an ack for each.
``nats-py, fetch, confirmed`` waits for the server's answers to all of a batch's acks. ``pull`` and
``push`` are the bridge's, with the confirmed acks that settle its messages; ``pull, plain acks``
shows what the confirmation costs. A turn ends when the server has nothing pending.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import nats
from celery import Celery
from nats.aio.msg import Msg

from benchmarks import cpu
from benchmarks.drain import event
from benchmarks.figures import Sample
from celery_jetstream import JetStream
from celery_jetstream.acks import Acks
from celery_jetstream.pull import Pull
from celery_jetstream.push import Push
from celery_jetstream.testing import NatsServer, wait_until

FETCH, CONFIRMED = "nats-py, fetch", "nats-py, fetch, confirmed"
PULL, PLAIN, PUSH = "pull", "pull, plain acks", "push"
BATCH = 100
STREAM, CONSUMER, DELIVER = "jetstream-bridge-stream", "bench", "bench.deliver"


class Intake:
    """One server, one backlog, and the ways to work it off."""

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
        ways: dict[str, Callable[[], None]] = {
            FETCH: lambda: asyncio.run(self._fetch(_acked)),
            PLAIN: self._pull_plainly,
            CONFIRMED: lambda: asyncio.run(self._fetch(_confirmed)),
            PULL: lambda: self._receive(pushed=False),
            PUSH: lambda: self._receive(pushed=True),
        }
        self.variants = {name: self._turn(name, way) for name, way in ways.items()}

    def close(self) -> None:
        self.jetstream.close()

    def _api(self, operation: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self.jetstream.connection.run(self.jetstream._api, operation, request or {})
        assert "error" not in answer, answer
        return answer

    def _turn(self, variant: str, drain: Callable[[], None]) -> Callable[[], Sample]:
        def turn() -> Sample:
            batch = [event(number) for number in range(self._count)]
            assert all(self.jetstream.publish_batch(batch, timeout=120))
            self._make_consumer(pushed=variant == PUSH)
            meter = cpu.Meter(
                {"receiver": lambda: [os.getpid()], "nats": lambda: [self._server.pid]}
            )
            start = time.perf_counter()
            drain()
            wait_until(lambda: self._left() == 0, 120, "an empty stream")
            took = time.perf_counter() - start
            used = meter.read()
            self._api(f"CONSUMER.DELETE.{STREAM}.{CONSUMER}")
            each = {name: 1e6 * used[name] / self._count for name in ("receiver", "nats")}
            return Sample(
                variant, self._count / took, each, {"others_cores": used["others"] / took}
            )

        return turn

    def _make_consumer(self, *, pushed: bool) -> None:
        config = {"durable_name": CONSUMER, "ack_policy": "explicit", "max_ack_pending": 10_000}
        if pushed:
            config |= {"deliver_subject": DELIVER, "deliver_group": CONSUMER}
            config |= {"flow_control": True, "idle_heartbeat": 5_000_000_000}
        subject = self.jetstream.config.publish_subject
        self._api(
            f"CONSUMER.CREATE.{STREAM}.{CONSUMER}.{subject}",
            {"stream_name": STREAM, "config": {**config, "filter_subject": subject}},
        )

    def _left(self) -> int:
        return int(self._api(f"STREAM.INFO.{STREAM}")["state"]["messages"])

    # -- ours ------------------------------------------------------------------------------------

    def _receive(self, *, pushed: bool) -> None:
        connection = self.jetstream.connection
        acks = Acks(connection, patience=60, nak_patience=60)
        found: list[str] = []

        def take(message: Msg) -> None:
            found.append(message.reply)
            acks.ack(message.reply)

        self._until(take, lambda: len(found) >= self._count and not acks.unconfirmed, pushed)

    def _pull_plainly(self) -> None:
        found: list[str] = []

        async def session() -> Any:
            return await self.jetstream.connection.session()

        live = self.jetstream.connection.run(session)

        def take(message: Msg) -> None:
            found.append(message.reply)
            live.post(message.reply, b"+ACK", {}, None)
            if len(found) % 50 == 0 or len(found) == self._count:
                live.flush()

        self._until(take, lambda: len(found) >= self._count, False)

    def _until(self, take: Callable[[Msg], None], over: Callable[[], bool], pushed: bool) -> None:
        connection = self.jetstream.connection

        async def missing() -> None:
            raise AssertionError("no consumer")

        intake = (
            Push(connection, DELIVER, CONSUMER, heartbeat=5, on_message=take, on_missing=missing)
            if pushed
            else Pull(
                connection, STREAM, CONSUMER,
                room=lambda: 1000, on_message=take, on_missing=missing, batch=256,
            )
        )  # fmt: skip
        connection.submit(intake.run)
        wait_until(over, 120, "all to be received")
        connection.run(intake.stop, timeout=5)

    # -- nats-py's -------------------------------------------------------------------------------

    async def _fetch(self, settle: Callable[[list[Msg]], Awaitable[None]]) -> None:
        client = await nats.connect(self._server.url)
        subscription = await client.jetstream().pull_subscribe_bind(CONSUMER, STREAM)
        left = self._count
        while left:
            messages = await subscription.fetch(BATCH, timeout=30)
            await settle(messages)
            left -= len(messages)
        await client.drain()


async def _acked(messages: list[Msg]) -> None:
    for message in messages:
        await message.ack()


async def _confirmed(messages: list[Msg]) -> None:
    await asyncio.gather(*(message.ack_sync(timeout=30) for message in messages))


@contextmanager
def running(count: int) -> Iterator[Intake]:
    """An :class:`Intake` with a server of its own."""
    with NatsServer() as server:
        intake = Intake(server, count)
        try:
            yield intake
        finally:
            intake.close()
