"""The testing kit, on a shop of our own; and docs/how-to/test.md, as its reader types it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, current_app
from celery.exceptions import Ignore, Reject
from celery.utils.dispatch import Signal
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from celery_jetstream import (
    Ack,
    DeadLetter,
    Event,
    JetStream,
    Nak,
    jetstream_handler,
    publish_event,
    publish_on,
)
from celery_jetstream.exceptions import ConfigurationError, EventError, NotConnectedError
from celery_jetstream.schema import create_inbox, create_outbox
from celery_jetstream.signals import after_event_publish
from celery_jetstream.testing import (
    assert_published,
    capture_events,
    configured,
    deliver,
    drain,
    perform,
    published_events,
    rebound,
    refute_published,
)
from tests.conftest import Names
from tests.databases import Database
from tests.servers import NatsServer

ROOT = Path(__file__).parents[2]

# Nobody listens at these: what the kit does not send cannot be missed.
app = Celery("kit", broker="redis://127.0.0.1:1/0", set_as_current=False)
app.conf.update(
    result_backend="redis://127.0.0.1:1/0",
    jetstream_nats_urls="nats://127.0.0.1:1",
    jetstream_app_name="kit",
    jetstream_destination_app="billing",
    jetstream_backoff=[1, 5, 60],
)
jetstream = JetStream(app)


@dataclasses.dataclass
class Invoice:
    id: int


def handle(what: str, payload: Any) -> Any:
    """What the handlers do; a test has others."""
    return what


@jetstream_handler("kit.plain.*", name="kit.plain", autoretry_for=(OSError,), bind=True)
def plain(self: Any, event: Event) -> Any:
    return handle(self.request.id, event)


@jetstream_handler("kit.typed", name="kit.typed", payload=Invoice)
def typed(event: Event) -> Any:
    return event.payload


@jetstream_handler("kit.once", name="kit.once")
def once(event: Event, session: Any = None) -> Any:
    session.execute(text("INSERT INTO effects VALUES (:id)"), {"id": event.event_id})
    jetstream.outbox.add(session, event_type="effect.done", payload={"id": event.event_id})
    return handle("once", event)


@pytest.fixture
def does(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``does(function)``: what the handlers do in this test."""
    return lambda function: monkeypatch.setitem(globals(), "handle", function)


def raising(error: BaseException) -> Any:
    def handle(*_: Any) -> Any:
        raise error

    return handle


