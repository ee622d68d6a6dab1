"""Nudges: one after a commit that shows the row, none after a rollback; flushes are gathered."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.pool import StaticPool

from celery_jetstream.nudge import CORE_DELAY, Nudger, nudge_after_commit
from celery_jetstream.testing import wait_until

INSERT = text("INSERT INTO events (parent) VALUES (:parent)")


class Recorder:
    """What is nudged; ``add(target)`` is what an outbox does."""

    def __init__(self) -> None:
        self.delays: list[float] = []

    def nudge(self, delay: float) -> None:
        self.delays.append(delay)

    def add(self, target: Any, parent: int | None = None) -> None:
        target.execute(INSERT, {"parent": parent})
        nudge_after_commit(target, self.nudge)

    @property
    def count(self) -> int:
        count = len(self.delays)
        self.delays.clear()
        return count


@pytest.fixture
def nudges() -> Recorder:
    return Recorder()


@pytest.fixture
def engine() -> Iterator[Engine]:
    """SQLite in memory, told to have real savepoints and deferred constraints."""
    engine = create_engine("sqlite://", poolclass=StaticPool)

    @event.listens_for(engine, "connect")
    def _connect(raw: Any, _: Any) -> None:
        raw.isolation_level = None
        raw.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE events (id INTEGER PRIMARY KEY,"
            " parent INTEGER REFERENCES events (id) DEFERRABLE INITIALLY DEFERRED)"
        )
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        yield connection


@pytest.fixture(params=["session", "connection"])
def target(request: pytest.FixtureRequest) -> Any:
    """A session, then a connection: what holds for both."""
    return request.getfixturevalue(request.param)


# -- after the commit ------------------------------------------------------------------------------


def test_a_commit_nudges_once_however_much_was_added(target: Any, nudges: Recorder) -> None:
    for _ in range(5):
        nudges.add(target)
    assert nudges.count == 0
    target.commit()
    assert nudges.count == 1
    target.commit()
    assert nudges.count == 0


def test_each_transaction_of_a_session_has_its_own_nudge(target: Any, nudges: Recorder) -> None:
    for _ in range(3):
        nudges.add(target)
        target.commit()
        assert nudges.count == 1
        nudges.add(target)
        target.rollback()
        target.execute(INSERT, {"parent": None})
        target.commit()
        assert nudges.count == 0


def test_the_delay_is_for_core_whose_event_comes_before_the_commit(
    session: Session, nudges: Recorder
) -> None:
    nudges.add(session)
    session.commit()
    connection = session.connection()
    nudges.add(connection)
    session.commit()
    assert nudges.delays == [0.0, CORE_DELAY]


def test_nothing_after_a_rollback_or_a_close(engine: Engine, nudges: Recorder) -> None:
    for target in (Session(engine), engine.connect()):
        nudges.add(target)
        target.rollback()
        nudges.add(target)
        target.close()
        with Session(engine) as session, session.begin():
            session.execute(INSERT, {"parent": None})
    assert nudges.count == 0


def test_a_close_within_a_savepoint(session: Session, nudges: Recorder) -> None:
    session.begin_nested()
    nudges.add(session)
    session.close()
    session.execute(INSERT, {"parent": None})
    session.commit()
    assert nudges.count == 0


def test_an_invalidated_session(session: Session, nudges: Recorder) -> None:
    nudges.add(session)
    session.invalidate()
    session.execute(text("SELECT 1"))
    session.commit()
    assert nudges.count == 0


def test_a_savepoint_that_is_rolled_back_takes_its_nudge_with_it(
    target: Any, nudges: Recorder
) -> None:
    savepoint = target.begin_nested()
    nudges.add(target)
    savepoint.rollback()
    target.commit()
    assert nudges.count == 0


def test_a_released_savepoint_waits_for_the_commit(target: Any, nudges: Recorder) -> None:
    with target.begin_nested():
        nudges.add(target)
    assert nudges.count == 0
    target.commit()
    assert nudges.count == 1


def test_a_released_savepoint_within_one_that_is_rolled_back(target: Any, nudges: Recorder) -> None:
    target.execute(text("SELECT 1"))
    outer = target.begin_nested()
    with target.begin_nested():
        nudges.add(target)
    outer.rollback()
    target.commit()
    assert nudges.count == 0


def test_two_released_savepoints(target: Any, nudges: Recorder) -> None:
    with target.begin_nested(), target.begin_nested():
        nudges.add(target)
    target.commit()
    assert nudges.count == 1


def test_a_row_outside_the_savepoint_that_is_rolled_back(target: Any, nudges: Recorder) -> None:
    nudges.add(target)
    savepoint = target.begin_nested()
    nudges.add(target)
    savepoint.rollback()
    target.commit()
    assert nudges.count == 1


def test_a_row_beside_the_savepoint_that_is_rolled_back(target: Any, nudges: Recorder) -> None:
    savepoint = target.begin_nested()
    nudges.add(target)
    savepoint.rollback()
    with target.begin_nested():
        nudges.add(target)
    target.commit()
    assert nudges.count == 1


def test_a_commit_with_open_savepoints(target: Any, nudges: Recorder) -> None:
    target.begin_nested()
    nudges.add(target)
    target.begin_nested()
    nudges.add(target)
    target.commit()
    assert nudges.count == 1


def test_a_rollback_with_open_savepoints(target: Any, nudges: Recorder) -> None:
    target.begin_nested()
    nudges.add(target)
    target.begin_nested()
    nudges.add(target)
    target.rollback()
    target.commit()
    assert nudges.count == 0


def test_an_outer_savepoint_that_ends_with_the_inner_open(
    session: Session, nudges: Recorder
) -> None:
    for end, count in (("commit", 1), ("rollback", 0)):
        outer = session.begin_nested()
        session.begin_nested()
        nudges.add(session)
        getattr(outer, end)()
        session.commit()
        assert nudges.count == count


def test_a_commit_that_fails(session: Session, nudges: Recorder) -> None:
    nudges.add(session, parent=999)
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()
    session.commit()
    assert nudges.count == 0


def test_a_core_commit_that_fails_is_a_nudge_too_many_and_no_more(
    connection: Connection, nudges: Recorder
) -> None:
    nudges.add(connection, parent=999)
    with pytest.raises(IntegrityError):
        connection.commit()
    connection.rollback()
    connection.commit()
    assert nudges.count <= 1


def test_an_error_that_rolls_a_savepoint_back(session: Session, nudges: Recorder) -> None:
    twice = text("INSERT INTO events (id) VALUES (7)")
    nudges.add(session)
    session.execute(twice)
    with contextlib.suppress(IntegrityError), session.begin_nested():
        nudges.add(session)
        session.execute(twice)
    session.commit()
    assert nudges.count == 1


def test_context_managers(engine: Engine, nudges: Recorder) -> None:
    for make in (sessionmaker(engine).begin, engine.begin):
        with make() as target:
            nudges.add(target)
            assert not nudges.delays
        assert nudges.count == 1
        with contextlib.suppress(ZeroDivisionError), make() as target:
            nudges.add(target)
            raise ZeroDivisionError
        assert nudges.count == 0


def test_a_savepoint_within_a_flush(session: Session, nudges: Recorder) -> None:
    """SQLAlchemy has a transaction of its own around a flush: the savepoint's parent."""

    class Base(DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "events"
        id: Mapped[int] = mapped_column(primary_key=True)

    @event.listens_for(session, "after_flush")
    def _after_flush(*_: Any) -> None:
        with session.begin_nested():
            nudges.add(session)

    for end, count in (("commit", 1), ("rollback", 0)):
        savepoint = session.begin_nested()
        session.add(Row())
        session.flush()
        getattr(savepoint, end)()
        assert nudges.count == 0
        session.commit()
        assert nudges.count == count


def test_a_mark_before_the_transaction_has_begun(session: Session, nudges: Recorder) -> None:
    nudge_after_commit(session, nudges.nudge)
    session.execute(INSERT, {"parent": None})
    session.commit()
    assert nudges.count == 1


def test_two_apps_in_one_transaction(target: Any, nudges: Recorder) -> None:
    other = Recorder()
    nudges.add(target)
    other.add(target)
    target.commit()
    assert (nudges.count, other.count) == (1, 1)


def test_a_nudge_that_raises_does_not_reach_the_commit(
    target: Any, nudges: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(delay: float) -> None:
        raise RuntimeError("broken")

    nudges.add(target)
    nudge_after_commit(target, broken)
    target.commit()
    assert nudges.count == 1
    assert "nudge failed" in caplog.text


def test_a_scoped_session(engine: Engine, nudges: Recorder) -> None:
    registry = scoped_session(sessionmaker(engine))
    nudges.add(registry)
    registry.commit()
    assert nudges.count == 1
    registry.remove()


def test_a_subclass_of_session(engine: Engine, nudges: Recorder) -> None:
    class Late(Session):
        """Made after the listeners were."""

    with Late(engine) as session, session.begin():
        nudges.add(session)
    assert nudges.count == 1


def test_something_else_is_refused(engine: Engine, nudges: Recorder) -> None:
    with pytest.raises(TypeError, match="sync_session"):
        nudge_after_commit(engine, nudges.nudge)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["create_savepoint", "rollback_only", "conditional_savepoint"])
def test_a_session_that_joined_a_transaction_waits_for_that(
    engine: Engine, nudges: Recorder, mode: Any
) -> None:
    for end, count in (("commit", 1), ("rollback", 0)):
        with engine.connect() as connection:
            outer = connection.begin()
            with Session(connection, join_transaction_mode=mode) as session:
                nudges.add(session)
                session.commit()
                nudges.add(session)
                session.commit()
            assert nudges.count == 0
            getattr(outer, end)()
            assert nudges.count == count


def test_a_session_that_joined_a_savepoint(engine: Engine, nudges: Recorder) -> None:
    with engine.begin() as connection:
        savepoint = connection.begin_nested()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            nudges.add(session)
            session.commit()
        savepoint.rollback()
    assert nudges.count == 0


def test_a_session_that_controls_the_transaction_it_joined(
    engine: Engine, nudges: Recorder
) -> None:
    with engine.connect() as connection:
        connection.begin()
        with Session(connection, join_transaction_mode="control_fully") as session:
            nudges.add(session)
            session.commit()
            assert nudges.count == 1


@pytest.mark.parametrize("how", ["connection", "engine", "created"])
def test_autocommit_has_no_commit_to_wait_for(nudges: Recorder, how: str) -> None:
    level = {"isolation_level": "AUTOCOMMIT"}
    engine = create_engine("sqlite://", poolclass=StaticPool, **(level if how == "created" else {}))
    used = engine.execution_options(**level) if how == "engine" else engine
    with used.connect() as connection:
        if how == "connection":
            connection.execution_options(**level)
        connection.exec_driver_sql("CREATE TABLE events (parent INTEGER)")
        nudges.add(connection)
        nudges.add(connection)
    assert nudges.delays == [CORE_DELAY, CORE_DELAY]
    engine.dispose()


def test_a_connection_returned_without_an_end_leaves_no_mark(
    engine: Engine, nudges: Recorder
) -> None:
    for _ in range(3):
        connection = engine.connect()
        nudges.add(connection)
        connection.close()
        with engine.begin() as connection:
            connection.execute(INSERT, {"parent": None})
    assert nudges.count == 0


def test_sessions_and_connections_are_not_kept(engine: Engine, nudges: Recorder) -> None:
    session = Session(engine)
    session.begin_nested()
    nudges.add(session)
    connection = engine.connect()
    nudge_after_commit(connection, nudges.nudge)
    left = [weakref.ref(session), weakref.ref(connection)]
    del session, connection
    gc.collect()
    assert [ref() for ref in left] == [None, None]


# -- off the caller's thread -----------------------------------------------------------------------


class Flush:
    """Notes when it is called; waits where ``gate`` is closed, and raises ``error``."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.before: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        self.before()
        self.starts.append(time.monotonic())
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error

    @property
    def count(self) -> int:
        return len(self.starts)

    def wait(self, count: int) -> None:
        wait_until(lambda: self.count >= count, 5, f"flush {count}")


@pytest.fixture
def flush() -> Flush:
    return Flush()


@pytest.fixture
def make(flush: Flush) -> Iterator[Callable[..., Nudger]]:
    made: list[Nudger] = []

    def make(**options: Any) -> Nudger:
        made.append(Nudger(flush, **options))
        return made[-1]

    yield make
    flush.gate.set()
    for nudger in made:
        nudger.close(5)
        assert nudger._thread is None


def alive(nudger: Nudger) -> bool:
    return nudger._thread is not None


def test_no_thread_until_it_is_nudged(make: Callable[..., Nudger], flush: Flush) -> None:
    nudger = make()
    assert not alive(nudger)
    nudger.nudge()
    flush.wait(1)
    (thread,) = (t for t in threading.enumerate() if t.name == "celery-jetstream-nudge")
    assert thread.daemon


def test_nudges_while_a_flush_runs_are_one_more(make: Callable[..., Nudger], flush: Flush) -> None:
    nudger = make(spacing=0)
    flush.gate.clear()
    nudger.nudge()
    flush.wait(1)
    for _ in range(1000):
        nudger.nudge()
    flush.gate.set()
    flush.wait(2)
    nudger.close(5)
    assert flush.count == 2


def test_nudges_soon_after_a_flush_are_one_more(make: Callable[..., Nudger], flush: Flush) -> None:
    nudger = make(spacing=0.05)
    nudger.nudge()
    flush.wait(1)
    for _ in range(100):
        nudger.nudge()
    flush.wait(2)
    nudger.close(5)
    assert flush.count == 2
    assert flush.starts[1] - flush.starts[0] >= 0.045


def test_a_delay_is_kept_to(make: Callable[..., Nudger], flush: Flush) -> None:
    nudger = make()
    start = time.monotonic()
    nudger.nudge(0.03)
    flush.wait(1)
    assert flush.starts[0] - start >= 0.03


def test_what_is_late_has_a_flush_after_what_is_now(
    make: Callable[..., Nudger], flush: Flush
) -> None:
    nudger = make(spacing=0)
    start = time.monotonic()
    nudger.nudge(0.06)
    nudger.nudge()
    flush.wait(2)
    nudger.close(5)
    assert flush.count == 2
    assert flush.starts[1] - start >= 0.06


def test_no_row_is_left_behind(make: Callable[..., Nudger], flush: Flush) -> None:
    """Each row was there when a flush began, whichever thread wrote it."""
    rows: list[int] = []
    seen: list[int] = [0]
    flush.before = lambda: seen.append(len(rows))
    nudger = make(spacing=0.001)

    def write() -> None:
        for row in range(200):
            rows.append(row)
            nudger.nudge()

    writers = [threading.Thread(target=write) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    wait_until(lambda: seen[-1] == 1600, 5, "the last row")


def test_a_failure_is_told_once_and_tried_again(
    make: Callable[..., Nudger], flush: Flush, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "celery_jetstream.nudge")
    nudger = make(spacing=0, backoff=(0.01, 10))
    flush.error = OSError("the server is away")
    nudger.nudge()
    flush.wait(4)
    flush.error = None
    wait_until(lambda: len(caplog.records) == 2, 5, "the good news")
    first, second = caplog.records
    assert (first.levelname, first.exc_info) == ("WARNING", None)
    assert "OSError: the server is away" in first.getMessage()
    assert "works again" in second.getMessage()
    gaps = [b - a for a, b in zip(flush.starts, flush.starts[1:], strict=False)]
    assert all(gap >= 0.005 * 2**i for i, gap in enumerate(gaps))


def test_with_the_longest_pause_it_waits_for_a_nudge(
    make: Callable[..., Nudger], flush: Flush
) -> None:
    nudger = make(spacing=0, backoff=(0.01, 0.01), idle=0.03)
    flush.error = OSError("the server is away")
    nudger.nudge()
    wait_until(lambda: flush.count and not alive(nudger), 5, "the thread to end")
    assert flush.count == 1
    flush.error = None
    nudger.nudge()
    flush.wait(2)


def test_nudges_in_a_pause_are_one(make: Callable[..., Nudger], flush: Flush) -> None:
    nudger = make(spacing=0, backoff=(0.05, 0.05))
    flush.error = OSError("the server is away")
    nudger.nudge()
    flush.wait(1)
    flush.error = None
    wait_until(lambda: nudger._failures, 5, "the failure")
    for _ in range(100):
        nudger.nudge()
    assert flush.count == 1
    flush.wait(2)
    wait_until(lambda: not nudger._failures, 5, "the success")
    nudger.close(5)
    assert flush.count == 2
    assert flush.starts[1] - flush.starts[0] >= 0.025


def test_close_flushes_what_waits(make: Callable[..., Nudger], flush: Flush) -> None:
    nudger = make(spacing=60)
    nudger.nudge()
    flush.wait(1)
    nudger.nudge()
    nudger.nudge(0.02)
    nudger.close(5)
    assert (flush.count, alive(nudger)) == (2, False)


def test_close_does_not_wait_for_a_flush_that_hangs(
    make: Callable[..., Nudger], flush: Flush
) -> None:
    nudger = make()
    flush.gate.clear()
    nudger.nudge()
    flush.wait(1)
    start = time.monotonic()
    nudger.close(0.02)
    assert 0.015 <= time.monotonic() - start < 2
    assert alive(nudger)


def test_close_does_not_try_what_failed(make: Callable[..., Nudger], flush: Flush) -> None:
    nudger = make(backoff=(60, 60))
    flush.error = OSError("the server is away")
    nudger.nudge()
    wait_until(lambda: nudger._failures, 5, "the failure")
    nudger.nudge()
    nudger.close(5)
    assert (flush.count, alive(nudger)) == (1, False)


def test_closed_it_does_nothing(make: Callable[..., Nudger], flush: Flush) -> None:
    nudger = make()
    nudger.close()
    nudger.nudge()
    nudger.close()
    assert (flush.count, alive(nudger)) == (0, False)


def test_closed_by_its_own_flush(make: Callable[..., Nudger], flush: Flush) -> None:
    nudger = make()
    flush.before = lambda: nudger.close(5)
    nudger.nudge()
    wait_until(lambda: flush.count and not alive(nudger), 2, "the thread to end")


def test_an_idle_thread_ends_and_another_begins(make: Callable[..., Nudger], flush: Flush) -> None:
    nudger = make(spacing=0, idle=0.01)
    for count in (1, 2):
        nudger.nudge()
        flush.wait(count)
        wait_until(lambda: not alive(nudger), 5, "the thread to end")


def test_a_thread_that_cannot_begin(
    make: Callable[..., Nudger],
    flush: Flush,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nudger = make()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        nudger.nudge()
        nudger.nudge()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    nudger.nudge()
    flush.wait(1)


def test_a_signal_handler_may_nudge(make: Callable[..., Nudger], flush: Flush) -> None:
    nudger = make()
    with nudger._changed:  # where the signal came
        nudger.nudge()
    flush.wait(1)
