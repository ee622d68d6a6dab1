"""The outbox's write side with real databases and drivers, its nudge, its tasks and its beat."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import multiprocessing
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.signals import setup_logging, task_retry
from celery.utils.dispatch import Signal
from nats.aio.msg import Msg
from sqlalchemy import (
    Engine,
    MetaData,
    NullPool,
    String,
    create_engine,
    event,
    func,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)

from celery_jetstream import JetStream, publish_event, publish_on
from celery_jetstream.dispatcher import depth
from celery_jetstream.exceptions import (
    ConfigurationError,
    EventError,
    OutboxUnavailableError,
)
from celery_jetstream.flusher import FlushResult
from celery_jetstream.models import AT_ONCE, OutboxMixin
from celery_jetstream.schedule import CROWDED
from celery_jetstream.testing import NatsServer, free_port
from tests.conftest import Names
from tests.databases import Database
from tests.flushing import Flushing, statements
from tests.servers import RedisServer, wait_until
from tests.stack import CeleryProcess


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


# ── what the tests stand on ──────────────────────────────────────────────────


class Shop(Flushing):
    """An app with its outbox, and the application's own engine for the same database."""

    def __init__(self, url: str, database: Database, names: Names, **settings: Any) -> None:
        super().__init__(url, database, names, **settings)
        self.url = database.url
        self.own_engine = open_engine(database.url)
        self.Session = sessionmaker(self.own_engine)

    def prepare(self) -> Shop:
        self.outbox.create_tables()
        Base.metadata.create_all(self.own_engine)
        return self

    def drain(self, max_seconds: float | None = 20.0) -> FlushResult:
        self.jetstream.provision()
        return super().drain(max_seconds)

    def messages(self, stream: str = "") -> list[Msg]:
        self.update_stream(allow_direct=True)
        return super().messages(stream)

    def close(self) -> None:
        super().close()
        self.own_engine.dispose()

    def orders(self) -> int:
        with self.Session() as session:
            return session.scalar(select(func.count()).select_from(Order)) or 0

    def ids(self) -> list[str]:
        return [row.event_id for row in self.rows()]


