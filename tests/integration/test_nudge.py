"""Nudges with real databases and asyncio, at the end of a process, and across a fork."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, event, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from celery_jetstream.nudge import CORE_DELAY, nudge_after_commit
from tests.databases import Database

INSERT = text("INSERT INTO events (id, parent) VALUES (:id, :parent)")


class Recorder:
    def __init__(self) -> None:
        self.delays: list[float] = []

    def nudge(self, delay: float) -> None:
        self.delays.append(delay)

    def add(self, target: Any, parent: str | None = None) -> None:
        target.execute(INSERT, {"id": uuid.uuid4().hex, "parent": parent})
        nudge_after_commit(target, self.nudge)

    async def add_async(self, target: AsyncSession | AsyncConnection) -> None:
        await target.execute(INSERT, {"id": uuid.uuid4().hex, "parent": None})
        if isinstance(target, AsyncSession):
            nudge_after_commit(target.sync_session, self.nudge)
        else:
            nudge_after_commit(target.sync_connection, self.nudge)

    @property
    def count(self) -> int:
        count = len(self.delays)
        self.delays.clear()
        return count


@pytest.fixture
def nudges() -> Recorder:
    return Recorder()


TABLE = (
    "CREATE TABLE events (id varchar(64) PRIMARY KEY,"
    " parent varchar(64) REFERENCES events (id){deferred})"
)


def create_table(connection: Connection) -> None:
    deferred = "" if connection.dialect.name == "mysql" else " DEFERRABLE INITIALLY DEFERRED"
    connection.exec_driver_sql(TABLE.format(deferred=deferred))


def open_engine(database: Database) -> Engine:
    engine = create_engine(database.url, poolclass=NullPool)
    if database.kind == "sqlite":
        let_begin(engine)
    with engine.begin() as connection:
        create_table(connection)
    return engine


def let_begin(engine: Engine) -> None:
    """Has SQLite begin when it is told to, or it would begin after the savepoint."""
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))


# -- real databases --------------------------------------------------------------------------------


@pytest.fixture(params=["session", "connection"])
def target(request: pytest.FixtureRequest, database: Database) -> Iterator[Any]:
    engine = open_engine(database)
    with Session(engine) if request.param == "session" else engine.connect() as target:
        yield target


def test_commits_and_rollbacks(target: Any, nudges: Recorder) -> None:
    nudges.add(target)
    nudges.add(target)
    target.commit()
    assert nudges.count == 1
    nudges.add(target)
    target.rollback()
    with target.begin_nested():
        nudges.add(target)
    assert nudges.count == 0
    target.commit()
    assert nudges.count == 1


def test_savepoints(target: Any, nudges: Recorder) -> None:
    outer = target.begin_nested()
    with target.begin_nested():
        nudges.add(target)
    outer.rollback()
    target.commit()
    assert nudges.count == 0
    nudges.add(target)
    with contextlib.suppress(ZeroDivisionError), target.begin_nested():
        nudges.add(target)
        raise ZeroDivisionError
    target.commit()
    assert nudges.count == 1


@pytest.mark.parametrize("kind", ["session", "connection"])
def test_the_database_refuses_the_commit(postgresql: Database, nudges: Recorder, kind: str) -> None:
    engine = open_engine(postgresql)
    with Session(engine) if kind == "session" else engine.connect() as target:
        nudges.add(target, parent="nobody")
        with pytest.raises(IntegrityError):
            target.commit()
        target.rollback()
        target.commit()
    assert nudges.count == (0 if kind == "session" else 1)


def test_the_row_can_be_read_when_a_session_nudges(database: Database) -> None:
    engine = open_engine(database)
    row = {"id": uuid.uuid4().hex, "parent": None}
    seen: list[int] = []

    def read(delay: float) -> None:
        with create_engine(database.url, poolclass=NullPool).connect() as other:
            seen.append(other.execute(text("SELECT count(*) FROM events")).scalar_one())

    with Session(engine) as session:
        session.execute(INSERT, row)
        nudge_after_commit(session, read)
        session.commit()
    assert seen == [1]


def test_two_phases(mariadb: Database, nudges: Recorder) -> None:
    engine = open_engine(mariadb)
    with Session(engine, twophase=True) as session:
        _two_phases_of_a_session(session, nudges)
    with engine.connect() as connection:
        for end, count in (("commit", 1), ("rollback", 0)):
            transaction = connection.begin_twophase()
            nudges.add(connection)
            transaction.prepare()
            assert nudges.count == 0
            getattr(transaction, end)()
            assert nudges.count == count


def _two_phases_of_a_session(session: Session, nudges: Recorder) -> None:
    nudges.add(session)
    session.commit()
    assert nudges.count == 1
    nudges.add(session)
    session.prepare()
    assert nudges.count == 0
    session.commit()
    assert nudges.count == 1
    nudges.add(session)
    session.prepare()
    session.rollback()
    assert nudges.count == 0


# -- asyncio ---------------------------------------------------------------------------------------


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest) -> str:
    database: Database = request.getfixturevalue(request.param)
    return database.async_url


@contextlib.asynccontextmanager
async def open_async_engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":
        let_begin(engine.sync_engine)
    async with engine.begin() as connection:
        await connection.run_sync(create_table)
    yield engine
    await engine.dispose()


def test_an_async_session(url: str, nudges: Recorder) -> None:
    async def main() -> None:
        async with open_async_engine(url) as engine, AsyncSession(engine) as session:
            await nudges.add_async(session)
            await nudges.add_async(session)
            await session.commit()
            assert nudges.delays == [0.0]
            assert nudges.count == 1
            savepoint = await session.begin_nested()
            await nudges.add_async(session)
            await savepoint.rollback()
            await session.commit()
            assert nudges.count == 0
            async with session.begin_nested():
                await nudges.add_async(session)
            assert nudges.count == 0
            await session.commit()
            assert nudges.count == 1
            await nudges.add_async(session)
            await session.rollback()
            await nudges.add_async(session)
        assert nudges.count == 0

    asyncio.run(main())


def test_an_async_connection(url: str, nudges: Recorder) -> None:
    async def main() -> None:
        async with open_async_engine(url) as engine:
            async with engine.begin() as connection:
                await nudges.add_async(connection)
                savepoint = await connection.begin_nested()
                await nudges.add_async(connection)
                await savepoint.rollback()
                assert nudges.count == 0
            assert nudges.delays == [CORE_DELAY]
            assert nudges.count == 1
            async with engine.connect() as connection:
                await nudges.add_async(connection)
            assert nudges.count == 0

    asyncio.run(main())


# -- processes -------------------------------------------------------------------------------------


def run(script: str) -> str:
    """What a Python program prints; it must end by itself, and well."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_short_script_has_its_nudges_sent() -> None:
    script = """
import atexit
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool
from celery_jetstream.nudge import Nudger, nudge_after_commit

rows = 0
nudger = Nudger(lambda: print(rows, flush=True), spacing=60)
atexit.register(nudger.close, 5)
engine = create_engine("sqlite://", poolclass=StaticPool)
atexit.register(engine.dispose)
for _ in range(50):
    rows += 1
    with engine.begin() as connection:
        nudge_after_commit(connection, nudger.nudge)
    with Session(engine) as session:
        session.connection()
        nudge_after_commit(session, nudger.nudge)
        session.commit()
"""
    assert run(script).split()[-1] == "50"


