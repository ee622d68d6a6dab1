"""What administrators do with the outbox: its tables, and the rows in it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from celery import Celery
from sqlalchemy import MetaData, create_engine, event, insert, inspect, make_url, select, text
from sqlalchemy.pool import NullPool

from celery_jetstream import models
from celery_jetstream.exceptions import ConfigurationError, OutboxUnavailableError, SubjectError
from celery_jetstream.models import AT_ONCE, PARKED
from celery_jetstream.outbox_filter import Filter
from celery_jetstream.schema import create_outbox, drop_outbox
from celery_jetstream.sqltypes import db_now
from celery_jetstream.testing import NatsServer
from tests.conftest import Names
from tests.databases import Database
from tests.flushing import Flushing, Threads, in_order, statements

FAR = db_now(3600)
MakeFlushing = Callable[..., Flushing]


@pytest.fixture
def make_flushing(
    nats_server: NatsServer, database: Database, names: Names
) -> Iterator[MakeFlushing]:
    made: list[Flushing] = []

    def make(**settings: Any) -> Flushing:
        made.append(Flushing(nats_server.url, database, names, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def bare(make_flushing: MakeFlushing) -> Flushing:
    """Without tables and stream."""
    return make_flushing()


@pytest.fixture
def tabled(bare: Flushing) -> Flushing:
    """With tables; nothing is published."""
    bare.outbox.create_tables()
    return bare


@pytest.fixture
def shop(bare: Flushing) -> Flushing:
    return bare.prepare()


@pytest.fixture
def light(nats_server: NatsServer, sqlite: Database, names: Names) -> Iterator[Flushing]:
    """A shop on SQLite, for what is the same on all databases."""
    one = Flushing(nats_server.url, sqlite, names)
    yield one.prepare()
    one.close()


def fail(one: Flushing, event_id: str, status: str = "failed", until: Any = None) -> None:
    """Has a row given up, or (``until``) tried again later, as a flusher does it."""
    ended = {"status": status, "finished_at": db_now()} if until is None else {"due_at": until}
    one.change(event_id, attempts=1, failing_since=db_now(), last_error="no\nstream", **ended)
    row = one.row(event_id)
    if row.ordering_key and row.on_failure == "park":
        hold = {
            "bucket": row.bucket,
            "subject": row.subject,
            "ordering_key": row.ordering_key,
            "until": PARKED if until is None else until,
            "outbox_id": row.id,
        }
        with one.engine.begin() as connection:
            connection.execute(insert(one.outbox.database.tables.holds), hold)


def park(one: Flushing, *ids: str) -> None:
    one.change(*ids, due_at=PARKED)


def fields(one: Flushing, event_id: str) -> dict[str, Any]:
    return dict(one.row(event_id)._mapping)


# -- tables ----------------------------------------------------------------------------------------


CREATE = """
import sys
from celery import Celery
from celery_jetstream import JetStream
app = Celery("init", broker="memory://", set_as_current=False)
app.conf.update(jetstream_app_name="a", jetstream_destination_app="b")
app.conf.update(jetstream_database_url=sys.argv[1])
outbox = JetStream(app).outbox
sys.stdin.readline()
outbox.create_tables()
assert outbox.differences() == [], outbox.differences()
outbox.close()
"""


@contextlib.contextmanager
def creating(database: Database) -> Iterator[subprocess.Popen]:
    """A process that creates the tables when told to, and that ends with the test."""
    command = [sys.executable, "-c", CREATE, database.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


class TestTables:
    def test_they_can_be_created_by_processes_and_threads_at_once(
        self, bare: Flushing, database: Database
    ):
        create = bare.outbox.create_tables
        with contextlib.ExitStack() as running:
            processes = [
                running.enter_context(creating(database)),
                running.enter_context(creating(database)),
            ]
            for process in processes:
                process.stdin.write(b"now\n")
                process.stdin.close()
            with Threads(*[create] * 4):
                pass
            assert [process.wait(30) for process in processes] == [0, 0]
        assert bare.outbox.differences() == []
        buckets = bare.outbox.database.tables.buckets
        with bare.engine.connect() as connection:
            assert len(connection.scalars(select(buckets.c.bucket)).all()) == models.BUCKETS

    def test_another_may_make_the_rows_between_our_look_and_our_insert(self, tabled: Flushing):
        buckets = tabled.outbox.database.tables.buckets
        tabled.sql(f"DELETE FROM {buckets.name}")
        another = [tabled.outbox.create_tables]

        def be_first(_conn: object, _cursor: object, statement: str, *_: object) -> None:
            if statement.startswith("INSERT") and another:
                another.pop()()

        event.listen(tabled.outbox.database.engine, "before_cursor_execute", be_first)
        tabled.outbox.create_tables()
        assert another == []
        assert tabled.sql(f"SELECT count(*) FROM {buckets.name}") == [(models.BUCKETS,)]

    def test_what_is_missing_is_added(self, tabled: Flushing):
        tabled.sql(f"DROP TABLE {tabled.table.name}_holds")
        tabled.sql(f"DELETE FROM {tabled.table.name}_buckets WHERE bucket = 7")
        table = f" ON {tabled.table.name}" if tabled.kind == "mariadb" else ""
        tabled.sql(f"DROP INDEX ux_{tabled.table.name}_event_id{table}")
        assert len(tabled.outbox.differences()) == 2
        tabled.outbox.create_tables()
        assert tabled.outbox.differences() == []

    def test_the_sql_makes_them_too(self, bare: Flushing):
        script = bare.outbox.ddl()
        with bare.engine.begin() as connection:
            for statement in script.split(";\n"):
                if statement.strip():
                    connection.exec_driver_sql(statement)
        assert bare.outbox.differences() == []
        bare.write("a")
        assert bare.outbox.find()[0].state == "pending"
        assert bare.outbox.status()["leases"] == {}

    def test_alembic_finds_nothing_to_do(self, tabled: Flushing):
        assert self.diff(tabled) == []

    def test_a_revision_makes_and_drops_them(self, bare: Flushing):
        with bare.engine.begin() as connection:
            op = Operations(MigrationContext.configure(connection))
            create_outbox(op.get_bind())
        assert bare.outbox.differences() == []
        assert self.diff(bare) == []
        with bare.engine.begin() as connection:
            drop_outbox(Operations(MigrationContext.configure(connection)).get_bind())
        assert inspect(bare.engine).get_table_names() == []

    def test_a_revision_without_a_database_is_told_what_to_do(self):
        context = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True})
        with pytest.raises(TypeError, match="init --sql"):
            create_outbox(Operations(context).get_bind())

    def test_another_name_and_schema(
        self, make_flushing: MakeFlushing, bare: Flushing, database: Database
    ):
        other = make_flushing(jetstream_outbox_table="other", jetstream_outbox_schema="events")
        if database.kind == "sqlite":
            with pytest.raises(ConfigurationError, match="CREATE SCHEMA events"):
                other.outbox.create_tables()
            return
        schema = f"events_{abs(hash(database.url))}"
        other = make_flushing(jetstream_outbox_table="other", jetstream_outbox_schema=schema)
        with pytest.raises(ConfigurationError, match=f"CREATE SCHEMA {schema}"):
            other.outbox.create_tables()
        url = make_url(database.url)
        if database.kind == "postgresql":
            url = url.set(username="postgres")
        admin = create_engine(url, poolclass=NullPool)
        with admin.begin() as connection:
            connection.execute(text(f"CREATE SCHEMA {schema}"))
        if database.kind == "postgresql":
            with pytest.raises(ConfigurationError, match=r"(?s)permission denied.* init --sql"):
                other.outbox.create_tables()
            with admin.begin() as connection:
                user = make_url(database.url).username
                connection.execute(text(f"GRANT ALL ON SCHEMA {schema} TO {user}"))
        other.outbox.create_tables()
        other.write("a")
        assert other.outbox.differences() == []
        assert len(other.outbox.find()) == 1
        with pytest.raises(ConfigurationError, match="outbox init"):
            bare.outbox.find()

    @staticmethod
    def diff(one: Flushing) -> list[Any]:
        """What Alembic would change to have the default model's tables in the database."""
        names = {"jetstream_outbox", "jetstream_outbox_buckets", "jetstream_outbox_holds"}
        assert names <= models.metadata.tables.keys()
        ours = MetaData()  # other tests add tables to the default one
        models.outbox_model(in_metadata=ours)
        assert ours.tables.keys() == names
        with one.engine.connect() as connection:
            return list(compare_metadata(MigrationContext.configure(connection), ours))


