"""Ends that were asked for: SIGTERM under load, to one process or its group, and SIGKILL after it.

What is not handed back comes again only after ``ack_wait`` (of the outbox, after its lease): both
are long here, and how often messages come again is compared with how many were handed back.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_jetstream.testing import NatsServer, wait_until
from tests.banking import Bank
from tests.conftest import Names
from tests.crash import faults
from tests.crash.shops import Shop
from tests.databases import Database
from tests.servers import PostgresServer, RedisServer
from tests.stack import WORKER, CeleryProcess, Stack, handled_once, in_both_modes

pytestmark = pytest.mark.timeout(240)

#: Seconds: what is not handed back would come again after so long.
LONG = 60.0
#: Seconds that a bridge and a relay may take to end; a prefork worker of Celery's own takes 32.
BOUND, WORKER_BOUND = 8.0, 45.0
SETTINGS: dict[str, Any] = {"jetstream_ack_wait": LONG, "jetstream_backoff": [0.2]}


class HandBacks:
    """Counts what is handed back (and tried again) to JetStream from now on."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.count = 0
        stack.hub.connection.run(self._listen)

    async def _listen(self) -> None:
        session = await self._stack.hub.connection.session()
        subject = f"$JS.EVENT.ADVISORY.CONSUMER.MSG_NAKED.{self._stack.names.stream_name}.>"
        await session.client.subscribe(subject, cb=self._hear)

    async def _hear(self, _: Any) -> None:
        self.count += 1

    def are_all(self, event_ids: list[str], what: str) -> None:
        """Waits until each was handled, once; none came again but by being handed back."""
        began = time.monotonic()
        faults.nothing_lost(self._stack, event_ids, what)
        handled_once(self._stack, event_ids)
        again = sum(number - 1 for number in faults.num_delivered(self._stack))
        print(
            f"{what}: all done {time.monotonic() - began:.1f} s later, {self.count} handed back, "
            f"{again} delivered again"
        )
        assert again <= self.count, "some were not handed back, and waited for ack_wait"


# -- a bridge --------------------------------------------------------------------------------------


def test_a_bridge_ends_while_messages_come_in(make_stack: Any, rounds: int) -> None:
    """It is told so when it has just begun to fill up; the next gets all of that at once."""
    stack = make_stack(**SETTINGS)
    hand_backs = HandBacks(stack)
    stack.worker()
    for _ in range(rounds):
        events = faults.publish_load(stack, 1500)
        bridge = stack.bridge()
        began = time.monotonic()
        assert bridge.stop(BOUND) == 0
        print(f"the bridge ended in {time.monotonic() - began:.1f} s")
        following = stack.bridge()
        hand_backs.are_all(events, "SIGTERM of a bridge that fills up")
        following.kill()
    assert hand_backs.count, "it held nothing: this shows nothing"


# -- workers ---------------------------------------------------------------------------------------


@pytest.mark.soak
@in_both_modes
def test_workers_end_under_load(make_stack: Any, rounds: int, direct: bool) -> None:
    """Of two pools, one told twice: Celery takes the second SIGTERM for the first."""
    stack = make_stack(direct=direct, **SETTINGS)
    if not direct:
        stack.bridge()
    hand_backs = HandBacks(stack)
    stack.worker()  # does the rest
    for _ in range(rounds):
        ending = [stack.start_worker(pool=pool, concurrency=4) for pool in ("prefork", "threads")]
        for process in ending:
            process.wait_for("ready.")
        events = faults.publish_load(stack, 900)
        faults.in_the_middle(stack, 200)
        began = time.monotonic()
        for process in (*ending, ending[0]):
            process.send(signal.SIGTERM)
        hand_backs.are_all(events, "SIGTERM of workers under load")
        for process in ending:
            assert process.wait(WORKER_BOUND) == 0, process.text()[-3000:]
        print(f"the last worker had ended after {time.monotonic() - began:.1f} s at the most")


# -- flushers --------------------------------------------------------------------------------------


@pytest.fixture
def shop(
    tmp_path: Path,
    nats_server: NatsServer,
    redis_server: RedisServer,
    names: Names,
    postgresql: Database,
) -> Iterator[Shop]:
    found = Shop(
        tmp_path,
        nats_server.url,
        names,
        postgresql,
        broker_url=redis_server.url,
        jetstream_outbox_batch_size=50,
        jetstream_outbox_lease=LONG,
    )
    yield found
    found.close()


