"""What is Celery's in direct mode: other tasks beside it, remote control, pools that change."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from benchmarks import cpu
from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.servers import RabbitServer, RedisServer
from tests.stack import WORKER, CeleryProcess, Stack, handled_once

pytestmark = pytest.mark.timeout(120)

SETTINGS: dict[str, Any] = {"jetstream_ack_wait": 5, "jetstream_max_deliver": 3}


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory, nats_server: NatsServer, redis_server: RedisServer
) -> Iterator[Stack]:
    """An ordinary worker of two, that takes events besides (``jetstream_direct``)."""
    directory: Path = tmp_path_factory.mktemp("direct")
    names = Names(f"desk-o-{os.getpid()}", f"hub-o-{os.getpid()}", f"ordinary-{os.getpid()}")
    stack = Stack(
        directory, nats_server.url, redis_server.url, names, jetstream_direct=True, **SETTINGS
    )
    try:
        stack.hub.provision()
        stack.worker()
        yield stack
    finally:
        stack.close()


@pytest.fixture
def celery(desk: Stack) -> Iterator[Celery]:
    """The desk's broker, from outside."""
    app = Celery("outside", broker=desk.settings["broker_url"], set_as_current=False)
    app.conf.task_default_queue = desk.settings["task_default_queue"]
    yield app
    app.close()


def lines(stack: Stack, event_ids: list[str], what: str = "handled") -> list[dict[str, Any]]:
    return [line for line in stack.ledger(what) if line["event_id"] in event_ids]


def wait_handled(stack: Stack, event_ids: list[str], timeout: float = 60) -> None:
    stack.wait_ledger(
        lambda: len(lines(stack, event_ids)) >= len(event_ids), timeout, "all to be handled"
    )
    stack.wait_settled(timeout)


# -- beside a broker's tasks ---------------------------------------------------------------------


def test_neither_events_nor_tasks_starve(desk: Stack, celery: Celery) -> None:
    """While both are there, each has a fair part."""
    count = 150
    for number in range(count):
        celery.send_task("plain", (number, 0.02))
    events = desk.publish("order.busy", count, seconds=0.02)
    wait_handled(desk, events)
    desk.wait_ledger(lambda: len(desk.ledger("plain")) == count, 60, "the broker's tasks")
    order = [
        line["what"]
        for line in desk.ledger()
        if line["what"] == "plain" or line["event_id"] in events
    ]
    both = order[order.index("handled") :]
    while both[-1] == both[-2]:
        both.pop()  # one kind is done
    assert 0.2 <= both.count("handled") / len(both) <= 0.8, both
    handled_once(desk, events)


def test_inspect_jetstream_tells_how_a_worker_is(desk: Stack) -> None:
    events = desk.publish("slow.held", 2, seconds=0.5)
    desk.wait_ledger(lambda: len(lines(desk, events, "begun")) == 2, 30, "two to run")
    worker = f"w0@{socket.gethostname()}"  # it is not waited for others then
    process = desk.celery("inspect", "jetstream", "--json", "-t", "10", "-d", worker)
    assert process.wait(30) == 0, process.text()
    (report,) = json.loads(process.text().splitlines()[0]).values()
    assert (report["status"], report["connection"]["state"]) == ("healthy", "connected")
    assert report["direct"]["pulling"] is True
    assert 0 <= report["worker"]["held"] <= 2
    assert report["worker"]["handlers"]["tests.apps.desk.slow"] == ["slow.*"]
    assert report["settlements_unconfirmed"] >= 0
    wait_handled(desk, events)


def test_inspect_shows_what_runs_and_what_waits(desk: Stack, celery: Celery) -> None:
    events = desk.publish("slow.shown", 3, seconds=1.5)
    desk.wait_ledger(lambda: len(lines(desk, events, "begun")) == 2, 30, "two to run")
    active = answer(celery.control.inspect().active())
    assert {task["name"] for task in active} == {"tests.apps.desk.slow"}
    assert len(active) == 2
    assert {tuple(task["args"][0]["payload"]) for task in active} == {("id", "seconds")}
    inspect = celery.control.inspect()
    (reserved,) = wait_until(lambda: answer(inspect.reserved()), 30, "one to wait")
    assert reserved["delivery_info"]["routing_key"].endswith(desk.names.app_name)
    wait_handled(desk, events)