@pytest.fixture
def engine(sqlite: Database) -> Iterator[Engine]:
    engine = create_engine(sqlite.url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE effects (id VARCHAR(64))"))
        create_outbox(connection)
        create_inbox(connection)
    yield engine
    engine.dispose()


@pytest.fixture
def with_database(engine: Engine) -> Iterator[JetStream]:
    with configured(app, jetstream_database_url=str(engine.url), jetstream_use_inbox=True) as found:
        yield found


@pytest.fixture
def on_server(nats_server: NatsServer, names: Names) -> Iterator[JetStream]:
    settings = {f"jetstream_{name}": value for name, value in dataclasses.asdict(names).items()}
    with rebound(app, nats_server, **settings) as found:
        yield found


@pytest.fixture
def on_server_with_database(on_server: JetStream, engine: Engine) -> Iterator[JetStream]:
    with configured(app, jetstream_database_url=str(engine.url), jetstream_use_inbox=True) as found:
        found.connect()
        yield found


# ── what is published ─────────────────────────────────────────────────────────


def test_every_way_to_publish_is_captured_in_order(
    with_database: JetStream, engine: Engine, sqlite: Database
) -> None:
    signal = Signal(name="ended")
    publish_on(signal, event_type="way.signal")
    publish_on(signal, event_type="way.signal_now", immediate=True)

    async def awaited() -> None:
        await jetstream.apublish("way.apublish", {})
        asynchronous = create_async_engine(sqlite.async_url)
        async with AsyncSession(asynchronous) as session, session.begin():
            await jetstream.outbox.add(session, event_type="way.async_session", payload={})
        await asynchronous.dispose()

    announced: list[str] = []

    def note(event: Event, **_: Any) -> None:
        announced.append(event.event_type)

    after_event_publish.connect(note)
    with capture_events(app) as captured:
        assert jetstream.publish("way.publish", {}).success
        results = jetstream.publish_batch([{"event_type": "way.batch", "payload": {}}] * 2)
        assert [result.stream for result in results] == [jetstream.config.stream_name] * 2
        asyncio.run(awaited())
        publish_event.delay(event_type="way.task", payload={})
        publish_event.s(event_type="way.signature", payload={}).apply_async(countdown=60)
        signal.send(sender=None, number=1)
        with Session(engine) as session:
            jetstream.outbox.add(session, event_type="way.session", payload={})
            with suppress(LookupError), session.begin_nested():
                jetstream.outbox.add(session, event_type="way.savepoint", payload={})
                raise LookupError
            session.commit()
        with engine.begin() as connection:
            events = [{"event_type": "way.core", "payload": {}}] * 2
            jetstream.outbox.add_many(connection, events)
        jetstream.outbox.publish("way.row", {})
        thread = threading.Thread(target=jetstream.publish, args=("way.thread", {}))
        thread.start()
        thread.join()
    assert [one.event_type.partition(".")[2] for one in captured] == [
        *("publish", "batch", "batch", "apublish", "async_session", "task", "signature"),
        *("signal", "signal_now", "session", "core", "core", "row", "thread"),
    ]
    assert {one.event_type for one in captured if one.queued} == {
        *("way.async_session", "way.session", "way.core", "way.row")
    }
    assert announced == [one.event_type for one in captured if not one.queued]
    assert with_database.state == "disconnected"


def test_with_the_outbox_tasks_and_signals_are_captured_as_rows(engine: Engine) -> None:
    signal = Signal(name="ended")
    publish_on(signal, event_type="way.signal")
    settings = {"jetstream_database_url": str(engine.url), "jetstream_use_outbox": True}
    with configured(app, **settings), capture_events() as captured:
        publish_event.delay(event_type="way.task", payload={}, event_id="1")
        publish_event.delay(event_type="way.task", payload={}, event_id="1")
        signal.send(sender=None)
    assert [(one.event_type, one.queued) for one in captured] == [
        ("way.task", True),
        ("way.signal", True),
    ]
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM jetstream_outbox")) == 2


def test_what_a_transaction_adds_is_published_by_its_commit(
    with_database: JetStream, engine: Engine
) -> None:
    with capture_events() as captured, Session(engine) as session:
        jetstream.outbox.add(session, event_type="order.placed", payload={"id": 1})
        refute_published()
        assert [one.payload for one in captured.uncommitted] == [{"id": 1}]
        assert_published("order.placed", uncommitted=True)
        with pytest.raises(AssertionError, match="in the outbox, and not committed"):
            assert_published("order.placed")
        session.rollback()
        refute_published()
        jetstream.outbox.add(session, event_type="order.placed", payload={"id": 2})
        session.commit()
        assert_published(payload={"id": 2}, count=1)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM jetstream_outbox")) == 1


def test_an_event_that_is_refused_raises_where_it_is_published() -> None:
    with configured(app), capture_events() as captured:
        with pytest.raises(EventError, match="not JSON compliant"):
            jetstream.publish("a.b", {"x": float("nan")})
        with pytest.raises(EventError, match="payload is None"):
            publish_event.delay(event_type="a.b", payload=None)
    assert not captured


def test_a_second_event_with_one_id_is_a_duplicate() -> None:
    with configured(app), capture_events() as captured:
        results = [jetstream.publish("a.b", {}, event_id="1") for _ in range(2)]
    assert [result.duplicate for result in results] == [False, True]
    assert len(captured) == 1


def test_after_a_capture_everything_is_as_it_was() -> None:
    task = app.tasks["celery_jetstream.publish_event"]
    before, task_before = dict(vars(jetstream)), dict(vars(task))
    with configured(app):
        with capture_events() as around:
            with capture_events() as within:
                jetstream.publish("a.b", {})
            jetstream.publish("c.d", {})
        assert [len(around), len(within)] == [2, 1]
        with pytest.raises(ConfigurationError, match="nothing is captured, and there is no server"):
            assert_published()
    assert vars(jetstream) == before
    assert vars(task) == task_before


def test_what_an_event_is_compared_with() -> None:
    payload = {"id": 1, "total": Decimal("9.90"), "lines": [{"sku": "tea", "n": 2}]}
    with configured(app), capture_events():
        jetstream.publish("order.placed", payload, headers={"X-Tenant": "7"}, event_id="e-1")
        for like in (
            {"payload": {"id": 1}},
            {"payload": {"total": Decimal("9.90")}},
            {"payload": {"total": "9.90", "lines": [{"sku": str}]}},
            {"payload": lambda payload: payload["id"] < 2},
            {"resource_type": "order", "resource_id": "1", "producer": "kit"},
            {"subject": "kit.sync.billing", "headers": {"X-Tenant": "7"}},
        ):
            assert [one.event.event_id for one in assert_published("order.*", **like)] == ["e-1"]
            with pytest.raises(AssertionError, match=r"order\.\* with .+ was published"):
                refute_published("order.*", **like)
        for like in ({"payload": {"id": 2}}, {"payload": {"no": 1}}, {"resource_id": "2"}):
            refute_published("order.placed", **like)
            assert not published_events("order.placed", **like)
        with pytest.raises(TypeError, match="no field 'payloads'"):
            assert_published("order.placed", payloads={})


def test_a_failure_shows_what_was_published_and_where_it_differs() -> None:
    with configured(app), capture_events():
        with pytest.raises(AssertionError) as nothing:
            assert_published("order.placed")
        jetstream.publish("order.placed", {"id": 1, "to": {"city": "Rome"}})
        jetstream.publish("order.placed", {"to": {}})
        jetstream.publish("user.created", {"id": 1})
        with pytest.raises(AssertionError) as other:
            assert_published("order.placed", {"to": {"city": "Oslo"}})
        with pytest.raises(AssertionError, match=r"order\.placed was published 2 times, not 1\n"):
            assert_published("order.placed", count=1)
    assert str(nothing.value) == "order.placed was not published\nnothing was published"
    assert str(other.value) == (
        "order.placed with payload like {'to': {'city': 'Oslo'}} was not published\n"
        "published:\n"
        "  1. order.placed {'id': 1, 'to': {'city': 'Rome'}} to kit.sync.billing\n"
        "     payload['to']['city'] is 'Rome'\n"
        "  2. order.placed {'to': {}} to kit.sync.billing\n"
        "     payload['to'] has no 'city'\n"
        "  3. user.created {'id': 1} to kit.sync.billing"
    )


def test_an_app_without_jetstream_is_said() -> None:
    with (
        pytest.raises(ConfigurationError, match="'bare' has no JetStream"),
        capture_events(Celery("bare", set_as_current=False)),
    ):
        pass


# ── how a handler ends ────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("does_what", "delivered", "settlement"),
    [
        (lambda *_: 1, 1, Ack()),
        (raising(Ignore()), 1, Ack()),
        (raising(RuntimeError("x")), 1, Nak(1.0)),
        (raising(RuntimeError("x")), 4, Nak(60.0)),
        (raising(OSError("x")), 2, Nak(5.0)),
        (raising(OSError("x")), 5, DeadLetter("max_deliveries_exceeded", "OSError", "x")),
        (raising(ValueError("x")), 1, DeadLetter("unrecoverable_error", "ValueError", "x")),
        (raising(Reject("x", requeue=True)), 1, Nak(1.0)),
        (raising(Reject("x")), 1, DeadLetter("rejected", "Reject", "x")),
    ],
)
def test_each_end_of_a_handler_gives_its_settlement(
    does: Any, does_what: Any, delivered: int, settlement: Any
) -> None:
    does(does_what)
    with configured(app):
        run = perform(plain, "kit.plain.x", {"id": 1}, num_delivered=delivered)
    assert run.settlement == settlement
    assert (run.handler, run.ran, run.num_delivered) == ("kit.plain", True, delivered)
    assert run.returned == (1 if settlement == Ack() and run.error is None else None)
    if run.error is not None:
        with pytest.raises(type(run.error)):
            run.raise_for_error()
    assert jetstream.state == "disconnected"