@pytest.mark.soak
def test_flushers_end_under_load(shop: Shop, rounds: int) -> None:
    """A worker that flushes and a relay: what they have leased, the next has at once."""
    writers = [shop.start("write", f"w{number}-", 0.002) for number in range(2)]
    for number in range(rounds):
        worker = shop.celery(*WORKER, "-P", "prefork", "-c", "2", "-n", f"w{number}@%h")
        relay = start_relay(shop)
        worker.wait_for("ready.")
        shop.wait_ledger("published", len(shop.ledger("published")) + 20)
        began = time.monotonic()
        relay.send(signal.SIGTERM)
        assert relay.wait(BOUND) == 0
        relay_took = time.monotonic() - began
        worker.send(signal.SIGTERM)
        assert worker.wait(WORKER_BOUND) == 0
        took = time.monotonic() - began - relay_took
        print(f"the relay ended in {relay_took:.1f} s, the flushing worker in {took:.1f} s")
    relay = start_relay(shop)
    for writer in writers:
        writer.send(signal.SIGTERM)
        assert writer.wait(10) == 0
    began = time.monotonic()
    shop.wait_sent(LONG / 2)
    print(f"all sent {time.monotonic() - began:.1f} s later")
    relay.send(signal.SIGTERM)
    relay.send(signal.SIGTERM)
    assert relay.wait(BOUND) in (0, 128 + signal.SIGTERM)
    assert (account := shop.account("SIGTERM of flushers", kills=2 * rounds)).is_right, account


def start_relay(shop: Shop) -> CeleryProcess:
    return shop.celery("jetstream", "outbox", "relay", "--interval", "0.05")


# -- SIGTERM, and after a grace SIGKILL ------------------------------------------------------------


@pytest.fixture
def make_bank(
    tmp_path: Path,
    nats_server: NatsServer,
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    names: Names,
) -> Iterator[Callable[..., Bank]]:
    made: list[Bank] = []

    def make(**settings: Any) -> Bank:
        user = f"bank_{os.getpid()}_{names.app_name.replace('-', '_')}"
        postgres_server.create_user(user)
        url = postgres_server.url("postgres", user)
        settings = {**faults.SETTINGS, "jetstream_outbox_lease": 3, **settings}
        made.append(Bank(tmp_path, nats_server.url, redis_server.url, names, url, **settings))
        return made[-1]

    yield make
    for bank in made:
        bank.close()


class Fleet:
    """All that a deploy stops and starts: workers, a bridge where there is one, a flusher."""

    def __init__(self, bank: Bank) -> None:
        self.processes = [bank.start_worker()]
        if not bank.direct:
            self.processes.append(bank.celery("jetstream", "bridge"))
        self.processes.append(bank.celery("jetstream", "outbox", "relay"))
        self.processes[0].wait_for("ready.")

    def stop(self, grace: float, *, group: bool) -> list[int]:
        """As systemd and Kubernetes do; returns the exit statuses."""
        for process in self.processes:
            if group:
                os.killpg(process.pid, signal.SIGTERM)
            else:
                process.send(signal.SIGTERM)
        end = time.monotonic() + grace
        while time.monotonic() < end and any(p.poll() is None for p in self.processes):
            faults.let_pass(0.05)
        for process in self.processes:
            process.end()
        return [process.wait() for process in self.processes]


@pytest.mark.soak
@pytest.mark.parametrize("group", [False, True], ids=["alone", "group"])
@in_both_modes
def test_killed_where_the_grace_is_too_short(
    make_bank: Callable[..., Bank], rounds: int, direct: bool, group: bool
) -> None:
    """Handlers take longer than it: each has its effect once, by the next worker at the latest.

    The grace is Kubernetes' least sensible.
    """
    grace = 10.0
    bank = make_bank(direct=direct)
    fleet = Fleet(bank)
    events: list[str] = []
    for number in range(rounds):
        slow = bank.publish("paid.slow", 2, seconds=2 * grace)
        bank.wait_ledger(lambda s=slow: all(map(bank.runs, s)), 60, "the slow ones to run")
        events += slow
        events += bank.publish_many([("paid.load", {"id": n}) for n in range(200)])
        events += bank.publish_many([("passed.on", {"id": n}) for n in range(100)])
        statuses = fleet.stop(grace, group=group)
        print(f"exit statuses {statuses}")
        assert set(statuses) <= {0, -signal.SIGKILL}
        assert group or statuses[0] == -signal.SIGKILL, "it did not wait for what ran"
        fleet = Fleet(bank)
        bank.exactly_once(events, f"TERM, then KILL, round {number}")
        assert all(len(bank.runs(event_id)) >= 2 for event_id in slow), "none was cut off"
    wait_until(lambda: bank.rows() == {"sent": 100 * rounds}, 30, "what they passed on to be sent")
