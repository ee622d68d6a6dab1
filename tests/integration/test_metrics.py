"""What Prometheus gets of a prefork worker and a bridge, and when all around them is away."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream, JetStreamTask, meters, metrics
from celery_jetstream.bridge import Bridge
from tests.conftest import Names
from tests.databases import Database
from tests.servers import NatsServer, wait_until
from tests.stack import ROOT
from tests.watching import Watched, samples


def handled(watched: Watched, event_type: str, count: int = 1, **payload: Any) -> list[str]:
    ids = watched.stack.publish(event_type, count, **payload)
    watched.stack.wait_settled(20)
    return ids


def test_the_endpoint_has_what_children_and_bridge_counted(watched: Watched) -> None:
    before = watched.metrics()
    handled(watched, "order.made", 20)
    handled(watched, "error.value", 2)
    handled(watched, "error.once")

    def grown(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return watched.metrics().get(key, 0.0) - before.get(key, 0.0)

    order, value, once = (
        f"tests.apps.desk.{name}" for name in ("order", "error_value", "error_once")
    )
    wait_until(lambda: grown("dead_letters_total", reason="unrecoverable_error") == 2, 5, "2 dead")
    assert grown("messages_settled_total", handler=order, outcome="ack") == 20
    assert grown("handler_seconds_count", handler=order) == 20
    assert grown("messages_settled_total", handler=value, outcome="dead_letter") == 2
    assert grown("messages_settled_total", handler=once, outcome="nak") == 1
    assert grown("messages_settled_total", handler=once, outcome="ack") == 1
    assert grown("messages_received_total") == 24  # in the bridge
    assert grown("messages_redelivered_total") == 1
    assert len(list(watched.counts.glob("histogram_*.db"))) >= 3


def test_the_endpoint_has_what_is_looked_up(watched: Watched) -> None:
    consumer = f"{watched.stack.names.app_name}-workers"
    assert watched.metric("collector_up", collector="nats") == 1
    assert watched.metric("consumer_pending_messages", consumer=consumer) is not None
    assert watched.metric("consumer_ack_pending_messages", consumer=consumer) is not None
    assert watched.metric("dead_letters_stored") is not None
    assert watched.metric("messages_in_flight") is not None
    assert watched.metric("connection_down") == 0


def test_of_a_killed_child_the_counters_stay_and_the_gauges_go(watched: Watched) -> None:
    order = {"handler": "tests.apps.desk.order", "outcome": "ack"}
    handled(watched, "order.made", 4)
    before = watched.metric("messages_settled_total", **order) or 0
    handled(watched, "kill.once")
    (run, *_) = [line for line in watched.stack.ledger("begun") if line["type"] == "kill.once"]
    gauges = f"gauge_live*_{run['pid']}.db"
    watched.metrics()
    assert not list(watched.counts.glob(gauges))
    assert list(watched.counts.glob(f"counter_{run['pid']}.db"))
    assert watched.metric("messages_settled_total", **order) == before
    assert watched.metric("connection_down") == 0


# -- in this process -------------------------------------------------------------------------------


@pytest.fixture
def make_app(names: Names) -> Iterator[Callable[..., JetStream]]:
    made: list[JetStream] = []

    def make(url: str, **settings: Any) -> JetStream:
        app = Celery("counted", broker="memory://", set_as_current=False)
        app.conf.update(
            jetstream_nats_urls=url,
            jetstream_stream_name=names.stream_name,
            jetstream_app_name=names.app_name,
            jetstream_destination_app=names.destination_app,
            jetstream_metrics=True,
            task_default_queue=names.app_name,
            **settings,
        )
        made.append(JetStream(app))
        return made[-1]

    yield make
    for jetstream in made:
        jetstream.close()
    meters.stop()


def told(jetstream: JetStream) -> dict[Any, float]:
    content_type, body = metrics.exposition(jetstream)
    assert content_type.startswith("text/plain")
    return samples(body.decode())


def test_an_outbox_is_counted_and_looked_at(
    nats_server: NatsServer, database: Database, make_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CACHE", 0.0)
    jetstream = make_app(
        nats_server.url, jetstream_database_url=database.url, jetstream_outbox_nudge=False
    )
    assert ("outbox_pending_events", ()) not in told(jetstream)  # it has no tables yet
    jetstream.outbox.create_tables()
    jetstream.provision()
    before = told(jetstream)
    for number in range(3):
        jetstream.outbox.publish("a.b", {"id": number})
    jetstream.outbox.publish("a.b", {}, delay="1h")
    pending = told(jetstream)
    assert pending[("outbox_pending_events", ())] == 4
    assert pending[("outbox_oldest_due_seconds", ())] >= 0
    assert pending[("outbox_given_up_events", (("status", "failed"),))] == 0
    start = time.monotonic()
    assert jetstream.outbox.drain().sent == 3
    after = told(jetstream)
    late = time.monotonic() - start + 5
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    stored = (("outcome", "stored"), ("via", "outbox"))
    assert grown[("events_published_total", stored)] == 3
    assert grown[("outbox_batch_events_sum", ())] == 3
    assert grown[("outbox_commit_to_ack_seconds_count", ())] == 3
    assert 0 < grown[("outbox_commit_to_ack_seconds_sum", ())] < 3 * late
    assert after[("outbox_breaker_open", ())] == 0
    assert after[("outbox_pending_events", ())] == 1
    assert after[("collector_up", (("collector", "outbox"),))] == 1


def test_a_bridge_tells_of_its_broker_and_the_lag_and_answers_when_nats_hangs(
    own_server: NatsServer, make_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CACHE", 0.0)
    monkeypatch.setattr(metrics, "TIMEOUT", 0.5)
    jetstream = make_app(own_server.url)
    app = jetstream.app

    @app.task(name="counted", base=JetStreamTask, event_types=("a.b",), shared=False)
    def handler(event: Any) -> None: ...

    app.finalize()
    bridge = Bridge(jetstream)
    running = threading.Thread(target=bridge.run)
    running.start()
    try:
        wait_until(lambda: told(jetstream)[("ready", ())] == 1, 10, "the bridge")
        found = told(jetstream)
        assert found[("broker_connected", ())] == 1
        assert found[("messages_in_flight", ())] == 0
        nats = ("collector_up", (("collector", "nats"),))
        assert found[nats] == 1
        subject = f"{jetstream.config.destination_app}.sync.{jetstream.config.app_name}"
        jetstream.publish("a.b", {}, subject=subject)
        wait_until(lambda: told(jetstream)[("messages_in_flight", ())] == 1, 5, "it in flight")
        own_server.pause()
        start = time.monotonic()
        found = told(jetstream)
        assert time.monotonic() - start < 2
        assert found[nats] == 0
        assert not any(name == "consumer_pending_messages" for name, _ in found)
        wait_until(lambda: told(jetstream)[("connection_down", ())] == 1, 10, "the loss")
        assert told(jetstream)[("ready", ())] == 0
        own_server.resume()
        wait_until(lambda: told(jetstream)[nats] == 1, 20, "it again")
        assert told(jetstream)[("connection_down", ())] == 0
    finally:
        bridge.stop()
        running.join()


def test_an_address_that_is_taken_is_said_and_no_more(
    watched: Watched, make_app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    jetstream = make_app("nats://localhost:1", jetstream_metrics_address=watched.port)
    assert metrics.serve(jetstream) is None
    assert "an address of its own" in caplog.text


def test_the_address_is_free_when_the_worker_is_gone_and_a_child_of_it_is_not() -> None:
    code = """
import os, signal
from celery import Celery
from celery_jetstream import JetStream
from celery_jetstream.metrics import serve
from celery_jetstream.testing import free_port

app = Celery("a", broker="memory://")
app.conf.update(jetstream_app_name="a", jetstream_destination_app="b")
app.conf.jetstream_metrics_address = free_port()
jetstream = JetStream(app)
stop = serve(jetstream)
if not (child := os.fork()):
    signal.pause()
stop()
again = serve(jetstream)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
raise SystemExit(again is None)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=20)