def test_a_handler_gets_the_event_as_it_would_arrive(does: Any) -> None:
    does(lambda _, event: event)
    with configured(app):
        event = perform(plain, "kit.plain.x", {"total": Decimal("1.5")}, event_id="e").returned
        assert (event.payload, event.producer, event.event_id) == ({"total": "1.5"}, "billing", "e")
        assert event.delivery.stream == jetstream.config.stream_name
        assert (event.delivery.num_delivered, event.headers["nats-msg-id"]) == (1, "e")
        given = {"event_type": "kit.plain.y", "payload": [1], "resource_id": 7, "tenant": "t"}
        event = perform(plain, given, headers={"X-Tenant": "t"}).returned
        assert (event.payload, event.resource_id, event["tenant"]) == ([1], "7", "t")
        assert event.headers["x-tenant"] == "t"
        again = perform(plain, event).returned
        assert (again.envelope, again.headers["x-tenant"]) == (event.envelope, "t")
        assert perform(plain, b'{"event_type": "kit.plain.z", "payload": 0}').returned.payload == 0


def test_what_no_handler_begins_is_what_the_bridge_makes_of_it() -> None:
    with configured(app):
        runs = [
            perform(plain, b"{"),
            perform(plain, b'{"payload": 1}'),
            perform(plain, "nobody.has.it"),
            perform(typed, "kit.typed", {"id": "seven"}),
        ]
        assert perform(typed, "kit.typed", {"id": 7}).returned == Invoice(7)
        assert repr(perform(typed, "kit.typed", {"id": 7})) == (
            "<Run: delivery 1, kit.typed returned Invoice(id=7): Ack()>"
        )
    assert repr(runs[2]).startswith("<Run: delivery 1, no handler: DeadLetter(reason='no_handler'")
    assert "kit.typed raised PayloadError(" in repr(runs[3])
    reasons = [run.settlement.reason for run in runs if isinstance(run.settlement, DeadLetter)]
    assert reasons == ["malformed_json", "invalid_envelope", "no_handler", "invalid_payload"]
    assert [run.ran for run in runs] == [False] * 4


