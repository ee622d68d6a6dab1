"""The inbox on real databases: who may run, what is kept of it, and what it costs."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Session, scoped_session, sessionmaker

from celery_jetstream import Ack, DeadLetter, JetStream, Nak
from celery_jetstream.config import Config
from celery_jetstream.database import Engines
from celery_jetstream.delivery import Delivery
from celery_jetstream.exceptions import ConfigurationError, InboxError, InboxUnavailableError
from celery_jetstream.inbox import Inbox
from celery_jetstream.inbox_admin import InboxFilter
from celery_jetstream.inbox_rows import Answer, Entry, Verdict
from celery_jetstream.models import InboxMixin, inbox_model
from celery_jetstream.schema import create_inbox, drop_inbox
from celery_jetstream.testing import free_port, wait_until
from tests.databases import Database
from tests.flushing import statements

metadata = MetaData()
effects = Table(
    "effects",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("event_id", String(255)),
    Column("unique_id", Integer, unique=True),
    mysql_engine="InnoDB",
)
BUSY = Nak(30.0)


class Shop:
    """An inbox, and effects beside it."""

    def __init__(self, database: Database, **settings: Any) -> None:
        self.database = database
        names = {"app_name": "shop", "destination_app": "hub"}
        config = Config(**names, **{"database_url": database.url, **settings})
        self.inbox = Inbox(config, Engines(config))
        self.engine = create_engine(database.url)
        self.serial = 0

    def open(self) -> Shop:
        self.inbox.create_tables()
        metadata.create_all(self.engine)
        return self

    def entry(
        self, event_id: str = "e", handler: str = "h", sequence: int = 1, number: int = 1
    ) -> Entry:
        """A hand-over that there was not yet."""
        self.serial += 1
        reply = f"$JS.ACK.stream.workers.{number}.{sequence}.{self.serial}.1.0"
        return Entry(event_id, handler, "order.placed", Delivery.from_reply(reply))

    def run(self, entry: Entry, result: Any = "done") -> Any:
        """A handler with one effect; ``result`` may be an error, which it raises."""

        def handle(session: Session) -> Any:
            session.execute(insert(effects).values(event_id=entry.event_id))
            if isinstance(result, BaseException):
                raise result
            return result

        return self.inbox.run_within(entry, handle, lambda _: None)

    def effects(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.scalars(select(effects.c.event_id)))

    def states(self) -> dict[str, str]:
        return {row.event_id: row.status for row in self.inbox.find(limit=1000)}

    def close(self) -> None:
        self.inbox.close()
        self.inbox.database.engines.close()
        self.engine.dispose()


@pytest.fixture
def make_shop() -> Iterator[Callable[..., Shop]]:
    made: list[Shop] = []

    def make(database: Database, **settings: Any) -> Shop:
        made.append(Shop(database, **settings))
        return made[-1]

    yield make
    for shop in made:
        shop.close()


@pytest.fixture
def shop(make_shop: Callable[..., Shop], database: Database) -> Shop:
    return make_shop(database).open()


class Running:
    """A run that is in the middle of its handler until it is told to go on."""

    def __init__(self, shop: Shop, entry: Entry, *, within: bool = True) -> None:
        self._go_on, self._begun = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1)
        inbox = shop.inbox

        def handle(*_: Any) -> str:
            self._begun.set()
            assert self._go_on.wait(30)
            return "done"

        run: Any = inbox.run_within if within else inbox.run_around
        self._result = self._pool.submit(run, entry, handle, lambda _: None)

    def __enter__(self) -> Running:
        assert self._begun.wait(10)
        return self

    def end(self) -> Any:
        self._go_on.set()
        return self._result.result(10)

    def __exit__(self, *_: object) -> None:
        self._go_on.set()
        self._pool.shutdown()


# ── in one transaction ───────────────────────────────────────────────────────


def test_the_first_runs_and_all_others_are_acked(shop: Shop) -> None:
    assert shop.run(shop.entry()) == "done"
    assert shop.run(shop.entry(sequence=2)) == Ack()
    assert shop.run(shop.entry(number=2)) == Ack()
    assert shop.effects() == ["e"]
    (row,) = shop.inbox.get("e")
    assert (row.status, row.attempts, row.deliveries) == ("processed", 0, 1)


def test_each_handler_has_its_own_row(shop: Shop) -> None:
    assert shop.run(shop.entry(handler="one")) == shop.run(shop.entry(handler="other")) == "done"
    assert [row.handler for row in shop.inbox.get("e")].count("one") == 1
    assert len(shop.inbox.get("e")) == 2


def test_keys_are_their_bytes(shop: Shop) -> None:
    ids = ["a", "A", "ä", "😀", "x" * 255]
    assert [shop.run(shop.entry(event_id)) for event_id in ids] == ["done"] * 5


def test_what_failed_leaves_nothing_but_its_failure(shop: Shop) -> None:
    entry = shop.entry()
    with pytest.raises(RuntimeError, match="no"):
        shop.run(entry, RuntimeError("no"))
    assert shop.effects() == []
    assert shop.inbox.get("e") == []
    assert shop.inbox.fail(entry, "RuntimeError('no')") == Answer(Verdict.OURS, 1)
    (row,) = shop.inbox.get("e")
    assert (row.status, row.attempts, row.last_error) == ("failed", 1, "RuntimeError('no')")
    assert shop.run(shop.entry(number=2)) == "done"
    (row,) = shop.inbox.get("e")
    assert (row.status, row.attempts, row.deliveries) == ("processed", 1, 2)


def test_a_settlement_that_is_no_ack_rolls_back(shop: Shop) -> None:
    for settlement in (Nak(5), DeadLetter("odd")):
        assert shop.run(shop.entry(), settlement) == settlement
    assert shop.effects() == []
    assert shop.states() == {}
    assert shop.run(shop.entry(), Ack()) == Ack()
    assert shop.effects() == ["e"]


def test_the_handler_is_told_of_failures_before_it_runs(shop: Shop) -> None:
    told: list[int] = []
    for number in (1, 2, 3):
        entry = shop.entry(number=number)
        with pytest.raises(RuntimeError):
            shop.inbox.run_within(entry, _raise, told.append)
        shop.inbox.fail(entry, "again")
    assert told == [0, 1, 2]


def _raise(*_: Any) -> None:
    raise RuntimeError("always")


def test_what_is_done_cannot_fail_any_more(shop: Shop) -> None:
    shop.run(shop.entry())
    assert shop.inbox.fail(shop.entry(number=2), "late").verdict is Verdict.PROCESSED
    assert shop.states() == {"e": "processed"}


def test_attempts_are_those_of_the_newest_message(shop: Shop) -> None:
    """A redrive begins anew; two messages of one event that both fail come to an end together."""
    fail = shop.inbox.fail
    assert fail(shop.entry(sequence=1), "x").attempts == 1
    assert fail(shop.entry(sequence=1), "x").attempts == 2
    assert fail(shop.entry(sequence=7), "x").attempts == 1
    assert fail(shop.entry(sequence=1), "x").attempts == 2
    assert fail(shop.entry(sequence=7), "x").attempts == 3


def test_an_error_is_capped_and_is_text_for_every_database(shop: Shop) -> None:
    shop.inbox.fail(shop.entry(), "a\0b" + "\ud800" + "x" * 9000)
    (row,) = shop.inbox.get("e")
    assert row.last_error is not None
    assert row.last_error.startswith("ab?x")
    assert len(row.last_error) <= 4000


@pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
def test_a_duplicate_of_one_that_runs_is_told_so_at_once(shop: Shop) -> None:
    with Running(shop, shop.entry()) as running:
        assert shop.run(shop.entry(sequence=2)) == BUSY
        assert shop.inbox.fail(shop.entry(sequence=2), "x").verdict is Verdict.BUSY
        assert shop.run(shop.entry("other")) == "done", "others are not kept waiting"
        assert running.end() == "done"
    assert shop.run(shop.entry(sequence=2)) == Ack()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_on_sqlite_handlers_wait_for_each_other(shop: Shop) -> None:
    with Running(shop, shop.entry()) as running, ThreadPoolExecutor(2) as pool:
        duplicate = pool.submit(shop.run, shop.entry(sequence=2))
        other = pool.submit(shop.run, shop.entry("other"))
        assert not duplicate.done()
        assert not other.done()
        running.end()
        assert (duplicate.result(30), other.result(30)) == (Ack(), "done")


def test_many_duplicates_at_once_have_one_effect(shop: Shop) -> None:
    entries = [shop.entry(f"e{n % 5}", sequence=n) for n in range(60)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(shop.run, entries))
    assert sorted(shop.effects()) == [f"e{n}" for n in range(5)]
    assert results.count("done") == 5
    assert {str(result) for result in results} <= {"done", str(Ack()), str(BUSY)}


def test_a_lost_conflict_and_a_broken_rule_are_told_apart(shop: Shop) -> None:
    def twice(session: Session) -> None:
        session.execute(insert(effects), [{"unique_id": 1}, {"unique_id": 1}])

    with pytest.raises(IntegrityError) as caught:
        shop.inbox.run_within(shop.entry(), twice, lambda _: None)
    assert not shop.inbox.is_outage(caught.value)

    def no_such(session: Session) -> None:
        session.execute(text("SELECT no_such_column FROM effects"))

    with pytest.raises(DBAPIError) as error:
        shop.inbox.run_within(shop.entry(), no_such, lambda _: None)
    assert not shop.inbox.is_outage(error.value), "a mistake in a statement is no outage"


@pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
def test_a_deadlock_is_an_outage_and_no_failure(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        connection.execute(insert(effects), [{"id": 1}, {"id": 2}])
    both = threading.Barrier(2)

    def lock(first: int, second: int) -> Callable[[Session], None]:
        def handle(session: Session) -> None:
            for number in (first, second):
                session.execute(update(effects).where(effects.c.id == number).values(event_id="x"))
                if number == first:
                    both.wait(10)

        return handle

    caught: list[BaseException] = []

    def run(event_id: str, first: int, second: int) -> None:
        try:
            shop.inbox.run_within(shop.entry(event_id), lock(first, second), lambda _: None)
        except Exception as error:
            caught.append(error)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, ("a", "b"), (1, 2), (2, 1)))
    (error,) = caught
    assert shop.inbox.is_outage(error)
    assert shop.inbox.is_lost_conflict(error)


def test_two_statements_an_event_at_the_most(shop: Shop) -> None:
    """The gate: beyond the handler's own, one for an event, two for a duplicate."""
    shop.run(shop.entry("first"))
    engine = shop.inbox.database.engine
    with statements(engine) as seen:
        shop.run(shop.entry("e"))
    assert len(seen) == 1 + 1, seen
    with statements(engine) as seen:
        shop.run(shop.entry("e", sequence=2))
    assert len(seen) <= 2, seen
    with statements(engine) as seen:
        shop.inbox.run_around(shop.entry("around"), lambda: None, lambda _: None)
    assert len(seen) == 2, seen


