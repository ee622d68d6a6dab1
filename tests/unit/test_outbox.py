"""The outbox's write side where no server is needed: what is refused, keys, times, tables, beat."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, StaticPool, create_engine, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from celery_jetstream import JetStream
from celery_jetstream.exceptions import (
    ConfigurationError,
    EventError,
    SubjectError,
)
from celery_jetstream.models import AT_ONCE, BUCKETS, PARKED, OutboxMixin, bucket_of
from celery_jetstream.outbox import KEY_LENGTH, Outbox
from celery_jetstream.schema import create_outbox
from tests.flushing import statements

NAMES = {"jetstream_app_name": "api", "jetstream_destination_app": "worker"}
EVENT: dict[str, Any] = {"event_type": "order.paid", "payload": {"id": 7}}
MAX_PAYLOAD = 16 * 1024
FLUSH, PRUNE = "celery_jetstream.flush_outbox", "celery_jetstream.flush_outbox.prune"

Make = Callable[..., JetStream]


@pytest.fixture
def make_jetstream() -> Iterator[Make]:
    made: list[JetStream] = []

    def make(**settings: Any) -> JetStream:
        app = Celery("test", broker="memory://", set_as_current=False)
        app.conf.update(NAMES)
        app.conf.update({f"jetstream_{name}": value for name, value in settings.items()})
        made.append(JetStream(app))
        return made[-1]

    yield make
    for jetstream in made:
        jetstream.close()


@pytest.fixture
def outbox(make_jetstream: Make) -> Outbox:
    return make_jetstream(
        database_url="sqlite://", outbox_nudge=False, max_payload=MAX_PAYLOAD
    ).outbox


@pytest.fixture
def engine(outbox: Outbox) -> Iterator[Engine]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with engine.begin() as connection:
        create_outbox(connection)
    yield engine
    engine.dispose()


@pytest.fixture
def write(outbox: Outbox, engine: Engine) -> Callable[..., Any]:
    """Writes an event and returns its row."""
    table = outbox.flusher.rows.table

    def write(**event: Any) -> Any:
        with Session(engine) as session:
            event_id = outbox.add(session, **{**EVENT, **event})
            session.commit()
            return session.execute(select(table).where(table.c.event_id == event_id)).one()

    return write


# ── what is refused ──────────────────────────────────────────────────────────

EventErrors = (EventError, SubjectError)
NOW = datetime.now(timezone.utc)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "event_type with a blank": ({"event_type": "order paid"}, "event_type"),
    "event_type of a pattern": ({"event_type": "order.*"}, "event_type"),
    "event_type that is none": ({"event_type": None}, "event_type"),
    "destination with a dot": ({"destination": "a.b"}, "a.b"),
    "subject with a wildcard": ({"subject": "a.>"}, "a.>"),
    "subject and destination": ({"subject": "a", "destination": "b"}, "not both"),
    "NaN": ({"payload": {"price": float("nan")}}, r"payload\.price"),
    "bytes": ({"payload": {"deep": [{"raw": b""}]}}, r"payload\.deep\[0\]\.raw"),
    "lone surrogate": ({"payload": "\ud800"}, "payload"),
    "payload that is none": ({"payload": None}, "payload"),
    "header with CR": ({"headers": {"x": "a\rb"}}, "control characters"),
    "header with LF": ({"headers": {"x": "a\nNats-Msg-Id: b"}}, "control characters"),
    "header of the server's": ({"headers": {"Nats-Expected-Stream": "x"}}, "Nats-"),
    "header of the server's, small": ({"headers": {"nats-msg-id": "x"}}, "nats-msg-id"),
    "event_id that is empty": ({"event_id": ""}, "event_id"),
    "event_id with LF": ({"event_id": "a\nb"}, "event_id"),
    "event_id too long": ({"event_id": "x" * 256}, "event_id"),
    "naive deliver_at": ({"deliver_at": datetime(2030, 1, 1)}, "offset"),  # noqa: DTZ001
    "deliver_at of text": ({"deliver_at": "2030-01-01T00:00:00Z"}, "give a datetime"),
    "deliver_at when all is over": ({"deliver_at": PARKED}, "before 9000"),
    "deliver_at and delay": ({"deliver_at": NOW, "delay": 1}, "not both"),
    "delay below 0": ({"delay": -1}, "delay is -1"),
    "delay of ages": ({"delay": 1e11}, "36500d"),
    "delay of text": ({"delay": "soon"}, "delay is 'soon'"),
    "on_failure": ({"on_failure": "explode"}, "on_failure is 'explode'"),
    "ordering_key too long": ({"ordering_key": "k" * (KEY_LENGTH + 1)}, "ordering_key"),
    "ordering_key that is empty": ({"ordering_key": ""}, "ordering_key"),
    "ordering_key with NUL": ({"ordering_key": "a\0b"}, "ordering_key"),
    "ordering_key with a blank end": ({"ordering_key": "a "}, "ordering_key"),
    "ordering_key of a number": ({"ordering_key": 5}, "ordering_key"),
    "too large": ({"payload": "x" * MAX_PAYLOAD}, "more than the 12288"),
    "too large with its headers": (
        {"payload": "x" * 6000, "headers": {"x": "y" * 6000}},
        "more than the 12288",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_event_writes_nothing(name: str, outbox: Outbox, engine: Engine) -> None:
    change, message = BAD[name]
    event = {**EVENT, **change}
    with Session(engine) as session, statements(engine) as executed:
        with pytest.raises(EventErrors, match=message):
            outbox.add(session, **event)
        with pytest.raises(EventErrors, match=f"event 2 of the batch: .*{message}"):
            outbox.add_many(session, [EVENT, EVENT, event, EVENT])
        assert executed == []
        assert not session.in_transaction()


@pytest.mark.parametrize("missing", ["event_type", "payload"])
def test_an_event_has_a_type_and_a_payload(missing: str, outbox: Outbox, engine: Engine) -> None:
    event = {key: value for key, value in EVENT.items() if key != missing}
    with Session(engine) as session, pytest.raises(EventError, match=f"no {missing}"):
        outbox.add(session, **event)


def test_an_unknown_argument_is_named(outbox: Outbox, engine: Engine) -> None:
    with Session(engine) as session:
        with pytest.raises(TypeError, match="delivr_at"):
            outbox.add(session, **EVENT, delivr_at=NOW)
        with pytest.raises(TypeError, match=r"event 0 of the batch: .*delivr_at"):
            outbox.add_many(session, [{**EVENT, "delivr_at": NOW}])


def test_the_largest_that_fits(write: Callable[..., Any]) -> None:
    room = MAX_PAYLOAD - 4096
    fixed = {"event_id": "i", "trace_id": "t", "produced_at": NOW, "headers": {"a": "b"}}
    size = len(write(**fixed, payload="").body) + len("NATS/1.0\r\na: b\r\nNats-Msg-Id: i\r\n\r\n")
    fixed["event_id"] = "j"
    with pytest.raises(EventError, match=f"has {room + 1} bytes"):
        write(**fixed, payload="x" * (room - size + 1))
    assert len(write(**fixed, payload="x" * (room - size)).body) > room - 50


@pytest.mark.parametrize("target", [None, "session", Session, sessionmaker(), object()])
def test_what_is_no_session(target: Any, outbox: Outbox) -> None:
    with pytest.raises(TypeError, match="neither a session nor a connection"):
        outbox.add(target, **EVENT)


def test_an_engine_is_no_session(outbox: Outbox, engine: Engine) -> None:
    with pytest.raises(TypeError, match="neither a session nor a connection"):
        outbox.add_many(engine, [EVENT])  # type: ignore[call-overload]


def test_nothing_is_nothing(outbox: Outbox, engine: Engine) -> None:
    with Session(engine) as session, statements(engine) as executed:
        assert outbox.add_many(session, []) == []
        assert outbox.add_many(session, iter([])) == []
    assert executed == []


# ── what is written ──────────────────────────────────────────────────────────


def test_a_row(write: Callable[..., Any]) -> None:
    row = write(event_id="one", headers={"x-tenant": "ä", "x-n": 5})
    assert (row.event_id, row.event_type, row.subject) == ("one", "order.paid", "api.sync.worker")
    assert (row.status, row.attempts, row.on_failure) == ("pending", 0, "park")
    assert (row.failing_since, row.finished_at, row.last_error) == (None, None, None)
    assert row.headers == '{"x-tenant": "\\u00e4", "x-n": "5"}'
    assert row.due_at == AT_ONCE
    assert abs(row.created_at - datetime.now(timezone.utc)) < timedelta(seconds=5)
    assert row.body.startswith(b'{"event_id":"one","event_type":"order.paid",')
    assert write(destination="billing").subject == "api.sync.billing"
    assert write(subject="audit.all").subject == "audit.all"
    assert write(on_failure="skip").on_failure == "skip"


def test_the_default_of_on_failure(make_jetstream: Make, engine: Engine) -> None:
    outbox = make_jetstream(
        database_url="sqlite://", outbox_nudge=False, outbox_on_failure="skip"
    ).outbox
    with engine.begin() as connection:
        outbox.add(connection, **EVENT)
        outbox.add(connection, **EVENT, on_failure="park")
        found = connection.scalars(select(outbox.flusher.rows.table.c.on_failure)).all()
    assert found == ["skip", "park"]


@pytest.mark.parametrize(
    ("event", "key"),
    [
        ({}, "order:7"),
        ({"resource_id": 8}, "order:8"),
        ({"resource_id": "a:b", "resource_type": "x"}, "x:a:b"),
        ({"payload": {"resource_id": 9}}, "order:9"),
        ({"payload": {}}, ""),
        ({"resource_id": ""}, ""),
        ({"ordering_key": None}, ""),
        ({"ordering_key": "customer 5"}, "customer 5"),
        ({"ordering_key": "k" * KEY_LENGTH}, "k" * KEY_LENGTH),
        ({"resource_id": "i" * (KEY_LENGTH - 6)}, "order:" + "i" * (KEY_LENGTH - 6)),
    ],
)
def test_ordering_keys(event: dict[str, Any], key: str, write: Callable[..., Any]) -> None:
    row = write(**event)
    assert row.ordering_key == key
    assert row.bucket == bucket_of(row.subject, key, row.event_id)
    assert 0 <= row.bucket < BUCKETS


@pytest.mark.parametrize("id", ["i" * 300, "Ö" * 300, "a\nb", "a\0b", "a ", "\u2028", "i" * 9999])
def test_a_key_that_no_database_takes_is_shortened(id: str, write: Callable[..., Any]) -> None:  # noqa: A002
    first, again, other = (write(resource_id=one).ordering_key for one in (id, id, id + "x "))
    assert first == again != other
    assert 0 < len(first) <= KEY_LENGTH
    assert first.isascii()
    assert first == first.strip()


def test_keys_are_told_apart_by_their_letters(write: Callable[..., Any]) -> None:
    buckets = {write(ordering_key=key).bucket for key in ("a", "A", "b", "B", "c", "C", "d", "D")}
    assert len(buckets) > 4
    assert write(ordering_key="a").bucket == write(ordering_key="a").bucket
    assert len({write(ordering_key=None).bucket for _ in range(20)}) > 5


@pytest.mark.parametrize("delay", [0, 0.0, "0s", timedelta(0)])
def test_no_delay_is_at_once(delay: Any, write: Callable[..., Any]) -> None:
    assert write(delay=delay).due_at == AT_ONCE


@pytest.mark.parametrize("delay", [90, "1.5m", timedelta(seconds=90)])
def test_delays(delay: Any, write: Callable[..., Any]) -> None:
    wanted = datetime.now(timezone.utc) + timedelta(seconds=90)
    assert abs(write(delay=delay).due_at - wanted) < timedelta(seconds=5)


def test_deliver_at(write: Callable[..., Any]) -> None:
    east = timezone(timedelta(hours=5))
    assert write(deliver_at=NOW.astimezone(east)).due_at == NOW
    assert AT_ONCE < write(deliver_at=datetime(1960, 1, 1, tzinfo=east)).due_at < NOW
    late = write(deliver_at=PARKED - timedelta(days=1), event_id="late")
    assert late.due_at == PARKED - timedelta(days=1)


def test_many_are_few_statements(outbox: Outbox, engine: Engine) -> None:
    with engine.begin() as connection, statements(engine) as executed:
        outbox.add_many(connection, (EVENT for _ in range(1000)))
    assert len(executed) <= 2


# ── tables, models, engines ──────────────────────────────────────────────────


class Bare(DeclarativeBase):
    pass


class Half(Bare):
    __tablename__ = "half"
    id: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[str]


class Abstract(OutboxMixin, Bare):
    __abstract__ = True


class Shop(OutboxMixin, Bare):
    __tablename__ = "shop_outbox"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (int, "is no mapped class; derive one from OutboxMixin"),
        (Abstract, "is no mapped class; derive one from OutboxMixin"),
        (Half, "'half' lacks the columns attempts, body, bucket"),
        (f"{__name__}.Half", "'half' lacks the columns"),
        (f"{__name__}.Nothing", "jetstream_outbox_model='.*Nothing' cannot be imported"),
        ("no.such.module.Model", "jetstream_outbox_model='no.such.module.Model' cannot be"),
    ],
)
def test_a_wrong_model_names_the_setting(model: Any, message: str, make_jetstream: Make) -> None:
    jetstream = make_jetstream(database_url="sqlite://", outbox_model=model)
    with pytest.raises(ConfigurationError, match=message) as caught:
        jetstream.outbox  # noqa: B018
    assert caught.value.setting == "jetstream_outbox_model"
    assert "jetstream_outbox_model" in str(caught.value)
    assert jetstream.publisher.message(**EVENT)  # what needs no outbox goes on


@pytest.mark.parametrize("model", [Shop, f"{__name__}.Shop", f"{__name__}:Shop"])
def test_a_model(model: Any, make_jetstream: Make) -> None:
    outbox = make_jetstream(database_url="sqlite://", outbox_model=model).outbox
    assert outbox.flusher.rows.table is Shop.__table__
    assert {"shop_outbox_buckets", "shop_outbox_holds"} <= Bare.metadata.tables.keys()


def test_a_table_and_a_schema(make_jetstream: Make) -> None:
    settings = {"outbox_table": "outgoing", "outbox_schema": "events"}
    tables = [
        list(make_jetstream(database_url="sqlite://", **settings).outbox.database.tables)
        for _ in range(2)
    ]
    assert [table.fullname for table in tables[0]] == [
        "events.outgoing",
        "events.outgoing_buckets",
        "events.outgoing_holds",
    ]
    assert tables[0] == tables[1]


def test_without_a_database_there_is_none(make_jetstream: Make) -> None:
    jetstream = make_jetstream(outbox_table="outgoing")
    wanted = "set jetstream_database_url or jetstream_session_factory"
    with pytest.raises(ConfigurationError, match=wanted):
        jetstream.outbox  # noqa: B018


async_engine = create_async_engine("sqlite+aiosqlite://")
FACTORIES: list[tuple[Any, str]] = [
    (async_sessionmaker(async_engine), "asynchronous driver"),
    (sessionmaker(async_engine.sync_engine), "asynchronous driver"),
    (sessionmaker(), "gives no session with one engine"),
    (lambda: None, "gives no session with one engine"),
    (f"{__name__}.nothing", "cannot be imported"),
    (f"{__name__}.NAMES", "not callable"),
]


@pytest.mark.parametrize(("factory", "message"), FACTORIES)
def test_a_wrong_session_factory(factory: Any, message: str, make_jetstream: Make) -> None:
    outbox = make_jetstream(session_factory=factory).outbox
    with pytest.raises(ConfigurationError, match=message) as caught:
        outbox.publish(**EVENT)
    assert caught.value.setting == "jetstream_session_factory"
    assert "jetstream_session_factory" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+pg8000://alice:s3cr3t@h/shop?x=s3cr3t", "pg8000.*install its driver"),
        ("mysql+nosuch://alice:s3cr3t@h/shop", "nosuch.*install its driver"),
        ("postgresql+psycopg://h:s3cr3t/shop", "is not a URL: .*%2F"),
        ("postgresql+psycopg://h:port-s3cr3t/shop", "is not a URL"),
    ],
)
def test_a_url_that_cannot_be_used(url: str, message: str, make_jetstream: Make) -> None:
    outbox = make_jetstream(database_url=url).outbox
    with pytest.raises(ConfigurationError, match=message) as caught:
        outbox.publish(**EVENT)
    assert caught.value.setting == "jetstream_database_url"
    shown = f"{caught.value!r} {caught.value.__cause__!r}"
    assert "jetstream_database_url" in shown
    assert "s3cr3t" not in shown
    assert "alice" not in shown


# ── what is imported ─────────────────────────────────────────────────────────

WITHOUT = """
import sys
{before}
from celery import Celery
from celery_jetstream import JetStream
app = Celery("test", broker="memory://")
app.conf.update(jetstream_app_name="a", jetstream_destination_app="b", {settings})
jetstream = JetStream(app)
jetstream.check()
jetstream.publisher.message(event_type="a.b", payload={{}})
{after}
"""


def run(before: str = "", settings: str = "", after: str = "") -> str:
    program = WITHOUT.format(before=before, settings=settings, after=after)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("settings", ["", "jetstream_database_url='sqlite://'"])
def test_sqlalchemy_is_for_those_who_use_the_outbox(settings: str) -> None:
    assert run("", settings, "print('sqlalchemy' in sys.modules)") == "False"


def test_without_sqlalchemy_the_outbox_says_what_to_install() -> None:
    said = run(
        "sys.modules['sqlalchemy'] = None",
        "jetstream_database_url='sqlite://'",
        "try: jetstream.outbox\nexcept Exception as error: print(repr(error))",
    )
    assert said.startswith("ConfigurationError(")
    assert "celery-jetstream[sqlalchemy]" in said


def test_greenlet_is_for_those_who_use_asyncio() -> None:
    after = (
        "from sqlalchemy import create_engine\n"
        "from celery_jetstream.schema import create_outbox\n"
        "with create_engine('sqlite://').begin() as connection:\n"
        "    create_outbox(connection)\n"
        "    print(jetstream.outbox.add(connection, event_type='a.b', payload={}, event_id='x'))\n"
    )
    before = "sys.modules['greenlet'] = None"
    settings = "jetstream_database_url='sqlite://', jetstream_outbox_nudge=False"
    assert run(before, settings, after) == "x"


# ── beat's schedule ──────────────────────────────────────────────────────────

SETTINGS = {**NAMES, "jetstream_database_url": "sqlite://"}


def make_app(**conf: Any) -> Celery:
    app = Celery("test", broker="memory://", set_as_current=False)
    app.conf.update(conf)
    return app


def scheduled(app: Celery) -> dict[str, Any]:
    """What beat has when it starts."""
    app.finalize()
    app.loader.import_default_modules()
    return dict(app.conf.beat_schedule)


def before(app: Celery) -> None:
    app.conf.update(SETTINGS)
    JetStream(app)


def after(app: Celery) -> None:
    JetStream(app)
    app.conf.update(SETTINGS)


def after_it_was_finalized(app: Celery) -> None:
    JetStream(app)
    app.finalize()
    app.conf.update(SETTINGS)


def finalized_already(app: Celery) -> None:
    app.conf.update(SETTINGS)
    app.finalize()
    JetStream(app)


def from_object(app: Celery) -> None:
    JetStream(app)
    app.config_from_object(dict(SETTINGS))


def with_a_namespace(app: Celery) -> None:
    JetStream(app)
    shouted = {f"CELERY_{name.upper()}": value for name, value in SETTINGS.items()}
    app.config_from_object(SimpleNamespace(**shouted), namespace="CELERY")


WAYS = [before, after, after_it_was_finalized, finalized_already, from_object, with_a_namespace]


@pytest.mark.parametrize("way", WAYS)
def test_beat_flushes_and_prunes(way: Callable[[Celery], None]) -> None:
    app = make_app()
    way(app)
    assert scheduled(app) == {
        FLUSH: {
            "task": "celery_jetstream.flush_outbox",
            "schedule": 5.0,
            "options": {"expiration": 5.0},
        },
        PRUNE: {
            "task": "celery_jetstream.prune_outbox",
            "schedule": 600.0,
            "options": {"expiration": 600.0},
        },
    }
    tasks = app.tasks
    assert {entry["task"] for entry in app.conf.beat_schedule.values()} <= tasks.keys()


def test_the_entries_follow_the_settings() -> None:
    settings = {
        "jetstream_outbox_beat_name": "sweep",
        "jetstream_outbox_flush_interval": "2s",
        "jetstream_outbox_queue": "outbox",
    }
    app = make_app(**SETTINGS)
    JetStream(app)
    app.finalize()
    app.conf.update(settings)  # later than the first schedule
    entries = scheduled(app)
    assert entries.keys() == {"sweep", "sweep.prune"}
    assert entries["sweep"]["schedule"] == 2.0
    assert all(entry["options"]["queue"] == "outbox" for entry in entries.values())


def test_ones_own_entries_stay() -> None:
    own = {FLUSH: {"task": "mine", "schedule": 60}, "other": {"task": "other", "schedule": 1}}
    given = dict(own)
    app = make_app(**SETTINGS, beat_schedule=given)
    JetStream(app)
    app.finalize()
    app.add_periodic_task(10, app.signature("third"), name="third")
    entries = scheduled(app)
    assert {name: entries[name] for name in own} == own == given  # nor is what was given changed
    assert entries.keys() == {FLUSH, PRUNE, "other", "third"}
    app.conf.beat_schedule = {"later": {"task": "later", "schedule": 1}}
    assert scheduled(app).keys() == {FLUSH, PRUNE, "later"}


@pytest.mark.parametrize(
    "settings",
    [
        NAMES,
        {**SETTINGS, "jetstream_outbox_beat": False},
        {**SETTINGS, "jetstream_ack_wait": -1},  # said by the one who starts it
    ],
)
def test_without_an_outbox_beat_has_nothing_to_do(settings: dict[str, Any]) -> None:
    app = make_app(**settings)
    JetStream(app)
    assert scheduled(app) == {}


def test_one_apps_schedule_is_not_anothers() -> None:
    app, other = make_app(**SETTINGS), make_app(**NAMES)
    JetStream(app)
    JetStream(other)
    assert len(scheduled(app)) == 2
    assert scheduled(other) == {}
