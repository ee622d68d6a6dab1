"""The bridge as a daemon, and what it does when something around it is missing or late."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from celery_jetstream.settlement import HAND_BACKS
from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.servers import RedisServer
from tests.stack import Stack, handled_all, handled_once

MakeStack = Callable[..., Stack]


def desk_app(stack: Stack) -> Any:
    """The desk's Celery app in this process, for control and inspection."""
    from celery import Celery

    app = Celery("control", set_as_current=False)
    app.conf.update({k: v for k, v in stack.settings.items() if not k.startswith("jetstream_")})
    return app


def queue_length(stack: Stack, name: str | None = None) -> int:
    client = redis.Redis.from_url(stack.settings["broker_url"])
    try:
        return int(client.llen(name or stack.settings["task_default_queue"]))
    finally:
        client.close()


# -- a daemon as Celery's are ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0(make_stack: MakeStack, number: int) -> None:
    stack = make_stack()
    bridge = stack.bridge()
    started = time.monotonic()
    bridge.send(number)
    assert bridge.wait(10) == 0
    assert time.monotonic() - started < 8
    assert "bridge has stopped" in bridge.text()


def test_a_second_signal_ends_it_at_once(make_stack: MakeStack) -> None:
    with NatsServer() as server:
        stack = make_stack(nats_url=server.url)
        bridge = stack.bridge()
        server.pause()  # the orderly end has to wait for its deadlines
        bridge.send(signal.SIGTERM)
        bridge.send(signal.SIGTERM)
        assert bridge.wait(10) in (0, 143)
        server.resume()


def test_an_end_while_nats_hangs_is_bounded(make_stack: MakeStack) -> None:
    with NatsServer() as server:
        stack = make_stack(nats_url=server.url)
        bridge = stack.bridge()
        server.pause()
        started = time.monotonic()
        bridge.send(signal.SIGTERM)
        assert bridge.wait(20) == 0
        assert time.monotonic() - started < 12
        server.resume()


def test_logfile_and_pidfile(make_stack: MakeStack) -> None:
    stack = make_stack()
    pidfile, logfile = stack.directory / "bridge.pid", stack.directory / "bridge-own.log"
    process = stack.celery(
        "jetstream", "bridge", "--pidfile", str(pidfile), "--logfile", str(logfile), "-l", "DEBUG"
    )
    wait_until(lambda: logfile.exists() and "bridge is ready" in logfile.read_text(), 30, "the log")
    assert int(pidfile.read_text()) == process.pid
    assert process.stop() == 0
    assert not pidfile.exists()


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_once_dispatches_what_is_there_and_ends(make_stack: MakeStack, mode: str) -> None:
    stack = make_stack(jetstream_consumer_mode=mode)
    ids = stack.publish("order.created", 20)
    worker = stack.worker()
    assert stack.celery("jetstream", "bridge", "--once").wait(60) == 0
    stack.wait_handled(20)
    handled_once(stack, ids)
    assert worker.stop() == 0


def test_max_messages_takes_no_more(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.publish("order.created", 20)
    stack.worker()
    assert stack.celery("jetstream", "bridge", "--max-messages", "7").wait(60) == 0
    stack.wait_handled(7)
    wait_until(lambda: stack.left() == 13, 30, "13 to stay")
    assert stack.consumer()["num_pending"] == 13


def test_what_the_server_sends_beyond_max_messages_is_handed_back(make_stack: MakeStack) -> None:
    """In push mode nothing is asked for; the next bridge has it at once."""
    stack = make_stack(jetstream_consumer_mode="push", jetstream_ack_wait=60)
    ids = stack.publish("order.created", 20)
    stack.worker()
    assert stack.celery("jetstream", "bridge", "--max-messages", "7").wait(60) == 0
    stack.wait_handled(7)
    wait_until(lambda: stack.left() == 13, 30, "13 to stay")
    stack.bridge()
    stack.wait_handled(20, 30)
    handled_once(stack, ids)


def test_a_consumer_of_the_other_mode_is_an_error(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.bridge().stop()
    stack.settings["jetstream_consumer_mode"] = "push"
    process = stack.celery("jetstream", "bridge")
    assert process.wait(30) == 1
    assert "deliver_subject must be" in process.text()
    assert "delete the consumer" in process.text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"jetstream_ack_wait": 0}, "jetstream_ack_wait"),
        ({"jetstream_backoff": []}, "jetstream_backoff"),
        ({"jetstream_nats_urls": "nats://127.0.0.1:1", "jetstream_connect_retry_delay": 0.1}, ":1"),
        ({"jetstream_use_dlq": False}, "jetstream_no_dlq_action"),
        ({"jetstream_ack_weight": 3}, "did you mean"),
    ],
)
def test_what_cannot_start_says_why(
    make_stack: MakeStack, settings: dict[str, Any], said: str
) -> None:
    stack = make_stack(**settings)
    process = stack.celery("jetstream", "bridge")
    assert process.wait(30) == 1
    assert said in process.text()
    assert "Traceback" not in process.text()