def test_who_ends_the_transaction_is_told_not_to(shop: Shop) -> None:
    def commits(session: Session) -> None:
        session.execute(insert(effects).values(event_id="e"))
        session.commit()

    def rolls_back(session: Session) -> None:
        session.rollback()
        session.execute(insert(effects).values(event_id="e"))

    def closes(session: Session) -> None:
        session.close()

    for handler in (commits, rolls_back, closes):
        with pytest.raises(InboxError, match="the session"):
            shop.inbox.run_within(shop.entry(), handler, lambda _: None)
    assert shop.effects() == []
    assert shop.states() == {}


def test_an_error_that_is_caught_is_no_commit_of_nothing(shop: Shop) -> None:
    """After it PostgreSQL rolls back what is committed, and its driver does not say so."""
    with shop.engine.begin() as connection:
        connection.execute(insert(effects).values(event_id="there", unique_id=7))

    def handle(session: Session) -> str:
        session.execute(insert(effects).values(event_id="kept"))
        with contextlib.suppress(IntegrityError):
            session.execute(insert(effects).values(unique_id=7))
        return "done"

    if shop.database.kind == "postgresql":
        with pytest.raises(DBAPIError, match="transaction is aborted"):
            shop.inbox.run_within(shop.entry(), handle, lambda _: None)
        assert (shop.effects(), shop.states()) == (["there"], {})
    else:
        assert shop.inbox.run_within(shop.entry(), handle, lambda _: None) == "done"
        assert (shop.effects(), shop.states()) == (["there", "kept"], {"e": "processed"})


