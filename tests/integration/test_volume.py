"""Many events through a bridge and a worker of two processes, on both brokers: each handled once.

2,000 events in every run, 20,000 with ``--rounds=10``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from celery_jetstream.testing import wait_until
from tests.servers import RabbitServer, RedisServer
from tests.stack import Stack, handled_once

EVENTS = 2000
#: Events per second below which something is wrong, however busy the machine is.
SLOWEST = 25


@pytest.fixture(params=["redis", pytest.param("rabbitmq", marks=pytest.mark.soak)])
def broker(request: pytest.FixtureRequest) -> str:
    name = {"redis": "redis_server", "rabbitmq": "rabbit_server"}[request.param]
    server: RedisServer | RabbitServer = request.getfixturevalue(name)
    return server.url


@pytest.mark.timeout(0)  # the waits below have deadlines that go with the count
def test_each_is_handled_once_and_nothing_is_left(
    make_stack: Callable[..., Stack], broker: str, rounds: int, record_property: Any
) -> None:
    count = EVENTS * rounds
    stack = make_stack(broker=broker)
    event_ids = publish(stack, count)
    stack.worker(concurrency=2)
    start = time.monotonic()
    stack.bridge()

    wait_until(lambda: paused(stack.left) == 0, 60 + count / SLOWEST, "an empty stream")

    took = time.monotonic() - start
    record_property("events_per_second", round(count / took))
    print(f"{count} events in {took:.1f} s, {count / took:.0f} per second")
    handled_once(stack, event_ids)
    assert {line["num_delivered"] for line in stack.ledger()} == {1}
    assert stack.consumer()["num_ack_pending"] == 0
    assert stack.dead_count() == 0


def paused(question: Callable[[], int]) -> int:
    """Asks five times a second, so that asking is not what the machine is busy with."""
    time.sleep(0.2)
    return question()


def publish(stack: Stack, count: int) -> list[str]:
    results = stack.hub.publish_batch(
        [{"event_type": "order.created", "payload": {"id": number}} for number in range(count)],
        timeout=120,
    )
    assert all(results), [result.error for result in results if not result][:3]
    return [result.event_id for result in results]