class TestDifferences:
    def test_missing_tables_are_named(self, bare: Flushing):
        name = bare.table.name
        said = bare.outbox.differences()
        assert [line.split(":")[0] for line in said] == [
            f"table {name} is missing",
            f"table {name}_buckets is missing",
            f"table {name}_holds is missing",
        ]
        assert "outbox init" in said[0]
        assert "counts" not in bare.outbox.status()

    def test_each_is_said_in_words_to_act_on(self, tabled: Flushing):
        name = tabled.table.name
        changes, expected = {
            "postgresql": (
                [
                    f"ALTER TABLE {name} DROP COLUMN last_error",
                    f"ALTER TABLE {name} ALTER COLUMN failing_since SET NOT NULL",
                    f"ALTER TABLE {name} ALTER COLUMN event_type TYPE varchar(100)",
                    f"ALTER TABLE {name} ALTER COLUMN due_at TYPE timestamp",
                    f"ALTER TABLE {name} DROP CONSTRAINT ck_{name}_status",
                    f"DROP INDEX ux_{name}_event_id",
                    f"CREATE INDEX ux_{name}_event_id ON {name} (event_id)",
                    f"DROP INDEX ix_{name}_due",
                ],
                [
                    "last_error is missing: ALTER TABLE … ADD COLUMN last_error TEXT",
                    "failing_since must allow NULL",
                    "event_type is VARCHAR(length=100) and must be VARCHAR(255)",
                    "due_at is TIMESTAMP() and must be TIMESTAMP WITH TIME ZONE",
                    "CHECK (status IN ('pending', ",
                    "CREATE UNIQUE INDEX",
                    "(status, due_at, id, bucket)",
                ],
            ),
            "mariadb": (
                [
                    f"ALTER TABLE {name} MODIFY body BLOB NOT NULL",
                    f"ALTER TABLE {name} MODIFY headers TEXT COLLATE utf8mb4_bin NOT NULL",
                    f"ALTER TABLE {name} MODIFY due_at DATETIME NOT NULL",
                    f"ALTER TABLE {name} MODIFY subject varchar(255) "
                    "COLLATE utf8mb4_general_ci NOT NULL",
                    f"ALTER TABLE {name} MODIFY created_at DATETIME(6) NULL",
                    f"ALTER TABLE {name} DROP CONSTRAINT ck_{name}_finished",
                    f"ALTER TABLE {name}_buckets ENGINE=Aria",
                ],
                [
                    "body is BLOB() and must be LONGBLOB",
                    "headers is TEXT",
                    "due_at is DATETIME() and must be DATETIME(6)",
                    "subject has collation utf8mb4_general_ci and must have utf8mb4_bin",
                    "created_at must not allow NULL",
                    "CHECK ((status = 'pending') = (finished_at IS NULL))",
                    f"{name}_buckets is of engine Aria",
                ],
            ),
            "sqlite": (
                [
                    f"ALTER TABLE {name} DROP COLUMN last_error",
                    f"DROP INDEX ix_{name}_finished",
                    f"ALTER TABLE {name} RENAME COLUMN headers TO more",
                ],
                [
                    "last_error is missing",
                    "headers is missing",
                    f"{name}.more is none of ours and must have a value",
                    "(status, finished_at)",
                ],
            ),
        }[tabled.kind]
        for change in changes:
            tabled.sql(change)
        said = tabled.outbox.differences()
        for words in expected:
            assert any(words in line for line in said), (words, said)
        assert len(said) == len(expected), said

    def test_columns_of_ones_own_are_welcome(self, tabled: Flushing):
        name = tabled.table.name
        tabled.sql(f"ALTER TABLE {name} ADD COLUMN note VARCHAR(10)")
        tabled.sql(f"ALTER TABLE {name} ADD COLUMN tenant VARCHAR(10) DEFAULT 'main' NOT NULL")
        assert tabled.outbox.differences() == []
        assert tabled.write("a") == ["1"]