def test_a_child_begins_anew_whoever_held_the_lock() -> None:
    script = """
import os, signal, threading
from celery_jetstream.nudge import Nudger

started, release, reader_writer = threading.Event(), threading.Event(), os.pipe()

def flush():
    os.write(reader_writer[1], f"{os.getpid()} ".encode())
    started.set()
    if os.getpid() == parent:
        release.wait(10)

parent = os.getpid()
nudger = Nudger(flush)
nudger.nudge()
assert started.wait(10)
nudger.nudge()  # waits while the flush runs: the parent's, not the child's

def hold():
    with nudger._changed:
        held.set()
        release.wait(10)

held = threading.Event()
threading.Thread(target=hold).start()
assert held.wait(10)
child = os.fork()
if child == 0:
    signal.alarm(10)
    nudger.close(0) if nudger._due is not None else nudger.nudge()
    nudger.close(5)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
release.set()
nudger.close(5)
pids = os.read(reader_writer[0], 1000).decode().split()
assert pids == [str(parent), str(child), str(parent)], (pids, parent, child)
"""
    assert run(script) == ""


def test_the_thread_is_one_of_gevents_where_threads_are() -> None:
    pytest.importorskip("gevent")
    script = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent, time
from celery_jetstream.nudge import Nudger

flushed = []
nudger = Nudger(lambda: (gevent.sleep(0.01), flushed.append(1)), spacing=0)
for _ in range(3):
    nudger.nudge()
gevent.sleep(0.005)
nudger.nudge()
nudger.close(5)
assert 1 < len(flushed) < 4, flushed
"""
    assert run(script) == ""
