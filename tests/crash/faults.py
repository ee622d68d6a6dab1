"""The load, the invariants and the small tools of the crash tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import redis

from celery_jetstream.exceptions import NotConnectedError
from celery_jetstream.testing import wait_until
from tests.stack import CeleryProcess, Stack, handled_all

#: What the faults happen under. The lease is so long that only a lost copy comes twice.
SETTINGS: dict[str, Any] = {"jetstream_ack_wait": 3, "jetstream_backoff": [0.2]}
#: For a server that recovers, on a machine that other tests share.
PATIENCE = 90.0


def publish_load(stack: Stack, count: int) -> list[str]:
    """Many small events; each tenth sleeps 50 ms, so that some task is always in the middle."""
    results = stack.hub.publish_batch(
        [
            {
                "event_type": "slow.load" if number % 10 == 0 else "order.load",
                "payload": {"id": number, "seconds": 0.05 if number % 10 == 0 else 0},
            }
            for number in range(count)
        ],
        timeout=60,
    )
    assert all(results), [result.error for result in results if not result][:3]
    return [result.event_id for result in results]


def in_the_middle(
    stack: Stack, count: int, *, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Waits until that many more runs have ended: the load is on its way."""
    wanted = count_runs(stack) + count
    stack.wait_ledger(
        lambda: (meanwhile(), count_runs(stack) >= wanted)[1], PATIENCE, f"{wanted} runs"
    )


def count_runs(stack: Stack) -> int:
    """How many runs have ended; cheap, for it is asked often while the machine is busy."""
    file = stack.ledger_file
    return file.read_bytes().count(b'"what": "handled"') if file.exists() else 0


def nothing_lost(
    stack: Stack,
    event_ids: list[str],
    fault: str,
    *,
    meanwhile: Callable[[], object] = lambda: None,
) -> int:
    """All handled, all settled, nothing dead; returns (and prints) how many runs were too many.

    Args:
        stack: whose.
        event_ids: the events that must have been handled.
        fault: what was done, for the report.
        meanwhile: called again and again while waiting, as a process manager would look.
    """
    try:
        until(lambda: (meanwhile(), _settled(stack))[1], PATIENCE, f"{fault}: all settled")
    except TimeoutError as error:
        raise AssertionError(f"{error}; {account(stack)}\n{stack.logs()}") from None
    wait_until(lambda: depth(stack) == 0, PATIENCE, "the broker's queue to be empty")
    assert stack.dead_count() == 0, f"{fault}: {account(stack)}\n{stack.dead_letters()[:3]}"
    handled_all(stack, event_ids)
    asked = set(event_ids)
    runs = [line for line in stack.ledger("handled") if line["event_id"] in asked]
    doubles = len(runs) - len(asked)
    again = sum(1 for line in runs if line["num_delivered"] > 1)
    print(f"{fault}: {len(event_ids)} events, {doubles} doubles, {again} runs of a redelivery")
    return doubles


def _settled(stack: Stack) -> bool:
    try:
        return stack.left() == 0 and stack.consumer().get("num_ack_pending") == 0
    except NotConnectedError:
        return False


def account(stack: Stack) -> str:
    """What the servers and the ledger say now."""
    info = stack.consumer()
    numbers = {key: info.get(key) for key in ("num_pending", "num_ack_pending", "num_redelivered")}
    runs = len(stack.ledger("handled"))
    return (
        f"left {stack.left()}, {numbers}, dead {stack.dead_count()}, in the broker "
        f"{depth(stack)}, runs that ended {runs}"
    )


def depth(stack: Stack) -> int:
    """Copies in the desk's queue."""
    with redis.Redis.from_url(stack.settings["broker_url"]) as client:
        found: int = client.llen(stack.settings["task_default_queue"])
        return found


def flush(stack: Stack) -> int:
    """FLUSHALL; returns how many copies the queue had just before."""
    with redis.Redis.from_url(stack.settings["broker_url"]) as client:
        found: int = client.llen(stack.settings["task_default_queue"])
        client.flushall()
        return found


def num_delivered(stack: Stack) -> list[int]:
    """The numbers of delivery that were run to the end."""
    return [line["num_delivered"] for line in stack.ledger("handled")]


def running(stack: Stack, event_type: str) -> list[dict[str, Any]]:
    """The newest run of each event of a type that has begun and was not handled."""
    ended = {line["event_id"] for line in stack.ledger("handled")}
    begun = {line["event_id"]: line for line in stack.ledger("begun") if line["type"] == event_type}
    return [line for event_id, line in begun.items() if event_id not in ended]


class Manager:
    """As systemd does: starts a process again that has ended, without waiting for it."""

    def __init__(self, start: Callable[[], CeleryProcess]) -> None:
        self._start = start
        self.process = start()
        self.restarts = 0

    def look(self) -> None:
        if self.process.process.poll() is not None:
            self.restarts += 1
            self.process = self._start()


def until(condition: Callable[[], object], timeout: float, what: str) -> None:
    """As ``wait_until``, but asks only 20 times a second: what is asked here costs the server."""
    wait_until(condition, timeout, what, every=0.05)


def let_pass(seconds: float, condition: Callable[[], object] = lambda: None) -> None:
    """Some faults are a span of time. Meanwhile calls a condition, which may raise."""
    end = time.monotonic() + seconds
    until(lambda: (condition(), time.monotonic() >= end)[1], seconds + 10, f"{seconds} s")
