"""The same endings in every pool of Celery's: prefork, threads, solo, gevent."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.servers import RedisServer
from tests.stack import Stack, handled_once

#: Pool and how many tasks it runs at once.
POOLS = {"prefork": 2, "threads": 4, "solo": 1, "gevent": 10}
ACK_WAIT = 2.0
#: Longer than two ack_waits: kept in progress, or delivered again.
LONG = 4.5
#: Seconds that a worker may take to end: what runs, what is confirmed, Celery's own.
STOP = 45.0  # CeleryProcess.stop() says why

pytestmark = pytest.mark.timeout(120)


def available(pool: str) -> Any:
    absent = pool == "gevent" and importlib.util.find_spec("gevent") is None
    return pytest.param(pool, marks=pytest.mark.skipif(absent, reason="no gevent"))


@pytest.fixture(scope="module", params=[available(pool) for pool in POOLS])
def pool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def desk(
    pool: str,
    tmp_path_factory: pytest.TempPathFactory,
    nats_server: NatsServer,
    redis_server: RedisServer,
) -> Iterator[Stack]:
    """One worker of this pool and one bridge for all tests but those that end the worker."""
    with_names = Names(f"desk-{pool}-{os.getpid()}", f"hub-{pool}", f"pool-{pool}-{os.getpid()}")
    stack = make(tmp_path_factory.mktemp(pool), nats_server, redis_server, with_names)
    try:
        stack.bridge()
        stack.worker(pool=pool, concurrency=POOLS[pool])
        yield stack
    finally:
        stack.close()


def make(directory: Path, nats: NatsServer, redis: RedisServer, names: Names) -> Stack:
    stack = Stack(
        directory,
        nats.url,
        redis.url,
        names,
        jetstream_ack_wait=ACK_WAIT,
        jetstream_max_deliver=3,
    )
    stack.hub.provision()
    return stack


def runs(desk: Stack, event_ids: list[str], what: str) -> list[dict[str, Any]]:
    return [line for line in desk.ledger(what) if line["event_id"] in event_ids]


def wait_handled(desk: Stack, event_ids: list[str], timeout: float = 30) -> list[dict[str, Any]]:
    """Waits until each was handled and settled; returns those runs."""
    desk.wait_ledger(
        lambda: {line["event_id"] for line in runs(desk, event_ids, "handled")} == {*event_ids},
        timeout,
        "all to be handled",
    )
    desk.wait_settled(timeout)
    return runs(desk, event_ids, "handled")


def test_handled_once_and_settled(desk: Stack) -> None:
    event_ids = desk.publish("order.created", count=200)
    lines = wait_handled(desk, event_ids)
    assert len(lines) == len(event_ids)
    assert {line["num_delivered"] for line in lines} == {1}
    assert desk.left() == 0


def test_retry_comes_again(desk: Stack) -> None:
    event_ids = desk.publish("retry.some", count=3, fail=2)
    wait_handled(desk, event_ids)
    begun = runs(desk, event_ids, "begun")
    assert sorted(line["num_delivered"] for line in begun) == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_unrecoverable_error_is_a_dead_letter(desk: Stack) -> None:
    (event_id,) = desk.publish("error.value")
    letter = wait_until(lambda: dead(desk, event_id), 30, "the dead letter")
    assert letter["reason"] == "unrecoverable_error"
    assert letter["context"]["error_class"] == "ValueError"
    assert letter["context"]["error_message"] == "not a number"
    desk.wait_settled()
    assert len(runs(desk, [event_id], "begun")) == 1


def test_error_is_tried_max_deliver_times(desk: Stack) -> None:
    (event_id,) = desk.publish("error.runtime")
    letter = wait_until(lambda: dead(desk, event_id), 30, "the dead letter")
    assert letter["reason"] == "max_deliveries_exceeded"
    assert len(runs(desk, [event_id], "begun")) == 3


def test_long_tasks_and_what_waits_behind_them_are_one_delivery_each(
    desk: Stack, pool: str
) -> None:
    long = desk.publish("slow.one", count=POOLS[pool], seconds=LONG)
    desk.wait_ledger(lambda: len(runs(desk, long, "begun")) == len(long), 30, "all to run")
    behind = desk.publish("slow.other", count=5, seconds=0)
    wait_handled(desk, [*long, *behind])
    begun = runs(desk, [*long, *behind], "begun")
    assert [line["num_delivered"] for line in begun] == [1] * (len(long) + len(behind))
    assert min(line["at"] for line in runs(desk, behind, "begun")) > max(
        line["at"] for line in runs(desk, long, "begun")
    )


def test_handler_may_run_an_event_loop_of_its_own(desk: Stack) -> None:
    """Under gevent that fails in a thread in which a loop runs: the connection's is native.

    One at a time: two greenlets with ``asyncio.run`` get in each other's way, whoever starts them.
    """
    for _ in range(3):
        event_ids = desk.publish("looped.here")
        (line,) = wait_handled(desk, event_ids)
        assert (line["result"], line["num_delivered"]) == ("looped", 1)


def test_sigterm_ends_the_worker_and_loses_nothing(
    pool: str,
    tmp_path: Path,
    nats_server: NatsServer,
    redis_server: RedisServer,
    names: Names,
) -> None:
    stack = make(tmp_path, nats_server, redis_server, names)
    try:
        stack.bridge()
        first = stack.worker(pool=pool, concurrency=POOLS[pool])
        event_ids = stack.publish("slow.one", count=20 * POOLS[pool], seconds=0.2)
        stack.wait_handled(2 * POOLS[pool])

        start = time.monotonic()
        status = first.stop(STOP)
        took = time.monotonic() - start

        print(f"{pool}: the worker ended after {took:.1f} s")
        assert status == 0
        assert len(stack.ledger("begun")) == len(stack.ledger("handled"))  # what ran was finished
        assert len(stack.ledger("handled")) < len(event_ids)
        stack.worker(pool=pool, concurrency=POOLS[pool])
        stack.wait_settled()
        handled_once(stack, event_ids)
        assert stack.dead_count() == 0
    finally:
        stack.close()


def dead(desk: Stack, event_id: str) -> dict[str, Any] | None:
    for letter in desk.dead_letters():
        if letter["context"]["event_id"] == event_id:
            return letter
    return None