@pytest.mark.parametrize("database", ["mariadb"], indirect=True)
def test_a_deadlock_that_is_caught_is_no_commit_of_the_rest(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        connection.execute(insert(effects), [{"id": 1}, {"id": 2}])
    locked, waiting = threading.Event(), threading.Event()

    def other() -> None:
        with shop.engine.begin() as connection:
            many = [{"event_id": "other"}] * 50  # a victim is who has changed less
            connection.execute(insert(effects), many)
            connection.execute(update(effects).where(effects.c.id == 2).values(event_id="o"))
            locked.set()
            assert waiting.wait(10)
            connection.execute(update(effects).where(effects.c.id == 1).values(event_id="o"))

    def handle(session: Session) -> str:
        session.execute(update(effects).where(effects.c.id == 1).values(event_id="mine"))
        assert locked.wait(10)
        waiting.set()
        with contextlib.suppress(DBAPIError):
            session.execute(update(effects).where(effects.c.id == 2).values(event_id="mine"))
        session.execute(insert(effects).values(event_id="after"))
        return "done"

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(other)
        with pytest.raises(InboxError, match="rolled the transaction back"):
            shop.inbox.run_within(shop.entry(), handle, lambda _: None)
        result.result(10)
    assert "after" not in shop.effects()
    assert shop.states() == {}


def test_what_is_ignored_is_done_with(shop: Shop) -> None:
    """Acked by Celery's word: nothing of it is kept but that."""

    def ignore(session: Any = None) -> None:
        if session is not None:
            session.execute(insert(effects).values(event_id="e"))
        raise Ignore

    with pytest.raises(Ignore):
        shop.inbox.run_within(shop.entry("within"), ignore, lambda _: None)
    with pytest.raises(Ignore):
        shop.inbox.run_around(shop.entry("around"), ignore, lambda _: None)
    assert shop.effects() == []
    assert shop.states() == {"within": "processed", "around": "processed"}


def test_a_part_may_fail_in_a_savepoint(shop: Shop) -> None:
    def handle(session: Session) -> str:
        session.execute(insert(effects).values(event_id="kept"))
        with contextlib.suppress(RuntimeError), session.begin_nested():
            session.execute(insert(effects).values(event_id="lost"))
            raise RuntimeError
        with session.begin_nested():
            session.execute(insert(effects).values(event_id="kept"))
        return "done"

    assert shop.inbox.run_within(shop.entry(), handle, lambda _: None) == "done"
    assert shop.effects() == ["kept", "kept"]


# ── around the call ──────────────────────────────────────────────────────────


def test_around_a_call_rows_say_what_goes_on(shop: Shop) -> None:
    seen: list[str] = []

    def handle() -> str:
        seen.append(shop.inbox.get("e")[0].status)
        return "done"

    assert shop.inbox.run_around(shop.entry(), handle, lambda _: None) == "done"
    assert seen == ["processing"]
    (row,) = shop.inbox.get("e")
    assert (row.status, row.leased_until) == ("processed", None)
    assert shop.inbox.run_around(shop.entry(sequence=2), handle, lambda _: None) == Ack()


def test_around_a_call_a_duplicate_is_busy_until_the_lease_ends(
    make_shop: Callable[..., Shop], database: Database
) -> None:
    """A killed worker leaves its row; nobody renews the lease."""
    shop = make_shop(database, inbox_lease=1).open()
    with shop.inbox.database.statements() as connection:
        assert shop.inbox.rows.begin(connection, shop.entry(), within=False).verdict is Verdict.OURS

    def run() -> Any:
        return shop.inbox.run_around(shop.entry(number=2), lambda: "done", lambda _: None)

    assert run() == BUSY
    assert wait_until(lambda: run() == "done", 10, "the lease to end")


def test_around_a_call_a_lease_is_renewed_while_it_runs(
    make_shop: Callable[..., Shop], database: Database
) -> None:
    shop = make_shop(database, inbox_lease=1).open()
    first = shop.entry()
    with Running(shop, first, within=False) as running:
        (row,) = shop.inbox.get("e")
        until = row.leased_until
        assert until is not None
        wait_until(lambda: (shop.inbox.get("e")[0].leased_until or until) > until, 10, "renewal")
        assert running.end() == "done"
    assert shop.states() == {"e": "processed"}


def test_around_a_call_what_was_cut_off_may_begin_at_once(shop: Shop) -> None:
    first = shop.entry()
    same = Entry(first.event_id, first.handler, first.event_type, first.delivery)
    with shop.inbox.database.statements() as connection:
        shop.inbox.rows.begin(connection, first, within=False)
    shop.inbox.release(shop.entry(sequence=9))  # another's hand-over changes nothing
    assert shop.states() == {"e": "processing"}
    shop.inbox.release(same)
    assert shop.states() == {"e": "received"}
    assert shop.inbox.run_around(shop.entry(), lambda: "done", lambda _: None) == "done"


def test_around_a_call_only_the_run_itself_can_fail_it(shop: Shop) -> None:
    first = shop.entry()
    with shop.inbox.database.statements() as connection:
        shop.inbox.rows.begin(connection, first, within=False)
    assert shop.inbox.fail(shop.entry(sequence=2), "x").verdict is Verdict.BUSY
    same = Entry(first.event_id, first.handler, first.event_type, first.delivery)
    assert shop.inbox.fail(same, "killed") == Answer(Verdict.OURS, 1)
    assert shop.states() == {"e": "failed"}


# ── sessions ─────────────────────────────────────────────────────────────────


def test_sessions_are_of_the_factory(make_shop: Callable[..., Shop], database: Database) -> None:
    engine = create_engine(database.url)

    class Ours(Session):
        pass

    seen: list[Session] = []
    made = sessionmaker(engine, class_=Ours)
    for factory in (made, scoped_session(made)):
        shop = make_shop(database, database_url=None, session_factory=factory).open()
        entry = shop.entry(type(factory).__name__)
        shop.inbox.run_within(entry, seen.append, lambda _: None)
        assert isinstance(seen.pop(), Ours)
        assert shop.states()[entry.event_id] == "processed"
    engine.dispose()


def test_a_session_that_commits_by_itself_is_refused(
    make_shop: Callable[..., Shop], database: Database
) -> None:
    engine = create_engine(database.url, isolation_level="AUTOCOMMIT")
    shop = make_shop(database, database_url=None, session_factory=sessionmaker(engine)).open()
    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        shop.run(shop.entry())
    engine.dispose()


def test_asynchronous_sessions_are_refused(
    make_shop: Callable[..., Shop], sqlite: Database
) -> None:
    factory = async_sessionmaker(create_async_engine(sqlite.async_url))
    shop = make_shop(sqlite, database_url=None, session_factory=factory)
    with pytest.raises(ConfigurationError, match="asynchronous"):
        shop.inbox.sessions  # noqa: B018


# ── outages ──────────────────────────────────────────────────────────────────


def away(kind: str) -> str:
    scheme = {"postgresql": "postgresql+psycopg://x", "mariadb": "mysql+pymysql://x"}[kind]
    return f"{scheme}@127.0.0.1:{free_port()}/shop"


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_database_that_is_away_is_an_outage(make_shop: Callable[..., Shop], kind: str) -> None:
    shop = make_shop(Database(kind, away(kind)))
    with pytest.raises(InboxUnavailableError, match="is away") as caught:
        shop.run(shop.entry())
    assert shop.inbox.is_outage(caught.value)
    assert not shop.inbox.is_lost_conflict(caught.value)
    with pytest.raises(InboxUnavailableError):
        shop.inbox.fail(shop.entry(), "x")


def test_a_table_that_is_not_there_yet_is_an_outage(
    make_shop: Callable[..., Shop], database: Database
) -> None:
    """A deploy may precede its migrations: no event is to be given up for that."""
    shop = make_shop(database)
    with pytest.raises(InboxUnavailableError, match="jetstream inbox init"):
        shop.run(shop.entry())
    with pytest.raises(ConfigurationError, match="jetstream inbox init"):
        shop.inbox.find()


# ── tables ───────────────────────────────────────────────────────────────────


def test_tables_are_made_once_however_many_do_so(
    make_shop: Callable[..., Shop], database: Database
) -> None:
    shop = make_shop(database)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: shop.inbox.create_tables(), range(8)))
    assert shop.inbox.differences() == []
    names = {index["name"] for index in inspect(shop.engine).get_indexes("jetstream_inbox")}
    assert {"ix_jetstream_inbox_updated", "ix_jetstream_inbox_open"} <= names