def open_engine(url: str) -> Engine:
    engine = create_engine(url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":
        let_begin(engine)
    return engine


def let_begin(engine: Engine) -> None:
    """Has SQLite begin when it is told to, or savepoints would not nest."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))


@pytest.fixture
def make_shop(
    nats_server: NatsServer, names: Names, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Shop]]:
    made: list[Shop] = []

    def make(database: Database, **settings: Any) -> Shop:
        made.append(Shop(nats_server.url, database, names, **settings))
        return made[-1].prepare()

    yield make
    for shop in made:
        shop.close()


@pytest.fixture
def shop(database: Database, make_shop: Callable[..., Shop]) -> Shop:
    return make_shop(database)


@pytest.fixture
def small_shop(sqlite: Database, make_shop: Callable[..., Shop]) -> Shop:
    """Where the kind of database makes no difference."""
    return make_shop(sqlite)


EVENT: dict[str, Any] = {"event_type": "order.paid", "payload": {"id": 7}}


# ── the caller's transaction ─────────────────────────────────────────────────

TARGETS = ("session", "scoped_session", "connection")


@contextlib.contextmanager
def opened(shop: Shop, kind: str) -> Iterator[Any]:
    if kind == "connection":
        with shop.own_engine.connect() as connection:
            yield connection
    elif kind == "session":
        with shop.Session() as session:
            yield session
    else:
        scoped = scoped_session(shop.Session)
        yield scoped
        scoped.remove()


@pytest.mark.parametrize("kind", TARGETS)
def test_a_row_is_there_when_the_caller_commits_and_only_then(shop: Shop, kind: str) -> None:
    with opened(shop, kind) as target:
        first = shop.outbox.add(target, **EVENT)
        more = shop.outbox.add_many(target, [EVENT, EVENT])
        assert shop.ids() == []
        target.commit()
        assert shop.ids() == [first, *more]

        shop.outbox.add(target, **EVENT)
        shop.outbox.add_many(target, [EVENT, EVENT])
        target.rollback()
    assert shop.ids() == [first, *more]


@pytest.mark.parametrize("kind", TARGETS)
def test_a_savepoint_takes_its_rows_back(shop: Shop, kind: str) -> None:
    with opened(shop, kind) as target:
        before = shop.outbox.add(target, **EVENT)
        savepoint = target.begin_nested()
        shop.outbox.add(target, **EVENT)
        savepoint.rollback()
        with target.begin_nested():
            kept = shop.outbox.add(target, **EVENT)
        target.commit()
    assert shop.ids() == [before, kept]


def test_it_does_not_flush_what_the_session_has(shop: Shop) -> None:
    with shop.Session() as session, statements(shop.own_engine) as executed:
        order = Order(id=1)
        session.add(order)
        shop.outbox.add(session, **EVENT)
        shop.outbox.add_many(session, [EVENT, EVENT])
        assert list(session.new) == [order]
        assert len([one for one in executed if one.startswith("INSERT")]) == 2
        session.rollback()
    assert shop.orders() == 0


def test_an_event_id_is_written_once(shop: Shop) -> None:
    with shop.Session() as session:
        assert shop.outbox.add(session, event_id="one", **EVENT) == "one"
        session.commit()
        shop.outbox.add(session, event_id="two", **EVENT)
        with pytest.raises(IntegrityError), session.begin_nested():
            shop.outbox.add(session, event_id="one", **EVENT)
        with pytest.raises(IntegrityError), session.begin_nested():
            shop.outbox.add_many(session, [{**EVENT, "event_id": one} for one in ("a", "one")])
        session.commit()
    assert shop.ids() == ["one", "two"]


def test_a_bad_event_fails_the_business(shop: Shop) -> None:
    bad = {"event_type": "order.paid", "payload": {"price": float("nan")}}

    def business(work: Callable[[Session], object]) -> None:
        with shop.Session.begin() as session:
            session.add(Order(id=1))
            session.flush()
            work(session)

    with pytest.raises(EventError, match=r"payload\.price"):
        business(lambda session: shop.outbox.add(session, **bad))
    with pytest.raises(EventError, match=r"event 1 of the batch: .*payload\.price"):
        business(lambda session: shop.outbox.add_many(session, [EVENT, bad]))
    assert (shop.orders(), shop.ids()) == (0, [])


def test_a_session_of_two_databases_finds_the_outboxs(small_shop: Shop, tmp_path: Path) -> None:
    other = create_engine(f"sqlite:///{tmp_path / 'other'}", poolclass=NullPool)
    Base.metadata.create_all(other)
    binds = {Order: other, small_shop.table: small_shop.own_engine}
    with Session(binds=binds) as session:
        session.add(Order(id=1))
        ids = small_shop.outbox.add_many(session, [EVENT, EVENT])
        session.commit()
    assert small_shop.ids() == ids


# ── asyncio ──────────────────────────────────────────────────────────────────


@pytest.fixture(params=["postgresql", "sqlite"])
def async_shop(request: pytest.FixtureRequest, make_shop: Callable[..., Shop]) -> Shop:
    shop = make_shop(database := request.getfixturevalue(request.param))
    shop.async_url = database.async_url  # type: ignore[attr-defined]
    return shop


@contextlib.asynccontextmanager
async def async_engine(shop: Any) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(shop.async_url, poolclass=NullPool)
    if shop.kind == "sqlite":
        let_begin(engine.sync_engine)
    yield engine
    await engine.dispose()


@contextlib.asynccontextmanager
async def async_opened(engine: AsyncEngine, kind: str) -> AsyncIterator[Any]:
    if kind == "connection":
        async with engine.connect() as connection:
            yield connection
    elif kind == "session":
        async with AsyncSession(engine) as session:
            yield session
    else:
        scoped = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        yield scoped
        await scoped.remove()


@pytest.mark.parametrize("kind", TARGETS)
def test_asynchronous_targets(async_shop: Shop, kind: str) -> None:
    add, add_many = async_shop.outbox.add, async_shop.outbox.add_many

    async def business() -> list[str]:
        async with async_engine(async_shop) as engine, async_opened(engine, kind) as target:
            first = await add(target, **EVENT)
            more = await add_many(target, [EVENT, {**EVENT, "delay": 60}, EVENT])
            assert await add_many(target, []) == []
            async with contextlib.AsyncExitStack() as stack:
                stack.enter_context(contextlib.suppress(KeyError))
                await stack.enter_async_context(target.begin_nested())
                await add(target, **EVENT)
                raise KeyError
            await target.commit()
            await add(target, **EVENT)
            await target.rollback()
            with pytest.raises(EventError):
                add(target, **EVENT, ordering_key="")
            with pytest.raises(IntegrityError):
                await add_many(target, [{**EVENT, "event_id": first}, {**EVENT, "delay": 1}])
            return [first, *more]

    assert asyncio.run(business()) == async_shop.ids()


# ── what is kept ─────────────────────────────────────────────────────────────


def test_every_byte_arrives(shop: Shop) -> None:
    payloads: list[Any] = [
        {"z": 1, "a": {"y": 2, "b": 3}, "m": [1.5, None, True, "", {}]},
        {"nul": "a\u0000b", "quotes": "'\"`\\%s %(x)s :y ?", "line": "\u2028\r\n"},
        {"emoji": "👩‍👩‍👧‍👦🇺🇦", "name": "Ŧïñá ユニコード \ud7ff\U0010ffff"},
        {"big": "".join(random.choices("'\\\0\u00e9🙂 abc", k=200_000))},
        "text",
        [],
    ]
    headers = {"x-quote": "'\\\"%s :y", "x-": "a: b"}
    events = [{"event_type": "a.b", "payload": one, "headers": headers} for one in payloads]
    assert len(json.dumps(payloads[3], ensure_ascii=False).encode()) > 300_000
    with shop.Session.begin() as session:
        ids = [shop.outbox.add(session, **one, ordering_key="k") for one in events]
        ids += shop.outbox.add_many(session, [{**one, "ordering_key": "k"} for one in events])
    bodies = [bytes(row.body) for row in shop.rows()]
    assert shop.drain().sent == len(ids)
    messages = shop.messages()
    assert [message.data for message in messages] == bodies
    for message, payload, event_id in zip(messages, [*payloads, *payloads], ids, strict=True):
        envelope = json.loads(message.data)
        assert envelope["payload"] == payload
        assert json.dumps(envelope["payload"]) == json.dumps(payload)  # the order of the keys
        assert headers.items() <= (message.headers or {}).items()
        assert (message.headers or {})["Nats-Msg-Id"] == event_id


def test_a_header_of_any_language_arrives(shop: Shop) -> None:
    with shop.Session.begin() as session:
        shop.outbox.add(session, **EVENT, headers={"x-name": "Zoë 🙂"})
    assert shop.drain().sent == 1
    found = shop.api(f"STREAM.MSG.GET.{shop.stream}", seq=1)  # nats-py 2.10 cannot read it
    assert "x-name: Zoë 🙂\r\n".encode() in base64.b64decode(found["message"]["hdrs"])


def test_five_thousand_in_few_statements(shop: Shop) -> None:
    events = [{**EVENT, "payload": {"n": n}, "resource_id": n % 50} for n in range(5000)]
    with shop.own_engine.begin() as connection, statements(shop.own_engine) as executed:
        ids = shop.outbox.add_many(connection, events)
    assert len(executed) <= 6, len(executed)
    rows = shop.rows()
    assert [row.event_id for row in rows] == ids
    assert [json.loads(row.body)["payload"]["n"] for row in rows] == list(range(5000))


def test_a_batch_of_large_events_is_written(shop: Shop) -> None:
    """More than MariaDB takes in one statement."""
    big = "'" * 900_000  # which a driver may escape
    with shop.own_engine.begin() as connection:
        ids = shop.outbox.add_many(connection, [{**EVENT, "payload": big}] * 20)
    assert shop.ids() == ids


def test_mixed_times_keep_their_order(shop: Shop) -> None:
    now = datetime.now(timezone.utc)
    times: list[dict[str, Any]] = [
        {}, {}, {"delay": 3600}, {"delay": "1h"}, {"delay": timedelta(hours=1)}, {},
        {"deliver_at": now + timedelta(hours=1)}, {"delay": 0}, {"deliver_at": now},
    ]  # fmt: skip
    with shop.own_engine.begin() as connection:
        ids = shop.outbox.add_many(connection, [{**EVENT, **one} for one in times])
    rows = shop.rows()
    assert [row.event_id for row in rows] == ids
    dues = [row.due_at for row in rows]
    assert [due == AT_ONCE for due in dues] == [one in ({}, {"delay": 0}) for one in times]
    assert dues[8] == now
    assert all(abs(due - now - timedelta(hours=1)) < timedelta(seconds=30) for due in dues[2:5])


def test_a_key_is_its_letters(shop: Shop) -> None:
    keys = ["a", "A", "ä", "ａ", "ß", "ss", "i", "İ", "a b", "a  b"]
    with shop.own_engine.begin() as connection:
        shop.outbox.add_many(connection, [{**EVENT, "ordering_key": key} for key in keys])
        for key in keys:
            same = select(func.count()).where(shop.table.c.ordering_key == key)
            assert connection.scalar(same) == 1, key
        for event_id in ("id", "ID", "Id"):
            shop.outbox.add(connection, **EVENT, event_id=event_id)


def test_it_waits_until_its_time_by_the_databases_clock(shop: Shop) -> None:
    with shop.own_engine.begin() as connection:
        started = time.monotonic()
        late = shop.outbox.add(connection, **EVENT, delay=0.6)
        now = shop.outbox.add(connection, **EVENT)
        never = shop.outbox.add(connection, **EVENT, delay="1h")
    shop.drain()
    first = shop.stored()
    assert first == [now] or time.monotonic() - started > 0.5
    wait_until(lambda: (shop.drain(), len(shop.stored()) > 1)[1], 10, "the delay to pass")
    assert time.monotonic() - started >= 0.59
    assert shop.stored() == [now, late]
    assert shop.drain().sent == 0
    assert shop.row(never).status == "pending"


# ── publish, and the task ────────────────────────────────────────────────────


def test_publish_queues(shop: Shop) -> None:
    first = shop.outbox.publish("order.paid", {"id": 1}, event_id="one")
    again = shop.outbox.publish("order.paid", {"id": 1}, event_id="one")
    assert (first.success, first.queued, first.duplicate, first.event_id) == (
        True, True, False, "one",
    )  # fmt: skip
    assert first.subject == shop.subject
    assert (again.success, again.queued, again.duplicate) == (True, True, True)
    assert shop.ids() == ["one"]
    assert first.as_dict()["queued"] is True
    with pytest.raises(EventError):
        shop.outbox.publish("order.paid", float("nan"))


def test_publish_always_sends_now(sqlite: Database, make_shop: Callable[..., Shop]) -> None:
    shop = make_shop(sqlite, jetstream_use_outbox=True)
    result = shop.jetstream.publish("order.paid", {}, event_id="now")
    assert result.success
    assert not result.queued
    assert shop.stored() == ["now"]
    assert shop.ids() == []


def test_the_task_writes_a_row(database: Database, make_shop: Callable[..., Shop]) -> None:
    shop = make_shop(database, jetstream_use_outbox=True)
    task = shop.app.tasks[publish_event.name]
    for _ in range(2):  # the broker delivers it twice
        result = task.apply(kwargs={**EVENT, "timeout": 3}, task_id="the-task").get()
        assert result["queued"]
    assert shop.ids() == ["the-task"]
    with pytest.raises(TypeError, match="no_such"):
        task.apply(kwargs={**EVENT, "no_such": 3}, throw=True)


def test_a_signal_becomes_a_row(sqlite: Database, make_shop: Callable[..., Shop]) -> None:
    from celery import _state

    shop, signal = make_shop(sqlite, jetstream_use_outbox=True), Signal(name="paid")
    publish_on(signal, event_type="order.paid", delay="1h")
    before = _state._tls.current_app
    shop.app.set_current()
    try:
        signal.send(sender="here", total=3)
    finally:
        _state._tls.current_app = before
    (row,) = shop.rows()
    assert json.loads(row.body)["payload"] == {"total": 3}


def test_the_task_waits_for_the_database(
    sqlite: Database, make_shop: Callable[..., Shop], tmp_path: Path
) -> None:
    """In a real worker: retried while it is away, and nothing is lost."""
    home = tmp_path / "mounted"
    home.mkdir()
    there = Database("sqlite", f"sqlite:///{home}/database.sqlite")
    shop = make_shop(there, jetstream_use_outbox=True)
    shop.app.conf.broker_transport_options = {"polling_interval": 0.01}
    shop.jetstream.outbox.database.engines.close()
    home.rename(tmp_path / "away")
    task = shop.app.tasks[publish_event.name]
    retried = threading.Event()

    def note(**_: Any) -> None:
        retried.set()

    def leave_it(**_: Any) -> None:
        """Or the worker would set up the logging of the test run."""

    task_retry.connect(note, sender=task)
    setup_logging.connect(leave_it)
    with start_worker(shop.app, pool="solo", perform_ping_check=False, shutdown_timeout=20):
        result = task.apply_async(kwargs=EVENT)
        wait_until(retried.is_set, 20, "a retry")
        (tmp_path / "away").rename(home)
        wait_until(lambda: shop.ids() == [result.id], 20, "the row")
    task_retry.disconnect(note, sender=task)
    setup_logging.disconnect(leave_it)


def away(kind: str, tmp_path: Path) -> str:
    """The URL of a database that is not there, with credentials in every place there is."""
    if kind == "postgresql":
        port = free_port()
        return f"postgresql+psycopg://user:secret1@127.0.0.1:{port}/shop?password=secret2"
    if kind == "mariadb":
        return f"mysql+pymysql://user:secret1@127.0.0.1:{free_port()}/shop?sql_mode=secret2"
    return f"sqlite:///{tmp_path}/not/there"


@pytest.mark.parametrize("kind", ["postgresql", "mariadb", "sqlite"])
def test_an_outage_of_the_database_has_a_name(
    kind: str, tmp_path: Path, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Flushing("nats://127.0.0.1:1", Database(kind, away(kind, tmp_path)), names)
    try:
        with pytest.raises(OutboxUnavailableError) as caught:
            shop.outbox.publish("order.paid", {})
        with pytest.raises(OutboxUnavailableError):
            shop.outbox.drain()
        flushed = shop.app.tasks["celery_jetstream.flush_outbox"].apply().get()
        pruned = shop.app.tasks["celery_jetstream.prune_outbox"].apply().get()
        said = f"{caught.value!r} {flushed} {pruned} {shop.jetstream.config!r} {caplog.text}"
        assert "is away" in flushed["outage"]
        assert "is away" in pruned["outage"]
        assert "secret" not in said, said
    finally:
        shop.close()


def test_the_tasks_say_what_they_did(shop: Shop) -> None:
    flush = shop.app.tasks["celery_jetstream.flush_outbox"]
    prune = shop.app.tasks["celery_jetstream.prune_outbox"]
    shop.jetstream.provision()
    assert flush.apply().get()["sent"] == 0
    with shop.own_engine.begin() as connection:
        shop.outbox.add_many(connection, [EVENT] * 3)
    done = flush.apply().get()
    assert (done["sent"], done["outage"], done["more"]) == (3, None, False)
    json.dumps(done)
    assert prune.apply().get() == {"deleted": 0}
    shop.change(*shop.ids(), finished_at=datetime(2020, 1, 1, tzinfo=timezone.utc))
    assert prune.apply().get() == {"deleted": 3}


# ── tables of the user's ─────────────────────────────────────────────────────


def test_a_model_of_ones_own(database: Database, make_shop: Callable[..., Shop]) -> None:
    class Own(DeclarativeBase):
        metadata = MetaData()

    class Outgoing(OutboxMixin, Own):
        __tablename__ = "outgoing"
        tenant: Mapped[str] = mapped_column(String(20), server_default="main")
        number: Mapped[int] = mapped_column(default=lambda: 5)

    shop = make_shop(database, jetstream_outbox_model=Outgoing)
    with shop.Session.begin() as session:
        shop.outbox.add(session, **EVENT)
        shop.outbox.add_many(session, [EVENT, EVENT])
    assert shop.drain().sent == 3
    assert [(row.status, row.tenant, row.number) for row in shop.rows()] == [
        ("sent", "main", 5)
    ] * 3
    with shop.Session() as session:
        assert session.scalars(select(Outgoing.tenant)).all() == ["main"] * 3
    assert len(shop.sql("SELECT * FROM outgoing_buckets")) == 64


def test_a_table_of_another_name_and_schema(
    postgresql: Database, make_shop: Callable[..., Shop]
) -> None:
    schema = f"events_{random.getrandbits(64):x}"
    url = make_url(postgresql.url)
    administrator = create_engine(url.set(username="postgres"), poolclass=NullPool)
    with administrator.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema} AUTHORIZATION {url.username}"))
    shop = make_shop(postgresql, jetstream_outbox_table="outgoing", jetstream_outbox_schema=schema)
    with shop.Session.begin() as session:
        shop.outbox.add(session, **EVENT)
    assert shop.drain().sent == 1
    assert shop.sql(f"SELECT status FROM {schema}.outgoing") == [("sent",)]


def test_tables_that_are_not_there(
    database: Database, nats_server: NatsServer, names: Names
) -> None:
    shop = Shop(nats_server.url, database, names)
    calls: list[Callable[[], object]] = [
        lambda: shop.outbox.publish("order.paid", {}),
        lambda: shop.outbox.drain(),
        lambda: shop.outbox.add(shop.own_engine.connect(), **EVENT),
        lambda: shop.app.tasks["celery_jetstream.flush_outbox"].apply(throw=True),
    ]
    try:
        for call in calls:
            with pytest.raises(ConfigurationError, match="jetstream outbox init"):
                call()
    finally:
        shop.close()


Kept = scoped_session(sessionmaker())


def test_a_session_factory_gives_the_engine(
    small_shop: Shop, make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a scoped session has in hand stays in hand."""
    settings = small_shop.app.conf
    Kept.configure(bind=small_shop.own_engine)
    for factory in (small_shop.Session, Kept, f"{__name__}.Kept", f"{__name__}:Kept"):
        app = Celery("other", broker="memory://", set_as_current=False)
        app.conf.update({key: settings[key] for key in settings if key.startswith("jetstream_")})
        app.conf.update(jetstream_database_url=None, jetstream_session_factory=factory)
        jetstream = JetStream(app)
        try:
            order = Order(id=len(small_shop.rows()) + 1)
            Kept.add(order)
            Kept.flush()
            assert jetstream.outbox.database.engine is small_shop.own_engine
            assert order in Kept
            Kept.commit()
            jetstream.outbox.publish("order.paid", {})
        finally:
            jetstream.close()
            Kept.remove()
    assert small_shop.orders() == len(small_shop.ids()) == 4
    assert small_shop.drain().sent == 4


# ── after the commit ─────────────────────────────────────────────────────────


def stored_count(shop: Shop) -> int:
    return int(shop.api(f"STREAM.INFO.{shop.stream}")["state"]["messages"])


def nudged(nats_url: str, database: Database, names: Names, **settings: Any) -> Shop:
    shop = Shop(nats_url, database, names)
    shop.app.conf.update(jetstream_outbox_nudge=True, **settings)
    return shop.prepare()


def test_a_connected_process_sends_what_it_commits(
    database: Database, nats_server: NatsServer, names: Names
) -> None:
    shop = nudged(nats_server.url, database, names)
    try:
        shop.jetstream.connect()
        writes: list[Callable[[], object]] = [
            lambda: add_in(shop.Session.begin),
            lambda: add_in(shop.own_engine.begin),
            lambda: shop.outbox.publish("order.paid", {}),
        ]

        def add_in(begin: Any) -> None:
            with begin() as target:
                shop.outbox.add(target, **EVENT)

        for count, write in enumerate(writes * 2, 1):
            write()
            committed = time.monotonic()
            wait_until(lambda n=count: stored_count(shop) == n, 10, "the event")
            assert time.monotonic() - committed < 1
        with shop.Session() as session:
            shop.outbox.add(session, **EVENT)
            session.rollback()
        assert stored_count(shop) == 6
    finally:
        shop.close()


def test_a_process_without_a_connection_sends_the_task(sqlite: Database, names: Names) -> None:
    shop = nudged(
        "nats://127.0.0.1:1", sqlite, names,
        jetstream_outbox_queue="outbox", broker_transport_options={"polling_interval": 0.01},
    )  # fmt: skip
    try:
        with shop.Session.begin() as session:
            shop.outbox.add(session, **EVENT)
        with shop.app.connection_for_read() as broker, broker.SimpleQueue("outbox") as queue:
            message = queue.get(timeout=10)
            message.ack()
        assert message.headers["task"] == "celery_jetstream.flush_outbox"
        assert message.headers["expires"] is None
        assert shop.jetstream.state == "disconnected"
    finally:
        shop.close()


def test_a_process_sends_no_flushes_to_a_queue_that_nobody_takes_from(
    sqlite: Database, names: Names, redis_server: RedisServer
) -> None:
    queue = f"outbox-{names.app_name}"
    shop = nudged(
        "nats://127.0.0.1:1", sqlite, names,
        jetstream_outbox_queue=queue, broker_url=redis_server.url, broker_transport_options={},
    )  # fmt: skip
    try:
        for _ in range(CROWDED):
            shop.app.send_task("celery_jetstream.flush_outbox", queue=queue)
        send_flush = partial(shop.jetstream._schedule.send_flush, shop.jetstream.config)
        for _ in range(5):
            send_flush()
        assert depth(shop.app, queue) == CROWDED
        with shop.app.connection_for_write() as broker:
            broker.channel().queue_purge(queue)
        wait_until(lambda: send_flush() or depth(shop.app, queue) > 0, 10, "a flush")
    finally:
        shop.close()


def test_a_dead_broker_holds_nobody_up(
    sqlite: Database, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    shop = nudged(
        "nats://127.0.0.1:1", sqlite, names,
        broker_url=f"redis://127.0.0.1:{free_port()}/0",
        broker_transport_options={"max_retries": 2, "interval_step": 0.5, "interval_max": 0.5},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "celery_jetstream"):
        started = time.monotonic()
        for _ in range(3):
            with shop.Session.begin() as session:
                shop.outbox.add(session, **EVENT)
        assert time.monotonic() - started < 1
        wait_until(lambda: "flush after a commit failed" in caplog.text, 10, "the warning")
    started = time.monotonic()
    shop.close()
    assert time.monotonic() - started < 3
    assert len(caplog.records) == 1


# ── beat ─────────────────────────────────────────────────────────────────────

APP = """
import json, os
from celery import Celery
from celery_jetstream import JetStream
app = Celery("shop")
jetstream = JetStream(app)
app.conf.update(json.loads(os.environ["SHOP"]))
"""


def test_beat_and_a_worker_flush(
    small_shop: Shop, redis_server: RedisServer, tmp_path: Path, names: Names
) -> None:
    """For real: two processes, Redis between them."""
    settings = {
        key: value for key, value in small_shop.app.conf.items() if key.startswith("jetstream_")
    }
    settings |= {
        "broker_url": redis_server.url,
        "task_default_queue": names.app_name,
        "jetstream_outbox_flush_interval": 0.3,
        "broker_connection_retry_on_startup": True,
    }
    (tmp_path / "shop_app.py").write_text(APP)
    environment = {"SHOP": json.dumps(settings, default=str), "PYTHONPATH": str(tmp_path)}
    celery = [sys.executable, "-m", "celery", "-A", "shop_app"]
    schedule = ["-s", str(tmp_path / "schedule"), "--pidfile", ""]
    worker = [*celery, "worker", "-P", "solo", "--without-gossip", "--without-mingle", "-l", "INFO"]
    processes = [
        CeleryProcess(
            tmp_path / "beat.log", [*celery, "beat", *schedule, "-l", "INFO"], environment
        ),
        CeleryProcess(tmp_path / "worker.log", worker, environment),
    ]
    try:
        with small_shop.Session.begin() as session:
            ids = [small_shop.outbox.add(session, **EVENT) for _ in range(3)]
        wait_until(lambda: small_shop.count("sent") == 3, 30, "beat and the worker to flush")
        assert small_shop.stored() == ids
    except TimeoutError as error:
        raise AssertionError("\n".join([str(error), *(one.text() for one in processes)])) from None
    finally:
        for process in processes:
            process.kill()


# ── forks ────────────────────────────────────────────────────────────────────


def in_child(work: Callable[[], object], told: Any) -> None:
    try:
        told.send(work())
    except BaseException as error:
        told.send(repr(error))


def test_a_forked_child_has_connections_of_its_own(shop: Shop) -> None:
    with shop.own_engine.begin() as connection:
        shop.outbox.add(connection, event_id="parent", **EVENT)
    assert shop.drain().sent == 1
    engine = shop.engine
    held = engine.connect()  # in use while the child works
    assert held.scalar(select(func.count()).select_from(shop.table)) == 1
    held.rollback()

    def work() -> Any:
        assert shop.outbox.database.engine is not engine
        shop.outbox.publish("order.paid", {}, event_id="child")
        sent = shop.drain().sent
        shop.close()
        return sent

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=in_child, args=(work, theirs))
    child.start()
    assert ours.poll(20)
    assert ours.recv() == 1
    child.join(10)
    assert child.exitcode == 0
    for end in (ours, theirs):
        end.close()
    assert held.scalar(select(func.count()).select_from(shop.table)) == 2
    held.close()
    assert shop.outbox.database.engine is engine
    shop.outbox.publish("order.paid", {}, event_id="again")
    assert shop.drain().sent == 1
    assert shop.stored() == ["parent", "child", "again"]
