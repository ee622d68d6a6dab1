"""Publishing against real servers: results, refusals, outages, tasks and the signal hook."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from celery.signals import task_success
from celery.utils.dispatch import Signal

from celery_jetstream import JetStream, publish_event, publish_on
from celery_jetstream.connection import Connection
from celery_jetstream.exceptions import (
    EncodeError,
    EventError,
    NotConnectedError,
    PublishError,
    SubjectError,
)
from celery_jetstream.outcomes import PublishResult, Verdict
from celery_jetstream.signals import (
    after_event_publish,
    before_event_publish,
    event_publish_failed,
    message_dead_lettered,
)
from celery_jetstream.testing import free_port
from tests.conftest import Names
from tests.servers import NatsServer, need, wait_until

KIB = 1024


# ── what the tests stand on ──────────────────────────────────────────────────


class Publishing:
    """An app with a JetStream, and the server's account of what it stored."""

    def __init__(self, url: str, names: Names, **settings: Any) -> None:
        self.app = Celery("test", broker="memory://", set_as_current=False)
        self.app.conf.update(
            jetstream_nats_urls=url,
            jetstream_stream_name=names.stream_name,
            jetstream_app_name=names.app_name,
            jetstream_destination_app=names.destination_app,
            task_store_eager_result=False,
            **settings,
        )
        self.jetstream = JetStream(self.app)
        self.subject = f"{names.app_name}.sync.{names.destination_app}"
        self.stream = names.stream_name

    def __call__(
        self, event_type: str = "user.created", payload: Any = None, **event: Any
    ) -> PublishResult:
        return self.jetstream.publish(event_type, {} if payload is None else payload, **event)

    def stored(self) -> list[dict[str, Any]]:
        """Every message of the stream: subject, headers, envelope."""
        found, sequence = [], 1
        while "error" not in (
            answer := self._api(
                f"STREAM.MSG.GET.{self.stream}", {"seq": sequence, "next_by_subj": ">"}
            )
        ):
            message = answer["message"]
            sequence = message["seq"] + 1
            lines = base64.b64decode(message.get("hdrs", "")).decode().split("\r\n")[1:]
            found.append(
                {
                    "subject": message["subject"],
                    "headers": dict(line.split(": ", 1) for line in lines if ": " in line),
                    "envelope": json.loads(base64.b64decode(message["data"])),
                }
            )
        return found

    def count(self) -> int:
        answer = self._api(f"STREAM.INFO.{self.stream}", {})
        return int(answer["state"]["messages"]) if "state" in answer else 0

    def _api(self, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        return self.jetstream.connection.run(self.jetstream._api, operation, request)


@pytest.fixture
def make_publishing(names: Names) -> Iterator[Callable[..., Publishing]]:
    made: list[Publishing] = []

    def make(url: str, **settings: Any) -> Publishing:
        made.append(Publishing(url, names, **settings))
        return made[-1]

    yield make
    for publishing in made:
        publishing.jetstream.close()


@pytest.fixture
def publish(nats_server: NatsServer, make_publishing: Callable[..., Publishing]) -> Publishing:
    return make_publishing(nats_server.url)


@pytest.fixture
def current_app(publish: Publishing) -> Iterator[Celery]:
    """The app of ``publish`` as Celery's current one, which module-level functions use."""
    from celery import _state

    before = _state._tls.current_app
    publish.app.set_current()
    yield publish.app
    _state._tls.current_app = before


@pytest.fixture
def signalled() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What the three publish signals said, in order."""
    said: list[tuple[str, dict[str, Any]]] = []
    receivers = []
    for sent in (before_event_publish, after_event_publish, event_publish_failed):

        def receive(signal: Any, name: str = sent.name, **arguments: Any) -> None:
            said.append((name, arguments))

        sent.connect(receive, weak=False)
        receivers.append((sent, receive))
    yield said
    for sent, receive in receivers:
        sent.disconnect(receive)


# ── one event ────────────────────────────────────────────────────────────────


def test_the_first_event_makes_the_stream_and_is_stored(publish: Publishing) -> None:
    result = publish("user.created", {"id": 7, "name": "Ada"})
    assert result == PublishResult(
        success=True,
        event_id=result.event_id,
        subject=publish.subject,
        stream=publish.stream,
        sequence=1,
        duplicate=False,
        error=None,
        verdict=Verdict.STORED,
    )
    assert (bool(result), result.transient) == (True, False)
    assert result.raise_for_error() is result
    assert json.loads(json.dumps(result.as_dict())) == result.as_dict()
    (stored,) = publish.stored()
    assert stored["subject"] == publish.subject
    assert stored["headers"] == {"Nats-Msg-Id": result.event_id}
    envelope = stored["envelope"]
    assert envelope["event_id"] == result.event_id
    assert envelope["payload"] == {"id": 7, "name": "Ada"}
    assert (envelope["resource_type"], envelope["resource_id"]) == ("user", "7")


def test_the_same_event_id_is_stored_once(publish: Publishing) -> None:
    first = publish(event_id="order-7")
    second = publish(event_id="order-7")
    assert (first.duplicate, second.duplicate) == (False, True)
    assert (second.success, second.sequence) == (True, first.sequence)
    assert publish.count() == 1


def test_what_may_be_given(publish: Publishing) -> None:
    moment = datetime(2024, 2, 3, 4, 5, 6, tzinfo=timezone.utc)
    result = publish(
        "user.created",
        {"id": 1},
        event_id=UUID(int=5),
        trace_id="trace-1",
        resource_type="person",
        resource_id=77,
        produced_at=moment,
        schema_version="1.1",
        headers={"X-Tenant": "acme", "X-Try": 3},
    )
    assert result.event_id == str(UUID(int=5))
    (stored,) = publish.stored()
    assert stored["headers"] == {
        "X-Tenant": "acme",
        "X-Try": "3",
        "Nats-Msg-Id": str(UUID(int=5)),
    }
    wanted = {
        "event_id": str(UUID(int=5)),
        "trace_id": "trace-1",
        "resource_type": "person",
        "resource_id": "77",
        "produced_at": "2024-02-03T04:05:06.000000Z",
        "schema_version": "1.1",
    }
    assert stored["envelope"] | wanted == stored["envelope"]


def test_where_it_goes(publish: Publishing, names: Names) -> None:
    assert publish().subject == publish.subject
    with_subject = publish(subject=f"{names.app_name}.sync.dlq")
    assert (with_subject.success, with_subject.subject) == (True, f"{names.app_name}.sync.dlq")
    elsewhere = publish(destination="ledger", timeout=0.3)
    assert elsewhere.subject == f"{names.app_name}.sync.ledger"
    assert not elsewhere.success, "nobody has made a stream for it"


@pytest.mark.parametrize("payload", [0, "", False, [], {}, "text", [1, {"a": None}]])
def test_any_json_value_is_a_payload(publish: Publishing, payload: Any) -> None:
    assert publish("user.created", payload)
    assert publish.stored()[0]["envelope"]["payload"] == payload


def test_values_that_json_has_not_and_usual_ones(publish: Publishing) -> None:
    payload = {
        "at": datetime(2024, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
        "price": Decimal("9.90"),
        "uuid": UUID(int=1),
        "nul": "a\0b",
        "emoji": "☃😀",
    }
    publish("user.created", payload).raise_for_error()
    assert publish.stored()[0]["envelope"]["payload"] == {
        "at": "2024-01-02T03:04:05Z",
        "price": "9.90",
        "uuid": str(UUID(int=1)),
        "nul": "a\0b",
        "emoji": "☃😀",
    }


@pytest.mark.parametrize(
    "value", [b"bytes", {1, 2}, float("nan"), float("inf"), "\ud800", object(), Decimal("NaN")]
)
def test_values_that_cannot_be_sent_are_named_by_their_path(
    publish: Publishing, value: Any
) -> None:
    with pytest.raises(EncodeError, match=r"payload\.rows\[1\]\.field") as caught:
        publish("user.created", {"rows": [{}, {"field": value}]})
    assert caught.value.path == "payload.rows[1].field"
    assert publish.jetstream.state == "disconnected", "refused before anything is opened"


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"colour": "red"}, TypeError, "colour"),
        ({"event_type": "user created"}, EventError, "event_type"),
        ({"event_type": "user.*"}, EventError, "event_type"),
        ({"event_type": ""}, EventError, "event_type"),
        ({"subject": "a b"}, SubjectError, "a b"),
        ({"subject": "orders.>"}, SubjectError, "orders"),
        ({"destination": "a.b"}, SubjectError, "a.b"),
        ({"destination": "a", "subject": "b"}, EventError, "not both"),
        ({"headers": {"X": "a\r\nEvil: b"}}, EventError, "control characters"),
        ({"headers": {"X": "a\nb"}}, EventError, "control characters"),
        ({"headers": {"X\r\nY": "a"}}, EventError, "not legal"),
        ({"headers": {"Nats-Msg-Id": "x"}}, EventError, "server"),
        ({"headers": {"nats-ttl": "1s"}}, EventError, "server"),
        ({"event_id": ""}, EventError, "event_id"),
        ({"event_id": "a\r\nb"}, EventError, "event_id"),
        ({"event_id": "x" * 256}, EventError, "event_id"),
        ({"payload": None}, EventError, "payload"),
        ({"resource_id": b"raw"}, EventError, "resource_id"),
        ({"produced_at": "yesterday"}, EventError, "produced_at"),
    ],
    ids=str,
)
def test_what_cannot_be_sent_raises_and_is_not_sent(
    publish: Publishing,
    signalled: list[Any],
    wrong: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    event = {"event_type": "user.created", "payload": {}, **wrong}
    with pytest.raises(error, match=text):
        publish.jetstream.publish(**event)
    assert signalled == []
    assert publish.jetstream.state == "disconnected"


# ── size ─────────────────────────────────────────────────────────────────────


def fitting(publish: Publishing, limit: int, **event: Any) -> int:
    """The length of the payload text with which an event has ``limit`` bytes with its headers."""
    message = publish.jetstream.publisher.message(
        event_type="big.one", payload="", event_id="big", **event
    )
    head = sum(len(f"{k}: {v}\r\n") for k, v in message.headers.items())
    return limit - len(message.body) - head - len("NATS/1.0\r\n\r\n")


@pytest.mark.parametrize("headers", [{}, {"Filler": "y" * 3000}], ids=["plain", "with headers"])
def test_the_largest_event_is_stored_and_one_byte_more_is_refused(
    publish: Publishing, headers: dict[str, str]
) -> None:
    limit = 1024 * KIB - 4 * KIB
    length = fitting(publish, limit, headers=headers)
    result = publish("big.one", "x" * length, event_id="big", headers=headers)
    assert result.success, result.error
    session = publish.jetstream.connection.run(publish.jetstream.connection.session)
    with pytest.raises(EventError, match=f"{limit + 1} bytes.*{limit}.*jetstream_max_payload"):
        publish("big.one", "x" * (length + 1), event_id="big", headers=headers)
    assert not session.lost.is_set()


def test_a_server_that_takes_less_is_said_once_and_respected(
    make_publishing: Callable[..., Publishing], caplog: pytest.LogCaptureFixture
) -> None:
    need("nats")
    with NatsServer(config="max_payload: 64KB") as server:
        publish = make_publishing(server.url)
        unseen = publish("big.one", "x" * 100_000)  # nobody has asked the server yet
        assert not unseen.success
        assert not unseen.transient
        assert "64000" in str(unseen.error) or "65536" in str(unseen.error)
        with pytest.raises(EventError, match="server"):
            publish("big.one", "x" * 100_000)
        assert publish("small.one", "x" * 10_000)
        publish.jetstream.reconnect()
        assert publish.jetstream.connected
        said = [r for r in caplog.records if "jetstream_max_payload=" in r.getMessage()]
        assert len(said) == 1
        assert said[0].levelno == logging.WARNING


def test_what_the_stream_refuses_is_no_outage(publish: Publishing) -> None:
    assert publish()
    config = publish._api(f"STREAM.INFO.{publish.stream}", {})["config"]
    publish._api(f"STREAM.UPDATE.{publish.stream}", {**config, "max_msg_size": 500})
    start = time.monotonic()
    result = publish("big.one", "x" * 1000)
    assert time.monotonic() - start < 5, "a refusal is not tried again"
    assert (result.success, result.transient) == (False, False)
    assert "10054" in str(result.error)
    with pytest.raises(PublishError, match="10054") as caught:
        result.raise_for_error()
    assert (caught.value.event_id, caught.value.transient) == (result.event_id, False)
    assert caught.value.subject == publish.subject


# ── no stream, no permission ─────────────────────────────────────────────────


def test_without_auto_provision_a_missing_stream_is_said(
    nats_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    publish = make_publishing(nats_server.url, jetstream_auto_provision=False)
    start = time.monotonic()
    result = publish(timeout=0.5)
    assert time.monotonic() - start < 3
    assert (result.success, result.transient) == (False, True)
    assert f"no stream takes the subject {publish.subject}" in str(result.error)
    with pytest.raises(PublishError, match="no stream") as caught:
        result.raise_for_error()
    assert caught.value.transient


def test_a_stream_deleted_under_us_is_made_again(publish: Publishing) -> None:
    assert publish()
    publish._api(f"STREAM.DELETE.{publish.stream}", {})
    assert publish(), "made again, and the event stored"


def test_a_publish_does_not_wait_for_an_api_that_answers_nobody(
    names: Names, make_publishing: Callable[..., Publishing]
) -> None:
    """As in an election: asked for its configuration, the stream is silent; then it is there."""
    need("nats")
    config = (
        "authorization { users: [{user: admin, password: pw}, {user: us, password: pw, "
        'permissions: {publish: {deny: ["$JS.API.>"]}}}] }'
    )
    with NatsServer(config=config) as server:
        admin, publish = (
            make_publishing(f"nats://{user}:pw@127.0.0.1:{server.port}") for user in ("admin", "us")
        )
        connection = publish.jetstream.connection
        session = connection.run(connection.session)

        def elect() -> None:
            denied = "the stream's configuration to be asked for"
            wait_until(lambda: "violation" in str(session.error).lower(), 10, denied)
            admin.jetstream.provision()

        thread = threading.Thread(target=elect)
        thread.start()
        start = time.monotonic()
        assert publish(timeout=15)
        assert time.monotonic() - start < 10, "it waited until it had given up asking"
        thread.join()


@pytest.fixture
def deaf_server(names: Names, connect_to: Callable[..., Connection]) -> Iterator[NatsServer]:
    """Takes our publishes and never answers them: somebody else gets them, and says nothing."""
    need("nats")
    subject = f"{names.app_name}.sync.{names.destination_app}"
    config = (
        "authorization { users: [{user: us, password: pw}] }\n"
        f'mappings: {{ "{subject}": "deaf" }}'
    )
    with NatsServer(config=config) as server:
        other = connect_to(f"nats://us:pw@127.0.0.1:{server.port}")

        async def listen() -> None:
            session = await other.session()
            await session.subscribe("deaf", lambda _: None)
            await session.round_trip(10)

        other.run(listen)
        yield server


def test_a_batch_that_is_never_answered_ends_in_time(
    deaf_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    publish = make_publishing(f"nats://us:pw@127.0.0.1:{deaf_server.port}")
    publish.jetstream.connect()
    start = time.monotonic()
    results = publish.jetstream.publish_batch(
        [{"event_type": "user.created", "payload": {}}] * 1000, timeout=1
    )
    assert time.monotonic() - start < 6
    assert len(results) == 1000
    assert {(r.success, r.transient) for r in results} == {(False, True)}
    assert "did not confirm" in str(results[-1].error)


def test_unanswered_publishes_are_forgotten(
    deaf_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    publish = make_publishing(f"nats://us:pw@127.0.0.1:{deaf_server.port}")
    connection = publish.jetstream.connection
    session = connection.run(connection.session)
    for _ in range(3):
        publish.jetstream.publish_batch(
            [{"event_type": "user.created", "payload": {}}] * 300, timeout=0.2
        )
    assert connection.run(connection.session) is session
    wait_until(lambda: not session._waiting, 10, "the unanswered to be forgotten")


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_publish_leaves_nothing_waiting(
    deaf_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    publish = make_publishing(f"nats://us:pw@127.0.0.1:{deaf_server.port}")
    connection = publish.jetstream.connection
    connection.run(connection.session)

    def waiting() -> bool:  # of the session that there is now: a slow machine loses one
        return bool(connection._session and connection._session._waiting)

    def interrupt() -> None:
        wait_until(waiting, 30, "the publish to wait")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        publish(timeout=60)
    thread.join()
    wait_until(lambda: not waiting(), 10, "nothing to wait")
    assert connection.connected


def test_publish_in_the_loop_thread_is_an_error(publish: Publishing) -> None:
    caught: list[BaseException] = []

    def receive(**_: Any) -> None:
        try:
            publish()
        except BaseException as error:
            caught.append(error)

    message_dead_lettered.connect(receive, weak=False)
    try:
        connection = publish.jetstream.connection
        done = threading.Event()

        def dead_letter() -> None:  # as the settler does, in the loop thread
            message_dead_lettered.send(sender=publish, delivery=None, reason="", event_id="")
            done.set()

        connection.call_soon(dead_letter)
        assert done.wait(10), "a deadlock"
    finally:
        message_dead_lettered.disconnect(receive)
    assert [type(error) for error in caught] == [RuntimeError]
    assert publish()


# ── batches ──────────────────────────────────────────────────────────────────


def test_a_batch_has_its_results_in_order(publish: Publishing) -> None:
    batch = [
        {"event_type": "user.created", "payload": {"id": n}, "event_id": f"e{n}"}
        for n in range(1500)
    ]
    batch[700] = batch[3]
    results = publish.jetstream.publish_batch(iter(batch))
    assert [r.event_id for r in results] == [event["event_id"] for event in batch]
    assert all(results)
    assert [i for i, r in enumerate(results) if r.duplicate] == [700]
    assert results[700].sequence == results[3].sequence
    sequences = [r.sequence for i, r in enumerate(results) if i != 700]
    assert sequences == list(range(1, 1500)), "in the order given"


def test_an_empty_batch(publish: Publishing) -> None:
    assert publish.jetstream.publish_batch([]) == []


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"event_type": "user.created", "payload": {"x": b""}}, EncodeError),
        ({"event_type": "user.created", "payload": {}, "colour": "red"}, TypeError),
        ({"event_type": "user.created"}, TypeError),
        ({"event_type": "user.created", "payload": {}, "destination": "a.b"}, SubjectError),
        ({"event_type": "user.created", "payload": "x" * 1100 * KIB}, EventError),
    ],
    ids=["bytes", "keyword", "no payload", "destination", "size"],
)
def test_a_bad_event_refuses_the_whole_batch_by_its_index(
    publish: Publishing, signalled: list[Any], wrong: dict[str, Any], error: type[Exception]
) -> None:
    publish.jetstream.connect()
    good = {"event_type": "user.created", "payload": {}}
    with pytest.raises(error, match="event 2 of the batch"):
        publish.jetstream.publish_batch([good, good, wrong, good])
    assert publish.count() == 0
    assert signalled == []


def test_one_refused_event_does_not_hold_the_others(publish: Publishing) -> None:
    assert publish()
    config = publish._api(f"STREAM.INFO.{publish.stream}", {})["config"]
    publish._api(f"STREAM.UPDATE.{publish.stream}", {**config, "max_msg_size": 1000})
    batch = [{"event_type": "user.created", "payload": "x" * n} for n in (1, 2000, 3)]
    results = publish.jetstream.publish_batch(batch)
    assert [r.success for r in results] == [True, False, True]


# ── outages ──────────────────────────────────────────────────────────────────


def test_publishing_before_there_is_a_server(
    own_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    own_server.kill()
    publish = make_publishing(own_server.url)
    late = threading.Timer(1, own_server.start)
    late.start()
    result = publish(timeout=30)
    late.join()
    assert result.success, result.error


def test_publishing_without_any_server_ends_in_time(
    make_publishing: Callable[..., Publishing],
) -> None:
    publish = make_publishing(f"nats://127.0.0.1:{free_port()}")
    start = time.monotonic()
    result = publish(timeout=1)
    assert 0.3 < time.monotonic() - start < 4
    assert (result.success, result.transient) == (False, True)
    assert "no connection to NATS at nats://127.0.0.1" in str(result.error)


def test_publishing_through_an_outage_stores_once(
    own_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    publish = make_publishing(own_server.url)
    assert publish()
    own_server.kill()
    late = threading.Timer(1, own_server.start)
    late.start()
    result = publish(event_id="in-the-outage", timeout=30)
    late.join()
    assert result.success, result.error
    ids = [stored["envelope"]["event_id"] for stored in publish.stored()]
    assert ids.count("in-the-outage") == 1


def test_publishing_while_the_server_hangs_is_bounded_and_stores_once(
    own_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    publish = make_publishing(own_server.url)
    assert publish()
    own_server.pause()
    start = time.monotonic()
    given_up = publish(event_id="hung", timeout=1)
    assert time.monotonic() - start < 4
    assert (given_up.success, given_up.transient) == (False, True)
    own_server.resume()
    assert publish(event_id="hung", timeout=30), "the same event again"
    ids = [stored["envelope"]["event_id"] for stored in publish.stored()]
    assert ids.count("hung") == 1


def test_large_batches_while_the_server_hangs_are_bounded(
    own_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    publish = make_publishing(own_server.url)
    assert publish()
    own_server.pause()
    batch = [{"event_type": "big.one", "payload": "x" * 900 * KIB} for _ in range(20)]
    start = time.monotonic()
    results = publish.jetstream.publish_batch(batch, timeout=3)
    took = time.monotonic() - start
    own_server.resume()
    assert took < 10
    assert not any(results)
    wait_until(lambda: publish(timeout=5).success, 30, "publishing to work again")


def test_a_batch_through_kill_and_restart_is_stored_exactly_once(
    own_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    publish = make_publishing(own_server.url)
    publish.jetstream.connect()
    total = 6000
    batch = [
        {"event_type": "user.created", "payload": {"id": n}, "event_id": f"e{n}"}
        for n in range(total)
    ]
    results: list[PublishResult] = []

    def work() -> None:
        results.extend(publish.jetstream.publish_batch(batch, timeout=50))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    with NatsServer() as _:  # another server's start is time enough for some to be on their way
        pass
    own_server.kill()
    own_server.start()
    worker.join(55)
    assert len(results) == total
    failed = [r.error for r in results if not r.success]
    assert not failed, failed[:3]
    ids = [stored["envelope"]["event_id"] for stored in publish.stored()]
    assert len(ids) == total
    assert set(ids) == {f"e{n}" for n in range(total)}


def test_threads_publish_together(publish: Publishing) -> None:
    publish.jetstream.connect()
    results: list[PublishResult] = []

    def work(thread: int) -> None:
        results.extend(publish(payload={"id": f"{thread}-{n}"}) for n in range(50))

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert len(results) == 400
    assert all(results)
    assert sorted(r.sequence or 0 for r in results) == list(range(1, 401))


def test_the_oldest_server_stores_and_deduplicates(
    old_nats_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    publish = make_publishing(old_nats_server.url)
    first, second = publish(event_id="one"), publish(event_id="one")
    assert first.success, first.error
    assert (second.success, second.duplicate) == (True, True)
    assert all(publish.jetstream.publish_batch([{"event_type": "a.b", "payload": 1}] * 300))
    assert publish.count() == 301


# ── asynchronous callers ─────────────────────────────────────────────────────


def test_apublish_in_another_loop(publish: Publishing, signalled: list[Any]) -> None:
    async def main() -> list[PublishResult]:
        wanted = (publish.jetstream.apublish("user.created", {"id": n}) for n in range(100))
        return await asyncio.gather(*wanted)

    results = asyncio.run(main())
    assert all(results)
    assert len({r.sequence for r in results}) == 100
    assert [name for name, _ in signalled].count("after_event_publish") == 100


def test_apublish_refuses_as_publish_does(publish: Publishing) -> None:
    async def main() -> None:
        with pytest.raises(EncodeError):
            await publish.jetstream.apublish("user.created", {"x": b""})
        with pytest.raises(TypeError):
            await publish.jetstream.apublish("user.created", {}, colour="red")

    asyncio.run(main())


def test_apublish_cancelled_by_its_caller(
    deaf_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    publish = make_publishing(f"nats://us:pw@127.0.0.1:{deaf_server.port}")
    connection = publish.jetstream.connection
    session = connection.run(connection.session)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(publish.jetstream.apublish("user.created", {}), 0.3)

    asyncio.run(main())
    wait_until(lambda: not session._waiting, 10, "nothing to wait")


# ── signals ──────────────────────────────────────────────────────────────────


def test_signals_of_a_publish(publish: Publishing, signalled: list[Any]) -> None:
    result = publish(event_id="s1", headers={"X-A": "b"})
    (first, before), (second, after) = signalled
    assert (first, second) == ("before_event_publish", "after_event_publish")
    assert before["sender"] is after["sender"] is publish.jetstream
    assert before["event"].event_id == "s1"
    assert before["subject"] == publish.subject
    assert before["headers"]["X-A"] == "b"
    assert after["result"] is result


def test_signals_of_a_failure(
    nats_server: NatsServer,
    make_publishing: Callable[..., Publishing],
    signalled: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish = make_publishing(nats_server.url, jetstream_auto_provision=False)
    result = publish(event_id="lost", timeout=0.2)
    assert [name for name, _ in signalled] == ["before_event_publish", "event_publish_failed"]
    assert signalled[1][1]["result"] is result
    assert signalled[1][1]["event"].event_id == "lost"
    assert "event lost was not published: no stream" in caplog.text


def test_a_receiver_that_raises_changes_nothing(publish: Publishing) -> None:
    def raises(**_: Any) -> None:
        raise ValueError("of no account")

    before_event_publish.connect(raises, weak=False)
    after_event_publish.connect(raises, weak=False)
    try:
        assert publish()
    finally:
        before_event_publish.disconnect(raises)
        after_event_publish.disconnect(raises)


# ── publish_event ────────────────────────────────────────────────────────────


def test_publish_event_has_the_task_id_as_event_id(
    publish: Publishing, current_app: Celery
) -> None:
    event = {"event_type": "user.created", "payload": {"id": 1}}
    done = publish_event.apply(kwargs=event, task_id="task-1")
    assert done.get()["success"] is True
    assert done.get() == {
        "success": True,
        "event_id": "task-1",
        "subject": publish.subject,
        "stream": publish.stream,
        "sequence": 1,
        "duplicate": False,
        "error": None,
        "verdict": "stored",
        "error_code": None,
        "queued": False,
        "transient": False,
    }
    again = publish_event.apply(kwargs=event, task_id="task-1")
    assert again.get()["duplicate"] is True, "a task delivered twice stores one event"
    given = publish_event.apply(kwargs={**event, "event_id": "mine"})
    assert given.get()["event_id"] == "mine"


def test_publish_event_fails_for_good_on_a_bad_event(
    publish: Publishing, current_app: Celery
) -> None:
    bad = publish_event.apply(kwargs={"event_type": "user created", "payload": {}})
    assert bad.state == "FAILURE"
    assert isinstance(bad.result, EventError)


def test_publish_event_fails_for_good_on_a_refusal(
    publish: Publishing, current_app: Celery
) -> None:
    assert publish()
    config = publish._api(f"STREAM.INFO.{publish.stream}", {})["config"]
    publish._api(f"STREAM.UPDATE.{publish.stream}", {**config, "max_msg_size": 500})
    refused = publish_event.apply(kwargs={"event_type": "a.b", "payload": "x" * 1000})
    assert refused.state == "FAILURE"
    assert isinstance(refused.result, PublishError)


def test_publish_event_retries_an_outage_with_the_same_event_id(
    own_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    from celery import _state

    publish = make_publishing(own_server.url)
    assert publish()
    own_server.kill()
    failed: list[str] = []

    def back_up(result: PublishResult, **_: Any) -> None:
        failed.append(result.event_id)
        if len(failed) == 2:
            own_server.start()

    before = _state._tls.current_app
    publish.app.set_current()
    event_publish_failed.connect(back_up, weak=False)
    try:
        done = publish_event.apply(
            kwargs={"event_type": "user.created", "payload": {}, "timeout": 0.5}, task_id="t1"
        )
        assert done.get()["event_id"] == "t1"
    finally:
        event_publish_failed.disconnect(back_up)
        _state._tls.current_app = before
    assert set(failed) == {"t1"}
    ids = [stored["envelope"]["event_id"] for stored in publish.stored()]
    assert ids.count("t1") == 1


# ── publish_on ───────────────────────────────────────────────────────────────


class Sender:
    def __init__(self, name: str = "") -> None:
        self.name = name


class PlainSignal:
    """Like Django's: ``send(sender, **named)`` calls ``receiver(signal=…, sender=…, **named)``."""

    def __init__(self) -> None:
        self.receivers: list[Callable[..., Any]] = []

    def connect(self, receiver: Callable[..., Any], weak: bool = True) -> None:
        assert not weak
        self.receivers.append(receiver)

    def send(self, sender: Any, **named: Any) -> None:
        for receiver in self.receivers:
            receiver(signal=self, sender=sender, **named)


@pytest.mark.parametrize("make", [lambda: Signal(name="s"), PlainSignal], ids=["celery", "django"])
def test_publish_on_any_signal(
    publish: Publishing, current_app: Celery, make: Callable[[], Any]
) -> None:
    sent = make()
    publish_on(sent, event_type="thing.saved", immediate=True, resource_id="r1")
    sent.send(sender=Sender(), created=True, count=3, instance=object())
    (stored,) = publish.stored()
    assert stored["envelope"]["event_type"] == "thing.saved"
    assert stored["envelope"]["resource_id"] == "r1"
    assert stored["envelope"]["payload"] == {"created": True, "count": 3}


def test_publish_on_with_a_payload_function(publish: Publishing, current_app: Celery) -> None:
    sent = Signal(name="s")
    publish_on(
        sent,
        event_type="thing.saved",
        immediate=True,
        payload=lambda sender, what, **_: {"by": sender.name, "what": what},
    )
    sent.send(sender=Sender("me"), what="it")
    assert publish.stored()[0]["envelope"]["payload"] == {"by": "me", "what": "it"}


def test_publish_on_one_sender(publish: Publishing, current_app: Celery) -> None:
    sent, wanted = Signal(name="s"), Sender("reports.render")
    publish_on(sent, event_type="by.object", sender=wanted, immediate=True)
    publish_on(sent, event_type="by.name", sender="reports.render", immediate=True)
    sent.send(sender=Sender("other"))
    sent.send(sender=None)
    sent.send(sender=wanted)
    sent.send(sender=Sender("reports.render"))
    kinds = [stored["envelope"]["event_type"] for stored in publish.stored()]
    assert sorted(kinds) == ["by.name", "by.name", "by.object"]


def test_publish_on_task_success_passes_over_our_own_tasks(
    publish: Publishing, current_app: Celery
) -> None:
    @current_app.task(name="reports.render", shared=False)
    def render() -> int:
        return 7

    receiver = publish_on(
        task_success,
        event_type="report.ready",
        payload=lambda result, **_: {"result": result},
        immediate=True,
    )
    try:
        render.apply().get()
        publish_event.apply(kwargs={"event_type": "other.one", "payload": {}}).get()
    finally:
        task_success.disconnect(receiver)
    kinds = [stored["envelope"]["event_type"] for stored in publish.stored()]
    assert kinds == ["report.ready", "other.one"], "and no report of the publishing itself"


def test_publish_on_by_way_of_a_task(publish: Publishing, current_app: Celery) -> None:
    current_app.conf.task_always_eager = True
    sent = Signal(name="s")
    publish_on(sent, event_type="thing.saved")
    sent.send(sender=None, count=1)
    assert [s["envelope"]["event_type"] for s in publish.stored()] == ["thing.saved"]


def test_publish_on_never_troubles_the_sender(
    make_publishing: Callable[..., Publishing], caplog: pytest.LogCaptureFixture
) -> None:
    from celery import _state

    publish = make_publishing(f"nats://127.0.0.1:{free_port()}")
    before = _state._tls.current_app
    publish.app.set_current()
    try:
        sent = PlainSignal()
        publish_on(sent, event_type="outage.now", immediate=True)
        start = time.monotonic()
        sent.send(sender=None, count=1)
        assert time.monotonic() - start < 3, "one attempt of at most a second"

        wrong = PlainSignal()
        publish_on(wrong, event_type="bad.payload", immediate=True, payload=lambda **_: {"x": b""})
        publish_on(wrong, event_type="bad.function", payload=lambda **_: 1 / 0)
        wrong.send(sender=None)
    finally:
        _state._tls.current_app = before
    for kind in ("outage.now", "bad.payload", "bad.function"):
        assert f"event {kind} of a signal was not published" in caplog.text


def test_publish_on_never_waits_for_a_dead_celery_broker(
    make_publishing: Callable[..., Publishing], caplog: pytest.LogCaptureFixture
) -> None:
    from celery import _state

    publish = make_publishing("nats://127.0.0.1:1", broker_url=f"redis://127.0.0.1:{free_port()}/0")
    before = _state._tls.current_app
    publish.app.set_current()
    try:
        sent = PlainSignal()
        publish_on(sent, event_type="broker.dead")
        start = time.monotonic()
        sent.send(sender=None, count=1)
        assert time.monotonic() - start < 20, "redis-py's own tries, once"
    finally:
        _state._tls.current_app = before
    assert "event broker.dead of a signal was not published" in caplog.text


def test_closing_while_publishing_is_a_result_or_an_error_and_no_hang(
    own_server: NatsServer, make_publishing: Callable[..., Publishing]
) -> None:
    publish = make_publishing(own_server.url)
    assert publish()
    own_server.pause()
    ends: list[object] = []

    def work() -> None:
        try:
            ends.append(publish(timeout=60))
        except BaseException as error:
            ends.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    connection = publish.jetstream.connection
    wait_until(lambda: connection._session and connection._session._waiting, 10, "it to wait")
    publish.jetstream.close()
    worker.join(20)
    (end,) = ends
    assert isinstance(end, NotConnectedError)
