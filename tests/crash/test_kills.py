"""What dies, and what is left of it: every process of the path, killed under load.

After each: nothing lost (every event handled at least once), nothing dead-lettered, every
message settled. How many ran twice is printed (``-s``), and asserted where it must be none.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from celery_jetstream.testing import NatsServer, wait_until
from tests.crash import faults
from tests.servers import RedisServer
from tests.stack import (
    CeleryProcess,
    Stack,
    handled_once,
    in_both_modes,
    in_both_modes_soak,
)

pytestmark = pytest.mark.timeout(240)


def start(stack: Stack) -> tuple[CeleryProcess, CeleryProcess]:
    """A bridge and a worker, started side by side."""
    worker = stack.start_worker()
    bridge = stack.bridge()
    worker.wait_for("ready.")
    return bridge, worker


# -- kill -9 -------------------------------------------------------------------------------------


@in_both_modes_soak
def test_pool_child(make_stack: Any, rounds: int, direct: bool) -> None:
    """What it had returned is acked again, sooner than ack_wait on the slowest machine."""
    stack = make_stack(direct=direct, **{**faults.SETTINGS, "jetstream_ack_wait": 10})
    stack.start()
    for _ in range(rounds):
        events = faults.publish_load(stack, 300)
        events += stack.publish("slow.victim", seconds=2)
        events += faults.publish_load(stack, 300)
        stack.wait_ledger(
            lambda: bool(faults.running(stack, "slow.victim")), faults.PATIENCE, "a victim"
        )
        os.kill(faults.running(stack, "slow.victim")[-1]["pid"], signal.SIGKILL)
        faults.nothing_lost(stack, events, "kill -9 of a pool child")
        handled_once(stack, events)


@pytest.mark.soak
@in_both_modes
def test_worker(make_stack: Any, rounds: int, direct: bool) -> None:
    """What it had claimed comes after ack_wait; the bridge dispatches again what it only held."""
    stack = make_stack(direct=direct, **faults.SETTINGS)
    (worker,) = stack.start(concurrency=4)
    for _ in range(rounds):
        begun = len(stack.ledger("begun"))
        events = stack.publish("slow.victim", 2, seconds=4)
        events += faults.publish_load(stack, 1000)
        faults.in_the_middle(stack, 200)
        stack.wait_ledger(
            lambda: len(faults.running(stack, "slow.victim")) >= 2, faults.PATIENCE, "victims"
        )
        worker.kill()
        cut = faults.running(stack, "slow.victim")
        worker = stack.start_worker(concurrency=4)
        doubles = faults.nothing_lost(stack, events, "kill -9 of a worker")
        assert cut, "nothing was cut off"
        assert len(stack.ledger("begun")) > begun + len(events) // 10
        assert doubles <= 50, "more than four children return in the 50 ms of gathered settlements"


@pytest.mark.soak
def test_bridge(make_stack: Any, rounds: int) -> None:
    """The copies in the broker go on; what it had not dispatched comes to the next bridge."""
    stack = make_stack(**faults.SETTINGS)
    bridge, _ = start(stack)
    for _ in range(rounds):
        events = faults.publish_load(stack, 1000)
        faults.in_the_middle(stack, 200)
        bridge.kill()
        bridge = stack.bridge()
        faults.nothing_lost(stack, events, "kill -9 of a bridge")


@pytest.mark.soak
def test_one_of_two_bridges(make_stack: Any, rounds: int) -> None:
    stack = make_stack(**faults.SETTINGS)
    one, _ = start(stack)
    other = stack.bridge()
    for _ in range(rounds):
        events = faults.publish_load(stack, 1000)
        faults.in_the_middle(stack, 200)
        one.kill()
        faults.nothing_lost(stack, events, "kill -9 of one of two bridges")
        one, other = other, stack.bridge()


@in_both_modes_soak
def test_nats_server(make_stack: Any, own_nats: NatsServer, rounds: int, direct: bool) -> None:
    stack = make_stack(direct=direct, nats_url=own_nats.url, **faults.SETTINGS)
    stack.start()
    for _ in range(rounds):
        events = faults.publish_load(stack, 1000)
        faults.in_the_middle(stack, 200)
        own_nats.kill()
        own_nats.start()
        faults.nothing_lost(stack, events, "kill -9 of nats-server")


@in_both_modes_soak
def test_nats_server_frozen(
    make_stack: Any, own_nats: NatsServer, rounds: int, direct: bool
) -> None:
    """Connections stay open and nothing answers, for longer than ack_wait."""
    stack = make_stack(direct=direct, nats_url=own_nats.url, **faults.SETTINGS)
    stack.start()
    for _ in range(rounds):
        events = faults.publish_load(stack, 1000)
        faults.in_the_middle(stack, 200)
        own_nats.pause()
        faults.let_pass(5)
        own_nats.resume()
        faults.nothing_lost(stack, events, "SIGSTOP of nats-server for 5 s")


def test_flushall(make_stack: Any, own_redis: RedisServer, rounds: int) -> None:
    """The copies are gone; the bridge notices and dispatches the same deliveries again."""
    stack = make_stack(broker=own_redis.url, **faults.SETTINGS)
    start(stack)
    for _ in range(rounds):
        events = faults.publish_load(stack, 1000)
        faults.in_the_middle(stack, 200)
        wait_until(lambda: faults.depth(stack) > 20, 10, "copies in the queue")
        lost = faults.flush(stack)
        assert lost, "nothing was in the queue"
        faults.nothing_lost(stack, events, f"FLUSHALL with {lost} copies in the queue")
        handled_once(stack, events)
    assert set(faults.num_delivered(stack)) == {1}


@pytest.mark.soak
def test_redis(make_stack: Any, own_redis: RedisServer, rounds: int) -> None:
    """A worker of Celery 5.7 may end when its Redis does; a process manager starts it again."""
    stack = make_stack(broker=own_redis.url, **faults.SETTINGS)
    stack.bridge()
    manager = faults.Manager(stack.start_worker)
    manager.process.wait_for("ready.")
    for _ in range(rounds):
        events = faults.publish_load(stack, 1000)
        faults.in_the_middle(stack, 200)
        own_redis.kill()
        own_redis.start()
        faults.nothing_lost(stack, events, "kill -9 of Redis", meanwhile=manager.look)
    print(f"workers that ended with Redis and were started again: {manager.restarts}")


# -- nobody there, and clocks --------------------------------------------------------------------


@pytest.mark.soak
def test_no_worker_for_ten_leases(make_stack: Any) -> None:
    """The bridge dispatches again and again; for JetStream that stays one delivery."""
    lease = 2.0
    stack = make_stack(jetstream_ack_wait=lease, jetstream_lease=lease, jetstream_backoff=[0.2])
    bridge = stack.bridge()
    events = faults.publish_load(stack, 200)
    faults.let_pass(10 * lease, lambda: _alive(bridge))
    assert bridge.text().count("are dispatched again") >= 3, bridge.text()[-2000:]
    stack.start_worker().wait_for("ready.")
    faults.nothing_lost(stack, events, "no worker for ten leases")
    handled_once(stack, events)
    assert set(faults.num_delivered(stack)) == {1}


def _alive(process: CeleryProcess) -> None:
    assert process.process.poll() is None, process.text()[-3000:]


def test_worker_whose_clock_is_a_day_ahead(make_stack: Any) -> None:
    """Every copy seems to be expired to it; it says so once, and handles them all."""
    stack = make_stack(**faults.SETTINGS)
    stack.bridge()
    worker = stack.worker(app="tests.crash.clock_ahead", DESK_CLOCK_AHEAD="86400")
    events = faults.publish_load(stack, 200)
    faults.nothing_lost(stack, events, "a clock a day ahead")
    handled_once(stack, events)
    assert set(faults.num_delivered(stack)) == {1}
    assert worker.text().count("clock is ahead") == 1


# -- long tasks, long backlogs, and the one that always kills ------------------------------------


@in_both_modes_soak
def test_long_task_and_long_backlog_are_one_delivery_each(make_stack: Any, direct: bool) -> None:
    """8 s and about 20 s, with ack_wait 3 s."""
    stack = make_stack(direct=direct, **faults.SETTINGS)
    stack.start()
    events = stack.publish("slow.long", seconds=8)
    events += stack.publish("slow.backlog", 30, seconds=1)
    faults.nothing_lost(stack, events, "8 s of a task and 20 s of backlog")
    handled_once(stack, events)
    assert set(faults.num_delivered(stack)) == {1}
    assert len(stack.ledger("begun")) == len(events)


@in_both_modes_soak
def test_handler_that_always_kills_its_process(make_stack: Any, direct: bool) -> None:
    settings = {**faults.SETTINGS, "jetstream_ack_wait": 10}
    stack = make_stack(direct=direct, **settings, jetstream_max_deliver=3)
    stack.start()
    events = stack.publish("order.before", 100)
    (killer,) = stack.publish("kill.always")
    events += stack.publish("order.after", 100)
    stack.wait_settled(faults.PATIENCE)
    (letter,) = stack.dead_letters()
    assert letter["reason"] == "max_deliveries_exceeded"
    assert letter["context"]["event_id"] == killer
    assert letter["headers"]["x-deliveries"] == "3"
    begun = [line["num_delivered"] for line in stack.ledger("begun")]
    assert begun == [1, 2, 3]
    handled_once(stack, events)


# -- stopping ------------------------------------------------------------------------------------


@in_both_modes
def test_sigterm_of_a_worker_hands_back_what_it_holds(make_stack: Any, direct: bool) -> None:
    """What runs ends there, though it takes longer than ack_wait; the rest begins elsewhere."""
    stack = make_stack(direct=direct, **faults.SETTINGS)
    (worker,) = stack.start()
    events = stack.publish("slow.long", 2, seconds=8)
    stack.wait_ledger(lambda: len(stack.ledger("begun")) == 2, faults.PATIENCE, "running tasks")
    second = stack.start_worker()
    events += stack.publish("slow.held", 20, seconds=0.5)
    second.wait_for("ready.")
    worker.send(signal.SIGTERM)
    wait_until(lambda: faults.depth(stack) == 0, faults.PATIENCE, "the queue to be empty")
    assert worker.wait(60) == 0
    faults.nothing_lost(stack, events, "SIGTERM of a worker")
    handled_once(stack, events)
    assert len(stack.ledger("begun")) == len(events), "a running one did not finish"
    ran = stack.ledger("handled")
    assert [line["num_delivered"] for line in ran if line["type"] == "slow.long"] == [1, 1]
    least = 1 if direct else 4  # it takes no more than it can begin soon
    assert faults.num_delivered(stack).count(2) >= least, "it held nothing: this shows nothing"
    assert "Restoring" not in worker.text(), "the broker's copies were not acknowledged"


@in_both_modes_soak
def test_sigquit_of_a_worker(make_stack: Any, rounds: int, direct: bool) -> None:
    """Cold: running tasks are cut off, and run again elsewhere."""
    stack = make_stack(direct=direct, **faults.SETTINGS)
    (worker,) = stack.start()
    for _ in range(rounds):
        events = stack.publish("slow.held", 12, seconds=1)
        events += faults.publish_load(stack, 100)
        stack.wait_ledger(
            lambda: len(faults.running(stack, "slow.held")) >= 2, faults.PATIENCE, "running tasks"
        )
        worker.send(signal.SIGQUIT)
        worker.wait(60)
        worker = stack.start_worker()
        faults.nothing_lost(stack, events, "SIGQUIT of a worker")


def test_sigterm_of_a_bridge(make_stack: Any, rounds: int) -> None:
    stack = make_stack(**faults.SETTINGS)
    bridge, _ = start(stack)
    for _ in range(rounds):
        events = faults.publish_load(stack, 1000)
        faults.in_the_middle(stack, 100)
        began = time.monotonic()
        assert bridge.stop(10) == 0
        print(f"the bridge ended in {time.monotonic() - began:.1f} s")
        bridge = stack.bridge()
        faults.nothing_lost(stack, events, "SIGTERM of a bridge")