def test_what_cannot_be_performed_is_said() -> None:
    with configured(app):
        with pytest.raises(
            AssertionError, match=r"'kit.typed' go to kit.typed .* not to kit.plain"
        ):
            perform(plain, "kit.typed", {"id": 7})
        with pytest.raises(TypeError, match="is no handler"):
            perform(handle, "kit.typed", {"id": 7})
        with pytest.raises(EventError, match="has no event_type"):
            perform(plain, {"payload": 1})


def test_middleware_is_run_and_taken_back_at_the_end() -> None:
    with configured(app):
        jetstream.use(lambda event, call_next: Nak(7.0))
        assert perform(plain, "kit.plain.x").settlement == Nak(7.0)
    with configured(app):
        assert perform(plain, "kit.plain.x").settlement == Ack()


def test_with_an_inbox_a_handler_runs_once_and_its_row_counts(
    with_database: JetStream, engine: Engine, does: Any
) -> None:
    does(raising(RuntimeError("x")))
    with capture_events():
        failed = [perform(once, "kit.once", event_id="e").settlement for _ in range(2)]
        assert failed == [Nak(1.0), Nak(5.0)]
        refute_published()
        does(lambda *_: "done")
        runs = [perform(once, "kit.once", event_id="e", num_delivered=9) for _ in range(2)]
        assert [(run.settlement, run.ran, run.returned) for run in runs] == [
            (Ack(), True, "done"),
            (Ack(), False, None),
        ]
        assert_published("effect.done", {"id": "e"}, count=1)
    with engine.connect() as connection:
        assert connection.scalars(text("SELECT id FROM effects")).all() == ["e"]


# ── all the way ───────────────────────────────────────────────────────────────