def test_two_handlers_for_one_pattern_is_an_error_with_both_names(make_stack: MakeStack) -> None:
    stack = make_stack()
    process = stack.celery("jetstream", "bridge", DESK_TWICE="1")
    assert process.wait(30) == 1
    assert "tests.apps.desk.order" in process.text()
    assert "tests.apps.desk.order_again" in process.text()


def test_a_stream_with_another_retention_is_an_error(
    make_stack: MakeStack, nats_server: NatsServer, names: Names
) -> None:
    stack = make_stack()
    stack.api(f"STREAM.DELETE.{names.stream_name}")
    stack.api(
        f"STREAM.CREATE.{names.stream_name}",
        {"name": names.stream_name, "subjects": [f"{names.app_name}.>"], "retention": "limits"},
    )
    process = stack.celery("jetstream", "bridge")
    assert process.wait(30) == 1
    assert "retention" in process.text()
    assert "workqueue" in process.text()
    assert "limits" in process.text()


# -- Celery's routing, limits and control ---------------------------------------------------------


def test_queues_routes_and_rate_limits_are_celerys(make_stack: MakeStack) -> None:
    """Also: copies that wait for their rate limit are held, so ack_wait costs no delivery."""
    stack = make_stack(
        jetstream_ack_wait=2, task_routes={"tests.apps.desk.slow": {"queue": "routed"}}
    )
    stack.bridge()
    stack.worker("-Q", f"other,routed,{stack.settings['task_default_queue']}")
    ids = stack.publish("other.one", 3) + stack.publish("slow.one", 2, seconds=0)
    ids += stack.publish("rated.one", 10)  # 2/s: five seconds
    stack.wait_handled(15)
    stack.wait_settled()
    handled_once(stack, ids)
    assert {line["num_delivered"] for line in stack.ledger()} == {1}