def test_what_differs_is_named(make_shop: Callable[..., Shop], postgresql: Database) -> None:
    shop = make_shop(postgresql).open()
    with shop.engine.begin() as connection:
        connection.execute(text("ALTER TABLE jetstream_inbox DROP COLUMN owner"))
        connection.execute(text("ALTER TABLE jetstream_inbox DROP CONSTRAINT jetstream_inbox_pkey"))
    differences = "\n".join(shop.inbox.differences())
    assert "owner is missing" in differences
    assert "must be (event_id, handler)" in differences


def test_impossible_states_are_refused_by_the_database(shop: Shop) -> None:
    shop.run(shop.entry())
    for change in ("status = 'lost'", "status = 'failed'", "attempts = -1"):
        with pytest.raises(DBAPIError), shop.engine.begin() as connection:
            connection.execute(text(f"UPDATE jetstream_inbox SET {change}"))


def test_a_model_of_ones_own(make_shop: Callable[..., Shop], database: Database) -> None:
    class Base(DeclarativeBase):
        pass

    class ShopInbox(InboxMixin, Base):
        __tablename__ = "shop_inbox"

    shop = make_shop(database, inbox_model=ShopInbox).open()
    assert shop.run(shop.entry()) == "done"
    assert shop.inbox.differences() == []
    with shop.engine.connect() as connection:
        assert connection.scalars(select(ShopInbox.status)).all() == ["processed"]

    class NoInbox(Base):
        __tablename__ = "no_inbox"
        event_id = Column(String(255), primary_key=True)

    with pytest.raises(ConfigurationError, match="lacks the columns attempts, deliveries"):
        make_shop(database, inbox_model=NoInbox)