def counts(jetstream: JetStream) -> tuple[int, int, int]:
    """Messages in the stream, and of the consumer: to be handed over, not settled."""
    stream, durable = jetstream.config.stream_name, f"{jetstream.config.app_name}-workers"
    ask = lambda operation: jetstream.connection.run(jetstream._api, operation, {})  # noqa: E731
    consumer = ask(f"CONSUMER.INFO.{stream}.{durable}")
    messages = ask(f"STREAM.INFO.{stream}")["state"]["messages"]
    return messages, consumer["num_pending"], consumer["num_ack_pending"]


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_an_event_comes_by_the_stream_and_the_bridge_and_is_acked(
    on_server: JetStream, does: Any, mode: str
) -> None:
    does(lambda task_id, event: (task_id, event.payload, threading.current_thread()))
    with configured(app, jetstream_consumer_mode=mode):
        if mode == "push":
            on_server.connection.run(
                on_server._api,
                f"CONSUMER.DELETE.{on_server.config.stream_name}."
                f"{on_server.config.app_name}-workers",
                {},
            )
            on_server.provision()
        delivered = deliver("kit.plain.x", {"id": 1})
        assert delivered.settlement == Ack()
        stream = on_server.config.stream_name
        expected = (f"{stream}-{delivered.sequence}", {"id": 1}, threading.current_thread())
        assert delivered.returned == expected
        assert counts(on_server) == (0, 0, 0)


def test_a_nak_is_kept_in_the_stream_for_its_delay(on_server: JetStream, does: Any) -> None:
    does(raising(RuntimeError("x")))
    delivered = deliver("kit.plain.x")
    assert delivered.settlement == Nak(1.0)
    assert isinstance(delivered.error, RuntimeError)
    assert counts(on_server) == (1, 0, 1)
    assert drain().runs == ()


def test_retries_are_not_waited_for(on_server: JetStream, does: Any) -> None:
    does(raising(OSError("x")))
    delivered = deliver("kit.plain.x", {"id": 1}, retries=True)
    assert [run.settlement for run in delivered.runs] == [
        *(Nak(1.0), Nak(5.0), Nak(60.0), Nak(60.0)),
        DeadLetter("max_deliveries_exceeded", "OSError", "x"),
    ]
    assert delivered.dead_letter is not None
    assert delivered.dead_letter["x-dlq-reason"] == "max_deliveries_exceeded"
    assert counts(on_server) == (1, 0, 0)  # the dead letter
    assert deliver("nobody.has.it").settlement.reason == "no_handler"  # type: ignore[union-attr]


def test_draining_ends_when_nothing_is_left(
    on_server_with_database: JetStream, engine: Engine, does: Any
) -> None:
    jetstream = on_server_with_database
    subject = jetstream.config.consume_subjects[0]
    with Session(engine) as session, session.begin():
        event = {"payload": {}, "subject": subject}
        for number in range(20):  # from the other app, so to speak
            kind = "kit.once" if number % 2 else "kit.plain.x"
            jetstream.outbox.add(session, event_type=kind, event_id=f"{number}", **event)
    assert drain(stream=False).published == 20
    drained = drain()
    assert (drained.published, drained.failed, len(drained.runs)) == (10, 0, 20)
    assert {run.settlement for run in drained.runs} == {Ack()}
    assert len(assert_published("effect.done")) == 10
    assert drain() == type(drained)()


def test_what_a_handler_publishes_may_be_captured(on_server: JetStream, does: Any) -> None:
    does(lambda _, event: jetstream.publish("answer.given", event.payload))
    with capture_events() as captured:
        assert deliver("kit.plain.x", {"id": 1}).settlement == Ack()
    assert [one.payload for one in captured] == [{"id": 1}]
    refute_published("answer.given")
    deliver("kit.plain.x", {"id": 2})
    assert_published("answer.given", {"id": 2}, count=1)