# -- looking ---------------------------------------------------------------------------------------


class TestFind:
    def test_each_state_is_shown_and_found(self, tabled: Flushing):
        tabled.write("failed", "failed", "retrying", "retrying", "later", None, None, None, "out")
        fail(tabled, "1")
        park(tabled, "2")
        until = tabled.row("3").created_at + timedelta(hours=1)
        fail(tabled, "3", until=until)
        tabled.change("4", due_at=until)
        tabled.change("5", due_at=FAR)
        tabled.change("6", status="sent", finished_at=db_now())
        tabled.change("7", status="cancelled", finished_at=db_now())
        fail(tabled, "9", "exception")
        states = {row.event_id: row.state for row in tabled.outbox.find()}
        assert states == {
            "1": "failed",
            "2": "parked",
            "3": "retrying",
            "4": "parked",
            "5": "scheduled",
            "6": "sent",
            "7": "cancelled",
            "8": "pending",
            "9": "exception",
        }
        for event_id, state in states.items():
            if state == "pending":
                tabled.lease("somebody", FAR, [tabled.row("8").bucket])
                state = "publishing"
            found = tabled.outbox.find(Filter(status=state))
            assert event_id in [row.event_id for row in found]
            assert {row.state for row in found} == {state}
        found = tabled.outbox.find(Filter(status="pending"))
        assert [row.event_id for row in found] == ["2", "3", "4", "5", "8"]
        assert tabled.outbox.get("1").due_at is None
        assert tabled.outbox.get("4").due_at == until

    def test_filters_and_pages(self, tabled: Flushing):
        for event_type in ("user.created", "user.gone", "user", "user.name.changed", "users.x"):
            tabled.write("a%", event_type=event_type)
        tabled.write(None, "b", event_type="order_x", subject="another.subject")
        tabled.change("1", created_at=db_now(-600))

        def found(**options: Any) -> list[str]:
            return [row.event_id for row in tabled.outbox.find(Filter(**options))]

        assert found(event_type="user.*") == ["1", "2"]
        assert found(event_type="user.>") == ["1", "2", "4"]
        assert found(event_type="*.created") == ["1"]
        assert found(event_type="user") == ["3"]
        assert found(event_type="order%") == []
        assert found(ordering_key="a%") == ["1", "2", "3", "4", "5"]
        assert found(ordering_key="A%") == []
        assert found(ordering_key="") == ["6"]
        assert found(subject="another.subject") == ["6", "7"]
        assert found(event_id="7") == ["7"]
        assert found(older_than=300) == ["1"]
        assert found(newer_than=300, event_type=">") == ["2", "3", "4", "5", "6", "7"]
        page = tabled.outbox.find(limit=3)
        rest = tabled.outbox.find(limit=10, after=page[-1].id)
        assert [row.event_id for row in [*page, *rest]] == ["1", "2", "3", "4", "5", "6", "7"]
        assert [r.event_id for r in tabled.outbox.find(Filter(event_type="*.>"), limit=2)] == [
            "1",
            "2",
        ]
        assert 599 < page[0].age < 700
        with pytest.raises(SubjectError):
            Filter(event_type="user.cre*")
        with pytest.raises(ValueError, match="give one of"):
            Filter(status="done")

    def test_one_is_shown_with_its_content(self, tabled: Flushing):
        tabled.write("a", headers={"x-secret": "hunter2"})
        assert tabled.outbox.exists("1")
        row = tabled.outbox.get("1")
        assert row.headers == {"x-secret": "hunter2"}
        assert b'"n":1' in row.body
        assert row.as_dict()["body"]["payload"] == {"n": 1}
        assert "hunter2" not in str(row.as_dict())
        assert tabled.outbox.find()[0].body is None
        assert tabled.outbox.get("2") is None
        assert not tabled.outbox.exists("2")
        tabled.change("1", headers="[", body=b"\xff")
        assert tabled.outbox.get("1").as_dict()["body"] == "\ufffd"

    def test_status_counts_and_ages(self, tabled: Flushing, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("celery_jetstream.outbox_status.CAP", 100)
        empty = tabled.outbox.status()
        assert empty["counts"] == dict.fromkeys(models.STATUSES, 0)
        assert empty["oldest_due"] is None
        assert empty["oldest_pending"] is None
        tabled.write("a", "a", "b", "c")
        fail(tabled, "1")
        park(tabled, "2")
        tabled.change("2", created_at=db_now(-900))
        tabled.change("3", due_at=db_now(-50), created_at=db_now(-600))
        tabled.change("4", due_at=FAR)
        tabled.fill(101, status="sent", finished_at=db_now())
        tabled.lease("somebody", FAR, [1, 2])
        found = tabled.outbox.status()
        assert found["counts"] == {
            "pending": 3,
            "sent": "100+",
            "failed": 1,
            "exception": 0,
            "cancelled": 0,
        }
        assert 50 <= found["oldest_due"] < 100
        assert 900 <= found["oldest_pending"] < 1000
        assert found["parked_keys"] == 1
        assert found["leases"] == {"somebody": 2}
        assert found["differences"] == []
        assert found["breaker"] == {"outage": None, "subjects": {}}
        assert found["database"] == tabled.engine.dialect.name


# -- changing --------------------------------------------------------------------------------------


class TestRetry:
    def test_a_failed_event_and_those_behind_it_go_out_in_order(self, shop: Flushing):
        shop.write(*"aabab", None)
        fail(shop, "1")
        park(shop, "2", "4")
        fail(shop, "3", "exception")
        park(shop, "5")
        assert shop.drain().sent == 1
        assert shop.outbox.retry(Filter(), dry_run=True).changed == 2
        assert shop.statuses()["1"] == "failed"
        outcome = shop.outbox.retry(Filter(ordering_key="a"))
        assert (outcome.changed, outcome.in_flight) == (1, 0)
        row = fields(shop, "1")
        assert (row["status"], row["attempts"], row["due_at"]) == ("pending", 0, AT_ONCE)
        assert row["failing_since"] is row["finished_at"] is None
        assert row["last_error"] == "no\nstream"
        assert [hold.ordering_key for hold in shop.holds()] == ["b"]
        assert shop.drain().sent == 3
        assert shop.stored() == ["6", "1", "2", "4"]
        assert shop.outbox.retry(Filter(status="exception")).changed == 1
        assert shop.drain().sent == 2
        in_order(shop.stored(), shop.rows())
        assert shop.leases() == set()

    def test_a_backoff_is_cut_short_and_a_schedule_is_not(self, shop: Flushing):
        shop.write("a", "a", "b")
        until = shop.row("1").created_at + timedelta(hours=1)
        fail(shop, "1", until=until)
        shop.change("2", due_at=until)
        shop.change("3", due_at=FAR)
        assert shop.drain().sent == 0
        assert shop.outbox.retry(Filter()).changed == 1
        assert shop.drain().sent == 2
        assert shop.stored() == ["1", "2"]

    def test_the_hold_of_another_event_of_the_key_stays(self, tabled: Flushing):
        tabled.write("a", "a", "a")
        tabled.change("1", on_failure="skip")
        fail(tabled, "1")
        fail(tabled, "2")
        park(tabled, "3")
        assert tabled.outbox.retry(Filter(event_id="1")).changed == 1
        assert len(tabled.holds()) == 1
        assert tabled.row("3").due_at == PARKED

    def test_many_rows_behind_one_are_freed(
        self, tabled: Flushing, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("celery_jetstream.outbox_changes.BATCH", 100)
        tabled.fill(250, keys=1, due_at=PARKED)
        tabled.change("1", due_at=AT_ONCE)
        fail(tabled, "1")
        seen: list[tuple[int, int]] = []
        tabled.outbox.retry(Filter(event_id="1"), progress=lambda *at: seen.append(at))
        assert seen == [(1, 1)]
        assert {row.due_at for row in tabled.rows()} == {AT_ONCE}
        assert tabled.holds() == []

    def test_rows_whose_failed_event_was_deleted_by_hand_go_on(self, tabled: Flushing):
        tabled.write(*"aabbc")
        fail(tabled, "1")
        fail(tabled, "3")
        park(tabled, "2", "4", "5")
        tabled.sql(f"DELETE FROM {tabled.table.name} WHERE event_id = '1'")
        tabled.outbox.retry(Filter(event_id="none"))
        due = {row.event_id: row.due_at for row in tabled.rows("2", "4", "5")}
        assert due == {"2": AT_ONCE, "4": PARKED, "5": AT_ONCE}

    def test_what_a_flusher_holds_is_in_flight(
        self, tabled: Flushing, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("celery_jetstream.outbox_changes.PATIENCE", 0.1)
        tabled.write("a", "b", "c")
        for event_id in ("1", "2", "3"):
            fail(tabled, event_id)
        theirs = tabled.row("2").bucket
        assert theirs not in (tabled.row("1").bucket, tabled.row("3").bucket)
        tabled.lease("flusher", FAR, [theirs])
        outcome = tabled.outbox.retry(Filter())
        assert (outcome.changed, outcome.in_flight) == (2, 1)
        assert tabled.row("2").status == "failed"
        assert tabled.leases() == {"flusher"}

    def test_it_waits_for_a_flusher_that_ends_soon(self, tabled: Flushing):
        tabled.write("a")
        fail(tabled, "1")
        tabled.lease("flusher", db_now(0.5))
        start = time.monotonic()
        assert tabled.outbox.retry(Filter()).changed == 1
        assert time.monotonic() - start >= 0.3


class TestCancel:
    def test_what_is_not_sent_is_taken_back(self, shop: Flushing):
        shop.write(*"abcd", None, "e")
        fail(shop, "1")
        fail(shop, "2", "exception")
        shop.change("3", due_at=FAR)
        shop.change("6", status="sent", finished_at=db_now())
        assert shop.outbox.cancel("3").changed == 1
        assert shop.outbox.cancel(Filter(), dry_run=True).changed == 4
        assert shop.outbox.cancel(Filter()).changed == 4
        assert shop.outbox.cancel("6").changed == 0
        assert [shop.statuses()[str(n)] for n in range(1, 7)] == ["cancelled"] * 5 + ["sent"]
        assert shop.row("5").finished_at is not None
        assert shop.holds() == []
        assert shop.drain().sent == 0

    def test_those_behind_it_go_on(self, shop: Flushing):
        shop.write(*"aaa")
        fail(shop, "1")
        park(shop, "2", "3")
        assert shop.outbox.cancel("2").changed == 1
        assert shop.drain().sent == 0
        assert shop.outbox.cancel("1").changed == 1
        assert shop.drain().sent == 1
        assert shop.stored() == ["3"]

    def test_beside_a_flusher_each_row_is_sent_or_cancelled(self, shop: Flushing):
        shop.fill(2000, keys=50)
        cancelled: list[int] = []
        with Threads(
            lambda: shop.drain(),
            lambda: cancelled.append(shop.outbox.cancel(Filter()).changed),
        ):
            pass
        shop.drain()
        statuses = shop.statuses()
        sent = {event_id for event_id, status in statuses.items() if status == "sent"}
        assert set(shop.stored()) == sent
        assert len(sent) + cancelled[0] == 2000
        assert set(statuses.values()) <= {"sent", "cancelled"}


class TestPrune:
    def test_only_what_was_sent_long_ago_is_deleted(self, make_flushing: MakeFlushing):
        tabled = make_flushing(jetstream_outbox_retention="10m")
        tabled.outbox.create_tables()
        tabled.write(*"abcde")
        fail(tabled, "1")
        tabled.change("1", finished_at=db_now(-9000), created_at=db_now(-9000))
        tabled.change("2", created_at=db_now(-9000))
        tabled.change("3", status="cancelled", finished_at=db_now(-9000))
        tabled.change("4", status="sent", finished_at=db_now(-700))
        tabled.change("5", status="sent", finished_at=db_now(-300))
        assert tabled.outbox.prune(dry_run=True) == 1
        assert tabled.outbox.prune() == 1
        assert tabled.outbox.prune() == 0
        assert sorted(tabled.statuses()) == ["1", "2", "3", "5"]
        assert tabled.outbox.prune(200) == 1
        assert sorted(tabled.statuses()) == ["1", "2", "3"]

    def test_two_at_once_delete_each_row_once(
        self, tabled: Flushing, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("celery_jetstream.outbox_admin.BATCH", 50)
        tabled.fill(450, status="sent", finished_at=db_now(-100))
        tabled.fill(10)
        deleted: list[int] = []
        seen: list[tuple[int, int]] = []
        with Threads(
            lambda: deleted.append(tabled.outbox.prune(50)),
            lambda: deleted.append(tabled.outbox.prune(50, progress=lambda *at: seen.append(at))),
        ):
            pass
        assert sum(deleted) == 450
        assert set(tabled.statuses().values()) == {"pending"}

    def test_it_stops_when_told_or_when_time_is_over(
        self, light: Flushing, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("celery_jetstream.outbox_admin.BATCH", 50)
        light.fill(120, status="sent", finished_at=db_now(-100))
        assert light.outbox.prune(0, max_seconds=0) == 0
        answers = iter([False, True])
        assert light.outbox.prune(0, stop=lambda: next(answers)) == 50

    @pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
    def test_the_index_is_used(self, tabled: Flushing):
        tabled.fill(1500, status="sent", finished_at=db_now())
        tabled.fill(500)
        tabled.sql(f"ANALYZE {'TABLE ' if tabled.kind == 'mariadb' else ''}{tabled.table.name}")
        with statements(tabled.engine) as seen:
            assert tabled.outbox.prune(3600) == 0
        (query,) = [sql for sql in seen if "finished_at >=" in sql]
        plan = str(self.explain(tabled, query))
        assert f"ix_{tabled.table.name}_finished" in plan, plan
        assert "Sort" not in plan, plan
        assert "filesort" not in plan, plan

    @staticmethod
    def explain(one: Flushing, query: str) -> Any:
        values = {"finished_at_1": AT_ONCE, "finished_at_2": AT_ONCE, "param_1": 1000}
        if one.kind == "mariadb":
            query = query.replace("%(finished_at_1)s", "utc_timestamp(6)")
        with one.engine.connect() as connection:
            return connection.exec_driver_sql(f"EXPLAIN {query}", values).all()


# -- replay ----------------------------------------------------------------------------------------


class TestReplay:
    def test_kept_events_are_stored_again_in_order_and_marked(self, shop: Flushing):
        shop.write(*"aabab", headers={"x-tenant": "main"})
        shop.write("c", event_type="user.created")
        shop.drain()
        shop.write("d")  # not sent
        before = shop.rows()
        assert shop.outbox.replay("1h", dry_run=True).sent == 6
        result = shop.outbox.replay("1h", chosen=Filter(event_type="order.*"))
        assert (result.sent, result.refused, result.error) == (5, 0, None)
        messages = shop.messages()
        first = [m for m in messages[:6] if b"order.paid" in m.data]
        second = messages[6:]
        assert len(second) == 5
        assert {m.data for m in first} == {m.data for m in second}
        ids = [m.headers["Nats-Msg-Id"] for m in second]
        assert set(ids) == {f"{n}.replay-{result.token}" for n in range(1, 6)}
        originals = [one.partition(".")[0] for one in ids]
        in_order(originals, before[:5])
        for message in second:
            assert message.headers["x-replay"].endswith("Z")
            assert message.headers["x-tenant"] == "main"
        assert shop.rows() == before
        assert shop.outbox.replay("1h").token != result.token

    def test_the_window_is_that_of_the_publishing(self, shop: Flushing):
        shop.write(*"abc")
        shop.drain()
        shop.change("1", finished_at=db_now(-600))
        shop.change("3", finished_at=db_now(-60))
        moment = shop.row("3").finished_at
        replay = shop.outbox.replay
        assert replay(300, dry_run=True).sent == 2
        assert replay("1h", 30.0, dry_run=True).sent == 2
        assert replay(moment, moment, dry_run=True).sent == 1
        assert replay("1h", after=shop.row("1").id, dry_run=True).sent == 2
        assert replay(0, dry_run=True).sent == 0
        with pytest.raises(ValueError, match="since is 'soon'"):
            replay("soon")
        with pytest.raises(ValueError, match="offset"):
            replay(moment.replace(tzinfo=None))

    def test_what_cannot_be_sent_is_passed_over(self, light: Flushing):
        light.write(*"aaab")
        light.drain()
        light.change("1", body=b"{")
        light.update_stream(max_msg_size=1000)
        light.change("2", headers='{"x-long": "%s"}' % ("x" * 2000))
        result = light.outbox.replay("1h")
        assert (result.sent, result.refused, result.error) == (2, 2, None)
        assert {m.partition(".")[0] for m in light.stored()[4:]} == {"3", "4"}

    def test_an_outage_ends_it_and_it_can_go_on(self, light: Flushing):
        light.write(*[None] * 6)
        light.drain()
        seen: list[tuple[int, int]] = []

        def stop_server(done: int, total: int) -> None:
            seen.append((done, total))
            if done == 4:
                light.api(f"STREAM.DELETE.{light.stream}")

        result = light.outbox.replay("1h", rate=8, progress=stop_server)
        assert "no stream" in (result.error or "")
        assert (result.sent, result.last_id) == (4, light.row("4").id)
        assert seen == [(2, 6), (4, 6)]
        light.jetstream.provision()
        light.update_stream(allow_direct=True)
        assert light.outbox.replay("1h", after=result.last_id).sent == 2
        assert [m.partition(".")[0] for m in light.stored()] == ["5", "6"]

    def test_it_keeps_to_the_rate_and_stops_when_told(self, light: Flushing):
        light.write(*[None] * 10)
        light.drain()
        start = time.monotonic()
        assert light.outbox.replay("1h", rate=20).sent == 10
        assert 0.45 <= time.monotonic() - start < 5
        answers = iter([False, True])
        result = light.outbox.replay("1h", rate=20, stop=lambda: next(answers, True))
        assert result.error == "stopped"
        assert result.sent == 5


def test_a_database_that_is_away_is_an_outage():
    app = Celery("test", set_as_current=False)
    app.conf.update(
        jetstream_app_name="a",
        jetstream_destination_app="b",
        jetstream_database_url="postgresql+psycopg://somebody:secret@127.0.0.1:1/none",
    )
    from celery_jetstream import JetStream

    outbox = JetStream(app).outbox
    for call in (outbox.status, outbox.find, outbox.create_tables, outbox.differences):
        with pytest.raises(OutboxUnavailableError, match=r"127\.0\.0\.1:1") as caught:
            call()
        assert "secret" not in str(caught.value)
    outbox.close()