def test_revisions_make_and_drop_it(make_shop: Callable[..., Shop], database: Database) -> None:
    model = inbox_model("incoming")
    shop = make_shop(database, inbox_table="incoming")
    with shop.engine.begin() as connection:
        create_inbox(connection, model)
        create_inbox(connection, model)
    assert shop.inbox.differences() == []
    with shop.engine.begin() as connection:
        drop_inbox(connection, model)
        drop_inbox(connection, model)
    assert any("missing" in difference for difference in shop.inbox.differences())


# ── looking and pruning ──────────────────────────────────────────────────────


def test_rows_are_found_by_what_is_asked(shop: Shop) -> None:
    shop.run(shop.entry("done"))
    shop.inbox.fail(shop.entry("failed", handler="other"), "no")
    with shop.inbox.database.statements() as connection:
        shop.inbox.rows.begin(connection, shop.entry("working"), within=False)

    def ids(**chosen: Any) -> set[str]:
        return {row.event_id for row in shop.inbox.find(InboxFilter(**chosen))}

    assert ids() == {"done", "failed", "working"}
    assert ids(status="failed") == ids(handler="other") == {"failed"}
    assert ids(event_type="order.*", status="processed") == {"done"}
    assert ids(event_type="user.>") == ids(older_than=60) == set()
    assert ids(newer_than=60, event_id="working") == {"working"}
    status = shop.inbox.status()
    assert status["counts"] == {"received": 0, "processing": 1, "processed": 1, "failed": 1}
    assert status["oldest_processing"] is not None
    assert json.dumps([row.as_dict() for row in shop.inbox.find()])