def test_where_it_is_stuck_is_said(on_server: JetStream, does: Any) -> None:
    does(raising(RuntimeError("x")))
    deliver("kit.plain.x", event_id="1")
    with pytest.raises(TimeoutError, match=r"0 messages to hand over and 1 that are not settled"):
        drain(retries=True, timeout=0.1)
    with pytest.raises(ConfigurationError, match="had an event with the id '1'"):
        deliver("kit.plain.x", event_id="1")
    does(lambda *_: deliver("kit.plain.y", timeout=0.05))
    within = deliver("kit.plain.x").error
    assert "another deliver() or drain() of this app goes on" in str(within)
    does(raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        deliver("kit.plain.x")
    does(lambda *_: "goes on")
    assert deliver("kit.plain.x").returned == "goes on"


def test_an_app_is_as_it_was_and_the_next_test_sees_nothing(own_server: NatsServer) -> None:
    other = Celery("billing", set_as_current=False)
    other.conf.update(
        jetstream_app_name="billing",
        jetstream_destination_app="kit",
        jetstream_auto_provision=False,  # and other things of production
        jetstream_num_replicas=3,
        jetstream_nats_options={"user": "billing", "password": "secret"},
    )
    billing, current = JetStream(other), current_app._get_current_object()
    assert app.conf.jetstream_app_name == "kit"  # loaded
    before, conf = dict(vars(jetstream)), dict(app.conf.changes)
    for _ in range(2):
        with rebound(other, own_server.url), rebound(app, own_server, jetstream_max_deliver=1):
            assert current_app._get_current_object() is app
            assert published_events(jetstream=app) == []
            assert jetstream.publish("a.b", {}).sequence == 1
            assert_published("a.b", jetstream=jetstream)
            billing.publish("kit.plain.x", {})
            assert [run.settlement for run in drain(app).runs] == [Ack()]
    assert current_app._get_current_object() is current
    assert (vars(jetstream), app.conf.changes) == (before, conf)


def test_a_stream_that_was_there_is_left(nats_server: NatsServer, names: Names) -> None:
    settings = {f"jetstream_{name}": value for name, value in dataclasses.asdict(names).items()}
    with configured(app, jetstream_nats_urls=nats_server.url, **settings) as outside:
        outside.provision()
        with rebound(app, nats_server):
            jetstream.publish("a.b", {})
        assert counts(outside)[0] == 1


def test_without_a_server_it_is_said_at_once() -> None:
    for call in (drain, lambda: deliver("kit.plain.x")):  # not on the one of the settings
        with configured(app), pytest.raises(ConfigurationError, match="not on a test's server"):
            call()
    settings = {"jetstream_connect_retry_attempts": 1}
    with pytest.raises(NotConnectedError), rebound(app, "nats://127.0.0.1:1", **settings):
        pass


# ── eager ─────────────────────────────────────────────────────────────────────


def test_eager_tasks_do_what_the_page_says(on_server: JetStream, does: Any) -> None:
    with configured(app, task_always_eager=True, task_store_eager_result=False):
        on_server.provision()
        publish_event.delay(event_type="way.task", payload={"id": 1})
        assert_published("way.task", {"id": 1})
        does(lambda _, event: event.delivery)
        envelope = {"event_type": "kit.plain.x", "payload": {}}
        assert plain.delay(envelope).get() is None
        assert plain.apply((envelope,)).get() is None
        assert deliver("kit.plain.x").returned is not None


# ── the page, and the plugin ──────────────────────────────────────────────────

FILE = re.compile(r"^```\w+\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Beside the page's own, in one run: what they may not show.
MORE = """
import pytest
from celery_jetstream.testing import published_events

@pytest.mark.parametrize("number", range(3))
def test_sees_nothing_of_the_others(jetstream, jetstream_app, number):
    assert jetstream_app.jetstream is jetstream
    assert published_events() == []
    jetstream.publish("a.b", {}).raise_for_error()
    assert len(published_events("a.b")) == 1
"""


def test_the_page_is_a_project_whose_tests_pass(tmp_path: Path) -> None:
    files = dict(FILE.findall((ROOT / "docs/how-to/test.md").read_text("utf-8")))
    for name, code in {**files, "test_more.py": MORE}.items():
        (tmp_path / name).write_text(code)
    tests = sum(code.count("def test_") for code in files.values())
    plugin = ("-p", "celery_jetstream.contrib.pytest")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, "-q", "-W", "error", "--strict-config"],
        cwd=tmp_path, capture_output=True, text=True, timeout=50,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert f"{tests + 3} passed" in ended.stdout, ended.stdout + ended.stderr
