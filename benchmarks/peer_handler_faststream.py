"""faststream: the handler as a pull subscriber of JetStream, in one process (``.venv-bench``).

As its documentation has it: a durable, and ``PullSub`` with batches of 100, whose events are
handled beside each other and acknowledged one by one; ``NACK_ON_ERROR`` makes it at least once.
For speed it has no logger, which would write two lines for each event, and ``apply_types=False``:
a dictionary needs no conversion. Batches of 500 were no faster, and ``max_workers`` was slower. A
handler of whole batches is left out: it gets, and acknowledges, something else than one event.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from faststream import AckPolicy, FastStream
from faststream.nats import JStream, NatsBroker, PullSub

from benchmarks.tally import tick

NAME, SUBJECT = "faststream", "faststream.created"

broker = NatsBroker(os.environ["BENCH_SERVER"], logger=None, apply_types=False)
app = FastStream(broker, logger=None)


@broker.subscriber(
    SUBJECT,
    stream=JStream(NAME, subjects=[SUBJECT]),
    durable=NAME,
    pull_sub=PullSub(batch_size=100, timeout=1),
    ack_policy=AckPolicy.NACK_ON_ERROR,
)
async def handle(event: dict[str, Any]) -> None:
    tick()


async def fill() -> None:
    """Publishes what it is given."""
    async with broker:
        print("connected", flush=True)
        for event in json.load(sys.stdin):
            await broker.publish(event, SUBJECT, stream=NAME)


if __name__ == "__main__":
    asyncio.run(fill() if "fill" in sys.argv else app.run())