def answer(answers: Any) -> Any:
    ((_, tasks),) = answers.items()
    return tasks


def test_what_is_revoked_is_a_dead_letter(desk: Stack, celery: Celery) -> None:
    """While it waits, and while it runs."""
    events = desk.publish("slow.revoked", 3, seconds=60)
    desk.wait_ledger(lambda: len(lines(desk, events, "begun")) == 2, 30, "two to run")
    inspect = celery.control.inspect()
    (waiting,) = wait_until(lambda: answer(inspect.reserved()), 30, "one to wait")
    celery.control.revoke(waiting["id"], reply=True)
    for task in answer(inspect.active()):
        celery.control.revoke(task["id"], terminate=True, signal="SIGKILL", reply=True)
    wait_until(lambda: len(dead(desk, events)) == 3, 30, "the dead letters")
    assert {letter["reason"] for letter in dead(desk, events)} == {"revoked"}
    assert not lines(desk, events)
    desk.wait_settled()


def dead(stack: Stack, event_ids: list[str]) -> list[dict[str, Any]]:
    return [d for d in stack.dead_letters() if d["context"]["event_id"] in event_ids]


def test_a_rate_limit_is_kept(desk: Stack) -> None:
    events = desk.publish("rated.few", 5)
    wait_handled(desk, events)
    at = sorted(line["at"] for line in lines(desk, events))
    assert at[-1] - at[0] > 1.5  # 2/s
    handled_once(desk, events)


def test_it_shares_a_consumer_with_a_bridge(desk: Stack) -> None:
    """A shop changes from one mode to the other while it is running."""
    bridge = desk.bridge()
    events = desk.publish("order.shared", 400)
    wait_handled(desk, events)
    handled_once(desk, events)
    assert bridge.stop() == 0


# -- a dedicated worker --------------------------------------------------------------------------


@pytest.fixture
def make_direct(make_stack: Any) -> Any:
    return lambda **settings: make_stack(direct=True, **{**SETTINGS, **settings})


NO_BROKER = "redis://127.0.0.1:9/0"


def test_without_a_broker(make_direct: Any) -> None:
    """There is none at that address; and a child that dies locks out no other."""
    stack = make_direct(broker=NO_BROKER, worker_send_task_events=True)
    options = ("--without-broker", "--http-address", "0")
    worker = stack.worker(*options, CELERY_BROKER_READ_URL=NO_BROKER)
    wait_until(lambda: worker.get("/readyz") == (200, "ok\n"), 10, "it to pull")
    assert json.loads(worker.get("/status")[1])["direct"]["restarts"] == 0
    events = stack.publish("order.alone", 200)
    wait_handled(stack, events)
    for child in cpu.children(worker.pid):
        os.kill(child, signal.SIGKILL)
        more = stack.publish("order.after", 20)
        wait_handled(stack, more)
        events += more
    handled_once(stack, events)
    assert worker.stop() == 0
    assert "Cannot connect" not in worker.text()


def test_what_runs_ends_in_every_pool_without_a_broker(make_direct: Any) -> None:
    """A pool of one, that runs tasks where Celery's own loop is."""
    stack = make_direct(broker=NO_BROKER)
    worker = stack.worker("--without-broker", pool="solo", concurrency=1)
    events = stack.publish("slow.last", seconds=4)
    stack.wait_ledger(lambda: bool(lines(stack, events, "begun")), 30, "it to run")
    assert worker.stop() == 0
    assert len(lines(stack, events)) == 1
    stack.wait_settled()


def test_it_takes_no_queue_but_those_it_is_given(make_direct: Any) -> None:
    stack = make_direct()
    queue = stack.settings["task_default_queue"]
    app = Celery("outside", broker=stack.settings["broker_url"], set_as_current=False)
    for number in range(3):
        app.send_task("plain", (number, 0), queue=queue)
    stack.worker()
    events = stack.publish("order.first", 20)
    wait_handled(stack, events)
    assert not stack.ledger("plain")
    stack.worker("-Q", queue)
    stack.wait_ledger(lambda: len(stack.ledger("plain")) == 3, 30, "the queue's tasks")
    app.close()