def test_pruning_takes_what_is_old_and_at_rest(shop: Shop) -> None:
    shop.run(shop.entry("old"))
    shop.inbox.fail(shop.entry("failed"), "no")
    with shop.inbox.database.statements() as connection:
        shop.inbox.rows.begin(connection, shop.entry("working"), within=False)
    with shop.engine.begin() as connection:
        connection.execute(text("UPDATE jetstream_inbox SET updated_at = '2020-01-01 00:00:00'"))
    shop.run(shop.entry("new"))
    assert shop.inbox.prune(dry_run=True) == 2
    assert shop.inbox.prune() == 2
    assert set(shop.states()) == {"working", "new"}
    assert shop.inbox.prune(progress=lambda *_: None) == 0


def test_two_prune_at_once(shop: Shop) -> None:
    table = shop.inbox.rows.table
    for event_id in ("first", "last"):
        shop.run(shop.entry(event_id))
    with shop.engine.begin() as connection:
        (row,) = connection.execute(select(table).where(table.c.event_id == "first")).all()
        copies = [{**row._mapping, "event_id": f"e{n}"} for n in range(2500)]
        connection.execute(insert(table), copies)
    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(lambda _: shop.inbox.prune(0), range(2)))
    assert sum(counts) == 2502
    assert shop.states() == {}