def test_the_task_id_is_the_stream_and_the_sequence(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.publish("order.created")
    stack.bridge()
    worker = stack.worker()
    worker.wait_for(f"tests.apps.desk.order[{stack.names.stream_name}-1] received")


def test_revoked_before_it_began_is_a_dead_letter(make_stack: MakeStack) -> None:
    stack = make_stack()
    worker = stack.worker(concurrency=1)
    control, task_id = desk_app(stack).control, f"{stack.names.stream_name}-1"

    def knows() -> bool:
        control.revoke(task_id)
        return any(task_id in ids for ids in (control.inspect().revoked() or {}).values())

    wait_until(knows, 30, "the worker to know")
    stack.publish("order.created")
    stack.bridge()
    stack.wait_ledger(lambda: stack.dead_count() == 1, 30, "the dead letter")
    assert stack.dead_letters()[0]["reason"] == "revoked"
    stack.wait_settled()
    assert not stack.ledger()
    assert worker.process.poll() is None


def test_revoked_while_it_runs_is_a_dead_letter(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.worker(concurrency=1)
    stack.bridge()
    stack.publish("slow.one", seconds=60)
    stack.wait_ledger(lambda: bool(stack.ledger("begun")), 30, "the task to begin")
    desk_app(stack).control.revoke(f"{stack.names.stream_name}-1", terminate=True)
    wait_until(lambda: stack.dead_count() == 1, 30, "the dead letter")
    assert stack.dead_letters()[0]["reason"] == "revoked"
    stack.wait_settled()


def test_a_task_that_this_worker_does_not_know_comes_again(make_stack: MakeStack) -> None:
    """A rolling deploy: the bridge has the handler, the old worker has not. Never a dead letter."""
    stack = make_stack(jetstream_max_deliver=20)
    stack.bridge()
    old = stack.worker(DESK_WITHOUT="tests.apps.desk.order")
    ids = stack.publish("order.created")
    old.wait_for("is handed back", times=2)
    old.stop()
    stack.worker()
    stack.wait_handled(1)
    stack.wait_settled()
    handled_once(stack, ids)
    assert stack.dead_count() == 0


def test_a_child_that_ends_after_its_task_has_settled_it(make_stack: MakeStack) -> None:
    """The confirmation is not waited for; a child drains what is unsent when it ends."""
    stack = make_stack()
    stack.bridge()
    stack.worker("--max-tasks-per-child", "1")
    ids = stack.publish("order.created", 20)
    stack.wait_handled(20)
    stack.wait_settled(timeout=20)  # ack_wait is 30 s
    handled_once(stack, ids)


# -- copies ---------------------------------------------------------------------------------------


def test_a_queue_without_workers_does_not_stop_the_others(make_stack: MakeStack) -> None:
    stack = make_stack(jetstream_max_ack_pending=40, jetstream_ack_wait=2)
    bridge = stack.bridge()
    stack.publish("nobody.there", 25)
    ids = stack.publish("order.created", 200)
    stack.worker()
    stack.wait_handled(200)
    handled_once(stack, ids)
    assert queue_length(stack, "nobody") == 10  # a quarter of max_ack_pending
    bridge.wait_for("queue nobody has 10 copies that no worker takes")
    stack.worker("-Q", "nobody")
    stack.wait_handled(225)
    stack.wait_settled()
    assert {line["num_delivered"] for line in stack.ledger()} == {1}


def test_copies_that_the_broker_lost_come_back_by_themselves(make_stack: MakeStack) -> None:
    stack = make_stack(jetstream_ack_wait=2)
    bridge = stack.bridge()
    ids = stack.publish("order.created", 30)
    wait_until(lambda: queue_length(stack) == 30, 30, "the copies")
    client = redis.Redis.from_url(stack.settings["broker_url"])
    client.delete(stack.settings["task_default_queue"])
    client.close()
    wait_until(lambda: queue_length(stack) == 30, 30, "the copies to be back")
    bridge.wait_for("30 unclaimed copies are dispatched again")
    stack.worker()
    stack.wait_handled(30)
    stack.wait_settled()
    handled_once(stack, ids)
    assert {line["num_delivered"] for line in stack.ledger()} == {1}


def test_a_duplicate_copy_of_a_running_task_does_not_run(make_stack: MakeStack) -> None:
    stack = make_stack(jetstream_ack_wait=5)
    stack.bridge()
    stack.publish("slow.one", seconds=3)
    client = redis.Redis.from_url(stack.settings["broker_url"])
    queue = stack.settings["task_default_queue"]
    wait_until(lambda: queue_length(stack) == 1, 30, "the copy")
    copy = client.lindex(queue, 0)
    stack.worker(concurrency=2)
    stack.wait_ledger(lambda: bool(stack.ledger("begun")), 30, "the task to begin")
    duplicate = json.loads(copy)
    duplicate["properties"]["delivery_tag"] = "another"
    client.lpush(queue, json.dumps(duplicate))
    wait_until(lambda: queue_length(stack) == 0, 10, "the duplicate to be taken")
    client.close()
    stack.wait_handled(1)
    stack.wait_settled()
    assert len(stack.ledger("begun")) == 1


def test_a_message_that_kills_the_whole_worker_is_given_up(make_stack: MakeStack) -> None:
    """The solo pool has no child to lose: only the bridge lives to see that it never ends."""
    stack = make_stack(jetstream_ack_wait=0.6, jetstream_max_deliver=1)
    stack.bridge()
    (killer,) = stack.publish("kill.always")
    ids = []
    while stack.dead_count() == 0:
        worker = stack.worker(pool="solo")
        wait_until(
            lambda worker=worker: worker.process.poll() is not None or stack.dead_count(),
            30,
            "the worker to die of it",
        )
        assert len(stack.ledger("begun")) <= 2 + HAND_BACKS
    ids += stack.publish("order.created", 3)
    if worker.process.poll() is not None:
        stack.worker(pool="solo")
    stack.wait_handled(3)
    stack.wait_settled()
    (letter,) = stack.dead_letters()
    assert letter["reason"] == "max_deliveries_exceeded"
    assert letter["context"]["event_id"] == killer
    handled_once(stack, ids)


def test_an_outage_that_outlasts_every_limit_is_no_dead_letter(make_stack: MakeStack) -> None:
    stack = make_stack(
        jetstream_max_deliver=2,
        jetstream_backoff=[0.05],
        jetstream_outage_errors=["tests.apps.desk.OutOfServiceError"],
    )
    stack.bridge()
    stack.worker()
    ids = stack.publish("outage", fail=30)
    stack.wait_handled(1)
    stack.wait_settled()
    handled_once(stack, ids)
    assert stack.dead_count() == 0


def test_bridges_that_come_and_go_make_no_dead_letter_of_what_never_ran(
    make_stack: MakeStack,
) -> None:
    """The default limit is five, and each end of a bridge costs a delivery."""
    stack = make_stack(jetstream_ack_wait=1)
    ids = stack.publish("order.created", 20)
    for deliveries in range(20, 140, 20):
        bridge = stack.bridge()
        wait_until(partial(delivered, stack, deliveries), 30, "delivery")
        assert bridge.stop() == 0
    stack.bridge()
    stack.worker()
    stack.wait_handled(20)
    stack.wait_settled()
    assert handled_all(stack, ids) >= 0
    assert stack.dead_count() == 0


def delivered(stack: Stack, count: int) -> bool:
    return bool(stack.consumer()["delivered"]["consumer_seq"] >= count)


# -- what is around it goes away ------------------------------------------------------------------


def test_a_broker_that_is_away_is_waited_for_and_said_once(
    make_stack: MakeStack, tmp_path: Path
) -> None:
    with RedisServer() as broker:
        stack = make_stack(broker=broker.url, jetstream_ack_wait=2)
        bridge = stack.bridge()
        broker.kill()
        ids = stack.publish("order.created", 50)
        bridge.wait_for("the Celery broker is away")
        wait_until(lambda: stack.consumer()["num_ack_pending"] > 0, 30, "messages in the bridge")
        broker.start()
        bridge.wait_for("the Celery broker is back")
        stack.worker()
        stack.wait_handled(50)
        stack.wait_settled()
        handled_once(stack, ids)
        assert {line["num_delivered"] for line in stack.ledger()} == {1}
        assert bridge.text().count("the Celery broker is away") == 1


def test_a_broker_that_hangs_is_noticed(make_stack: MakeStack) -> None:
    with RedisServer() as broker:
        stack = make_stack(broker=broker.url)
        bridge = stack.bridge()
        broker.pause()
        ids = stack.publish("order.created", 5)
        bridge.wait_for("the Celery broker is away; messages wait in the bridge: no answer in 10 s")
        broker.resume()
        bridge.wait_for("the Celery broker is back")
        stack.worker()
        stack.wait_handled(5)
        stack.wait_settled()
        handled_once(stack, ids)


def test_one_message_that_cannot_be_sent_does_not_stop_the_others(make_stack: MakeStack) -> None:
    stack = make_stack(jetstream_backoff=[0.2])
    bridge = stack.bridge()
    stack.worker()
    ids = []
    for _ in range(5):
        stack.publish("unsendable")
        ids += stack.publish("order.created", 2)
    stack.wait_handled(10)
    handled_once(stack, ids)
    bridge.wait_for("cannot be sent; the message comes again")
    wait_until(lambda: stack.left() == 5, 30, "the others to be settled")


def test_a_task_class_of_the_apps_keeps_its_own_call(make_stack: MakeStack) -> None:
    """Flask's recipe: an app context around each task, in ``__call__``."""
    stack = make_stack()
    stack.bridge()
    stack.worker()
    stack.publish("in.context")
    assert stack.wait_handled(1)[0]["context"] == "entered"


def test_sigterm_to_the_whole_group_is_no_failure_of_what_ran(make_stack: MakeStack) -> None:
    """As systemd does by default: the children get the signal as well, and die of it."""
    stack = make_stack(jetstream_max_deliver=1)
    stack.bridge()
    worker = stack.worker(concurrency=1)
    stack.publish("slow.one", seconds=3)
    stack.wait_ledger(lambda: bool(stack.ledger("begun")), 30, "the task to begin")
    child = stack.ledger("begun")[0]["pid"]
    worker.send(signal.SIGTERM)
    os.kill(child, signal.SIGTERM)
    worker.wait(30)
    stack.worker()
    stack.wait_handled(1)
    stack.wait_settled()
    assert stack.dead_count() == 0


def test_a_bridge_that_may_not_hear_the_workers_does_not_start(make_stack: MakeStack) -> None:
    denied = 'permissions: {subscribe: {deny: "$JS.ACK.>"}}'
    users = f"authorization {{users = [{{user: u, password: p, {denied}}}]}}"
    with NatsServer(config=users) as server:
        stack = make_stack(nats_url=server.url.replace("nats://", "nats://u:p@"))
        bridge = stack.celery("jetstream", "bridge")
        assert bridge.wait(30) == 1
        assert "may not subscribe to $JS.ACK" in bridge.text()


def test_a_deleted_consumer_is_made_again(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.bridge()
    stack.worker()
    stack.publish("order.created", 5)
    stack.wait_handled(5)
    stack.api(f"CONSUMER.DELETE.{stack.names.stream_name}.{stack.names.app_name}-workers")
    stack.publish("order.created", 5)
    stack.wait_handled(10)


def test_a_deleted_stream_is_made_again(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.bridge()
    stack.worker()
    stack.publish("order.created", 5)
    stack.wait_handled(5)
    stack.api(f"STREAM.DELETE.{stack.names.stream_name}")
    stack.publish("order.created", 5)
    stack.wait_handled(10)


# -- dead letters ---------------------------------------------------------------------------------


def test_without_dead_letters_messages_are_logged_and_gone(make_stack: MakeStack) -> None:
    stack = make_stack(jetstream_use_dlq=False, jetstream_no_dlq_action="log_and_term")
    bridge = stack.bridge()
    worker = stack.worker()
    stack.publish("unheard")
    stack.publish("error.value")
    bridge.wait_for("is given up and destroyed (no_handler)")
    worker.wait_for("is given up and destroyed (unrecoverable_error)")
    stack.wait_settled()
    assert stack.dead_count() == 0


def test_a_dead_letter_that_cannot_be_stored_loses_nothing(make_stack: MakeStack) -> None:
    """The stream does not take the dead-letter subject: the message comes again, and again."""
    stack = make_stack(jetstream_ack_wait=2, jetstream_auto_provision=False)
    stream, app_name = stack.names.stream_name, stack.names.app_name
    stack.celery("jetstream", "provision").wait(30)
    config = stack.api(f"STREAM.INFO.{stream}")["config"]
    taken = [subject for subject in config["subjects"] if not subject.startswith(f"{app_name}.")]
    stack.api(f"STREAM.UPDATE.{stream}", {**config, "subjects": taken})
    stack.worker()
    bridge = stack.bridge()
    stack.publish("unheard")
    consumer = f"CONSUMER.INFO.{stream}.{app_name}-workers"
    wait_until(lambda: stack.api(consumer)["delivered"]["consumer_seq"] > 2, 40, "it to come again")
    bridge.wait_for("could not be published")
    assert stack.left() == 1
    stack.api(f"STREAM.UPDATE.{stream}", config)
    wait_until(lambda: stack.dead_count() == 1, 40, "the dead letter")
    stack.wait_settled()
    bridge.wait_for("dead letters can be published again")


def test_a_body_larger_than_any_event_becomes_a_packed_dead_letter(make_stack: MakeStack) -> None:
    """A foreign producer on a server that takes more than we do."""
    with NatsServer(config="max_payload: 8MB") as server:
        stack = make_stack(nats_url=server.url)
        bridge = stack.bridge()
        large, noise = b"x" * 2_000_000, os.urandom(2_000_000)
        publish_raw(stack, large)
        wait_until(lambda: stack.dead_count() == 1, 30, "the dead letter")
        (letter,) = stack.dead_letters()
        assert letter["reason"] == "malformed_json"
        assert letter["headers"]["x-dlq-encoding"] == "gzip"
        assert gzip.decompress(letter["body"]) == large
        publish_raw(stack, noise)
        bridge.wait_for("larger than jetstream_max_payload even packed")
        assert stack.left() == 1  # kept in the stream, tried again in an hour


def publish_raw(stack: Stack, body: bytes) -> None:
    async def go() -> None:
        session = await stack.hub.connection.session()
        subject = f"{stack.names.destination_app}.sync.{stack.names.app_name}"
        assert "seq" in json.loads((await session.ask(subject, body)).data)

    stack.hub.connection.run(go)
