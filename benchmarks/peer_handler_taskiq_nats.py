"""taskiq-nats: the handler as a task of its pull-based broker (``.venv-bench``).

By its own worker command, with two processes as ours have. For speed its batch is of 100, not of
one; its task is ``async``, for any other goes through a pool of threads; it writes no line for each
task, and ``--no-parse`` spares it looking at the parameters' types, which a dictionary does not
need. It is at least once of its own: it acknowledges when the task has ended and its result, here
none, is kept. A batch needs a timeout: without one, messages wait until there are 100.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from taskiq import AckableMessage
from taskiq_nats import PullBasedJetStreamBroker

from benchmarks.tally import tick

NAME = "taskiq-nats"


class Broker(PullBasedJetStreamBroker):
    """Survives a timeout that nats-py 2.16 tells it by asyncio's exception, not by its own.

    taskiq-nats 0.7 knows only the latter: between two turns its processes would end, and the ones
    that replace them would end the consumer's pause.
    """

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        while True:
            with suppress(asyncio.TimeoutError):
                async for message in super().listen():
                    yield message


broker = Broker(
    os.environ["BENCH_SERVER"],
    stream_name=NAME,
    subject=f"{NAME}.created",
    durable=NAME,
    pull_consume_batch=100,
    pull_consume_timeout=1,
)


@broker.task(task_name="handle")
async def handle(event: dict[str, Any]) -> None:
    tick()


async def fill() -> None:
    """Sends what it is given."""
    await broker.startup()
    print("connected", flush=True)
    for event in json.load(sys.stdin):
        await handle.kiq(event)
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(fill())