def test_a_reset_is_of_one_handler_or_of_all(shop: Shop) -> None:
    for handler in ("one", "other"):
        shop.run(shop.entry(handler=handler))
    assert shop.inbox.reset("e", "one") == 1
    assert {row.handler: row.status for row in shop.inbox.get("e")} == {
        "one": "received",
        "other": "processed",
    }
    assert shop.inbox.reset("e") == 1
    assert shop.inbox.reset("nobody") == 0
    assert shop.run(shop.entry(handler="one")) == "done"


# ── the app ──────────────────────────────────────────────────────────────────


def make_app(tmp_path: Path, **settings: Any) -> Celery:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(
        jetstream_app_name="shop",
        jetstream_destination_app="hub",
        jetstream_database_url=f"sqlite:///{tmp_path}/shop.sqlite",
        **settings,
    )
    JetStream(app)
    return app


def test_what_cannot_be_is_said_at_start(tmp_path: Path) -> None:
    app = make_app(tmp_path)

    @app.task(base=_handler_base(app), event_types=("a",), inbox=False, shared=False)
    def without(event: Any, session: Any) -> None: ...

    with pytest.raises(ConfigurationError, match=r"without takes a session.*inbox=True"):
        app.jetstream.check()


def test_two_handlers_with_one_key_are_refused(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    for name, pattern in (("one", "a"), ("other", "b")):
        options: Any = {"name": name, "event_types": (pattern,), "inbox": True, "inbox_key": "k"}
        app.task(base=_handler_base(app), shared=False, **options)(_nothing)
    with pytest.raises(ConfigurationError, match="inbox_key 'k': one and other"):
        app.jetstream.check()


def _nothing(event: Any) -> None: ...


def _handler_base(app: Celery) -> Any:
    from celery_jetstream.handlers import _task_class

    return _task_class(app.Task)


def called_directly(event: Any, session: Session) -> str:
    session.execute(insert(effects).values(event_id=event.event_id))
    return str(event.payload)


def test_without_a_message_there_is_a_session_and_no_row(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    options: Any = {"event_types": ("called.directly",), "inbox": True, "typing": False}
    task = app.task(base=_handler_base(app), shared=False, **options)(called_directly)
    app.finalize()
    engine = create_engine(app.conf.jetstream_database_url)
    metadata.create_all(engine)
    app.jetstream.inbox.create_tables()
    envelope = {"event_id": "e", "event_type": "called.directly", "payload": 1}
    assert task.apply((envelope,)).get() == "1"
    app.conf.task_always_eager = True
    assert task.delay(envelope).get() == "1"
    with engine.connect() as connection:
        assert len(connection.execute(select(effects)).all()) == 2
    assert app.jetstream.inbox.find() == []
    with Session(engine) as session:
        assert task(envelope, session=session) == "1"
    app.jetstream.close()
    engine.dispose()


def test_beat_prunes_where_there_is_an_inbox(tmp_path: Path) -> None:
    name = "celery_jetstream.prune_inbox"
    for settings, there in (
        ({"jetstream_use_inbox": True, "jetstream_inbox_queue": "rare"}, True),
        ({"jetstream_use_inbox": True, "jetstream_inbox_beat": False}, False),
    ):
        app = make_app(tmp_path, **settings)
        app.finalize()
        assert (name in app.conf.beat_schedule) is there
        if there:
            assert app.conf.beat_schedule[name]["options"]["queue"] == "rare"
            app.jetstream.inbox.create_tables()
            assert app.tasks[name].apply().get() == {"deleted": 0}
            app.jetstream.close()