def test_on_rabbitmq(make_direct: Any, rabbit_server: RabbitServer) -> None:
    stack = make_direct(broker=rabbit_server.url)
    stack.worker()
    events = stack.publish("order.rabbit", 200)
    wait_handled(stack, events)
    handled_once(stack, events)


@pytest.mark.parametrize(
    "options",
    [pytest.param((), marks=pytest.mark.soak), ("--without-broker",)],
    ids=["broker", "no broker"],
)
def test_children_come_and_go(make_direct: Any, options: tuple[str, ...]) -> None:
    """``--autoscale`` and ``--max-tasks-per-child``."""
    stack = make_direct()
    stack.worker("--autoscale", "4,1", "--max-tasks-per-child", "10", *options)
    events = stack.publish("order.many", 60, seconds=0.1)
    events += stack.publish("order.quick", 300)
    wait_handled(stack, events)
    handled_once(stack, events)
    assert len({line["pid"] for line in stack.ledger("handled")}) > 360 // 10 - 5
    first = [line for line in stack.ledger("handled") if line["type"] == "order.many"]
    assert max(concurrent(line["at"], first) for line in first) > 1, "it was not scaled up"


def concurrent(at: float, handled: list[dict[str, Any]]) -> int:
    """How many of these tasks of 0.1 s were running then."""
    return sum(line["at"] - 0.1 < at <= line["at"] for line in handled)


def test_a_busy_worker_leaves_to_the_others_what_it_cannot_begin(make_direct: Any) -> None:
    stack = make_direct()
    stack.worker()
    quick = stack.publish("order.quick", 500)
    wait_handled(stack, quick)  # from here on it knows that it is fast
    long = stack.publish("slow.long", 2, seconds=12)
    stack.wait_ledger(lambda: len(lines(stack, long, "begun")) == 2, 30, "both to run")
    other = stack.worker()
    wait_until(lambda: not stack.consumer()["num_pending"], 10, "nothing to wait")
    waiting = stack.publish("order.waiting", 50, seconds=0.01)
    began = time.monotonic()
    stack.wait_ledger(lambda: len(lines(stack, waiting)) >= 49, 8, "all but one, by the other")
    assert time.monotonic() - began < 8
    assert other.poll() is None
    wait_handled(stack, [*waiting, *long])
    handled_once(stack, [*quick, *long, *waiting])


def test_an_outage_is_waited_for_in_the_worker(make_direct: Any) -> None:
    """By one delivery, however often it is tried; and one that stops hands it back."""
    stack = make_direct(
        jetstream_outage_errors=["tests.apps.desk.OutOfServiceError"], jetstream_backoff=[0.3]
    )
    worker = stack.worker(pool="threads")
    (event_id,) = stack.publish("outage", fail=6)
    wait_handled(stack, [event_id])
    assert {line["num_delivered"] for line in lines(stack, [event_id], "begun")} == {1}
    assert len(lines(stack, [event_id], "begun")) == 7
    (handled,) = lines(stack, [event_id])
    assert handled["doubled"] == 12, "an attempt got what the one before had changed"
    (waiting,) = stack.publish("outage", fail=2)
    stack.wait_ledger(lambda: bool(lines(stack, [waiting], "begun")), 30, "it to be tried")
    assert worker.stop() == 0
    stack.worker()
    wait_handled(stack, [waiting])
    assert not stack.dead_letters()


def test_no_server_at_the_start(make_stack: Any) -> None:
    """A dedicated worker says so; an ordinary one does its other work and goes on trying."""
    stack = make_stack(direct=True, jetstream_connect_retry_attempts=1)
    stack.settings["jetstream_nats_urls"] = "nats://127.0.0.1:9"
    worker = stack.start_worker()
    assert worker.wait(30) == 1
    assert worker.text().rstrip().splitlines()[-1].startswith("Error: no connection to NATS at")
    stack.settings["jetstream_direct"] = True
    ordinary: CeleryProcess = stack.celery(*WORKER, "-c", "1", "-n", "ordinary@%h")
    ordinary.wait_for("ready.")
    with Celery("outside", broker=stack.settings["broker_url"], set_as_current=False) as app:
        app.send_task("plain", (1, 0), queue=stack.settings["task_default_queue"])
    stack.wait_ledger(lambda: len(stack.ledger("plain")) == 1, 30, "the broker's task")
    assert ordinary.stop() == 0
