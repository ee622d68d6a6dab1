"""The flush when something is away: no row pays for it, and afterwards everything flows."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError

from celery_jetstream import flusher, signals
from celery_jetstream.exceptions import OutboxUnavailableError
from celery_jetstream.models import AT_ONCE
from celery_jetstream.outbox_filter import Filter
from tests.conftest import Names
from tests.databases import Database
from tests.flushing import Flushing, Responder, Threads, in_order, statements
from tests.servers import MariaServer, NatsServer, PostgresServer, need, wait_until

Make = Callable[..., Flushing]

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
def make(make_flushing: Make) -> Make:
    """``make(url, **settings)``: an outbox, ready; without a URL on the shared server."""
    return make_flushing


def flows(flushing: Flushing, count: int, *, stream: str = "") -> None:
    """Flushes until all is sent, and in the stream."""

    def flush() -> bool:
        flushing.drain()
        return flushing.count("sent") == count

    wait_until(flush, 20, f"{count} rows to be sent")
    stored = flushing.stored() + (flushing.stored(stream) if stream else [])
    in_order(stored, flushing.rows())


# ── NATS ──────────────────────────────────────────────────────────────────────


@on_sqlite
def test_ten_minutes_of_ticks_without_nats_change_no_row(
    make: Make, own_server: NatsServer, quick: None
) -> None:
    """120 ticks, one every 5 s, and all waiting a hundredth of that."""
    flushing = make(own_server.url, jetstream_outbox_max_attempts=1, jetstream_outbox_max_age=0)
    flushing.fill(500, keys=20)
    flushing.write("k", delay=0.001)
    before = flushing.rows()
    own_server.kill()
    results, tried = [], 0
    for _ in range(120):
        with statements(flushing.engine) as seen:
            results.append(flushing.drain())
        tried += bool(seen)
        end = time.monotonic() + 0.005
        wait_until(lambda end=end: time.monotonic() >= end, 1, "the next tick")
    assert flushing.rows() == before
    assert flushing.leases() == set()
    assert flushing.holds() == []
    assert all(result.outage and not result.sent for result in results)
    assert max(result.seconds for result in results) < 1
    assert tried < 100  # the breaker asks less and less often
    own_server.start()
    wait_until(lambda: flushing.jetstream.connection.connected, 10, "the connection")
    wait_until(lambda: flushing.flusher.breaker.error("") is None, 5, "the breaker to be told")
    assert flushing.drain().sent == 501
    in_order(flushing.stored(), flushing.rows())


@on_sqlite
def test_a_server_that_hangs_costs_no_row_an_attempt(
    make: Make, own_server: NatsServer, quick: None
) -> None:
    flushing = make(own_server.url)
    flushing.fill(3000, keys=20)
    before = flushing.rows()
    own_server.pause()
    results = [flushing.drain(5) for _ in range(5)]
    assert flushing.rows() == before
    assert all(result.outage for result in results), results
    assert flushing.leases() == set()
    own_server.resume()
    flows(flushing, 3000)
    assert {row.attempts for row in flushing.rows()} == {0}


@on_sqlite
def test_nats_dies_in_the_middle_of_a_flush(
    make: Make, own_server: NatsServer, quick: None
) -> None:
    flushing = make(own_server.url, jetstream_outbox_batch_size=50)
    flushing.fill(2000, keys=20)
    seen = []

    def kill(rows: Any, **_: Any) -> None:
        seen.append(len(rows))
        if len(seen) == 5:
            own_server.kill()

    signals.outbox_claimed.connect(kill)
    result = flushing.drain()
    signals.outbox_claimed.disconnect(kill)
    assert result.outage
    assert 200 <= result.sent < 2000
    assert flushing.count("pending") == 2000 - result.sent
    own_server.start()
    flows(flushing, 2000)


@on_sqlite
def test_a_stream_that_is_gone_is_made_anew(make: Make, quick: None) -> None:
    flushing = make()
    flushing.fill(30, keys=3)
    flushing.api(f"STREAM.DELETE.{flushing.stream}")
    assert flushing.drain(1).failed == 0

    def flush() -> bool:
        return flushing.drain(1).sent + flushing.count("sent") >= 30

    wait_until(flush, 10, "the stream to be made, and the rows to be sent")
    assert flushing.api(f"STREAM.INFO.{flushing.stream}")["state"]["messages"] == 30


@on_sqlite
def test_without_a_stream_rows_wait_and_fail_after_the_grace(make: Make, quick: None) -> None:
    flushing = make(jetstream_outbox_no_stream_grace=1)
    flushing.write(*"aab", None, subject=flushing.other)
    result = flushing.drain()
    assert (result.failed, result.sent) == (0, 0)
    assert "no stream" in (result.outage or "")
    assert {row.status for row in flushing.rows()} == {"pending"}
    wait_until(lambda: flushing.drain().failed or flushing.count("failed"), 10, "the grace")
    failing = min(row.failing_since for row in flushing.rows() if row.failing_since)
    failed = [row for row in flushing.rows() if row.status == "failed"]
    assert all(row.finished_at - failing > timedelta(seconds=0.9) for row in failed)
    flushing.make_stream(f"{flushing.stream}-other", flushing.other)
    flushing.outbox.retry(Filter())
    flows(flushing, 4, stream=f"{flushing.stream}-other")


@on_sqlite
def test_without_auto_provision_rows_wait_for_a_stream_for_as_long_as_it_takes(
    make: Make, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    """JetStream is not asked, so nothing tells a stream that is missing from an election."""
    flushing = make(jetstream_auto_provision=False, jetstream_outbox_no_stream_grace=0)
    flushing.write(*"aab", None)
    config = flushing.api(f"STREAM.INFO.{flushing.stream}")["config"]
    flushing.api(f"STREAM.DELETE.{flushing.stream}")
    tries = flushing.flusher.breaker
    for _ in range(3):
        assert "jetstream provision" in (flushing.drain().outage or "")
        wait_until(lambda: tries.is_trying(flushing.subject), 5, "the pause to be over")
    assert {(row.status, row.attempts) for row in flushing.rows()} == {("pending", 0)}
    (said,) = [line for line in caplog.messages if "jetstream_auto_provision is off" in line]
    assert flushing.stream in said
    assert "jetstream provision" in said
    flushing.api(f"STREAM.CREATE.{flushing.stream}", **config)
    flows(flushing, 4)


@on_sqlite
def test_a_subject_that_comes_back_keeps_its_keys_in_order(make: Make, quick: None) -> None:
    """After an outage one row is tried; what the sweep has passed over waits for the next."""
    flushing = make(jetstream_outbox_batch_size=100)
    flushing.fill(3000, keys=300, subject=flushing.other)
    flushing.fill(500, keys=10)
    flushing.drain()
    assert flushing.count("sent") == 500
    tries = flushing.flusher.breaker
    for _ in range(3):
        wait_until(lambda: tries.is_trying(flushing.other), 5, "the pause to be over")
        assert flushing.drain().retried <= 2  # one, and one read before it was known to fail
    flushing.fill(500, keys=300, subject=flushing.other)
    flushing.make_stream(f"{flushing.stream}-other", flushing.other)
    flows(flushing, 4000, stream=f"{flushing.stream}-other")


@pytest.mark.parametrize(("why", "stuck_first"), [("no stream", False), ("full", True)])
@on_sqlite
def test_a_subject_that_is_stuck_stops_no_other(
    make: Make, stuck_first: bool, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    flushing = make(jetstream_outbox_no_stream_grace=3600)
    if why == "full":
        limits = {"max_msgs": 1, "discard": "new"}
        flushing.make_stream(f"{flushing.stream}-full", flushing.other, **limits)
        flushing.write("z", subject=flushing.other)
        assert flushing.drain().sent == 1
    sent = flushing.count("sent")

    def fill_stuck() -> None:
        flushing.fill(10_000, keys=5000, subject=flushing.other)

    if stuck_first:
        fill_stuck()
    flushing.fill(2000, keys=10)
    if not stuck_first:
        fill_stuck()
    start = time.monotonic()
    result = flushing.drain()
    assert result.sent == 2000  # in the first flush, whatever is in front
    assert result.outage
    assert time.monotonic() - start < 10
    assert flushing.statuses().keys() - set(flushing.stored()) >= {"5000"}
    # what is stuck is left alone then: few reads for a lone event behind it
    flushing.flusher.breaker.fail(flushing.other, "stuck")
    flushing.fill(1)
    with statements(flushing.engine) as seen:
        assert flushing.drain().sent == 1
    assert len(seen) <= 8  # none for its keys, whose time has come meanwhile
    assert flushing.count("sent") == sent + 2001
    assert flushing.count("failed") == flushing.count("exception") == 0


@on_sqlite
def test_a_sweep_that_has_only_found_a_subject_stuck_is_followed_by_another(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow machine a sweep's time is over before it has come to the others."""
    monkeypatch.setattr(flusher, "SWEEP", 0.0)
    flushing = make(jetstream_outbox_batch_size=100)
    limits = {"max_msgs": 1, "discard": "new"}
    flushing.make_stream(f"{flushing.stream}-full", flushing.other, **limits)
    flushing.write("z", subject=flushing.other)
    assert flushing.drain().sent == 1
    flushing.fill(1000, keys=500, subject=flushing.other)
    flushing.fill(50, keys=10)
    result = flushing.drain()
    assert result.sent == 50
    assert result.outage


@on_sqlite
def test_a_stream_that_is_full_has_its_rows_wait(make: Make, quick: None) -> None:
    flushing = make()
    flushing.update_stream(max_msgs=10, discard="new")
    flushing.fill(50, keys=3)
    result = flushing.drain()
    assert result.sent == 10
    assert "maximum" in (result.outage or "")
    assert {row.attempts for row in flushing.rows()} == {0}
    flushing.update_stream(max_msgs=-1)
    flows(flushing, 50)


@on_sqlite
def test_after_an_outage_one_row_is_tried_first(make: Make, quick: None) -> None:
    flushing = make()
    flushing.fill(500)
    flushing.flusher.breaker.fail("", "an outage")
    wait_until(lambda: flushing.flusher.breaker.is_trying(""), 1, "the pause to be over")
    sizes = []

    def count(rows: Any, **_: Any) -> None:
        sizes.append(len(rows))

    signals.outbox_claimed.connect(count)
    assert flushing.drain().sent == 500
    signals.outbox_claimed.disconnect(count)
    assert sizes[0] == 1
    assert max(sizes) > 100


@on_sqlite
def test_a_stream_that_does_not_answer_stops_no_other(make: Make, quick: None) -> None:
    """It looks as if the whole server hung; so another subject is asked next."""
    flushing = make(jetstream_outbox_batch_size=100)
    Responder(flushing).answers = dict.fromkeys(map(str, range(1, 501)))
    flushing.fill(500, subject=flushing.other)
    flushing.fill(500)
    everything = flushing.flusher.breaker
    first = flushing.drain()
    assert first.outage
    wait_until(lambda: everything.is_trying("") and everything.is_trying(flushing.other), 5, "both")
    assert first.sent + flushing.drain().sent == 500
    assert {row.attempts for row in flushing.rows()} == {0}


# ── the database ──────────────────────────────────────────────────────────────

SERVERS = {"postgresql": PostgresServer, "mariadb": MariaServer}


@pytest.mark.parametrize("kind", SERVERS)
def test_the_database_dies_in_the_middle_of_a_flush(
    nats_server: NatsServer, names: Names, kind: str
) -> None:
    need(kind)
    with SERVERS[kind](fsync=False) as server:
        server.create_database("shop")
        database = Database(kind, server.url("shop"))
        flushing = Flushing(
            nats_server.url,
            database,
            names,
            jetstream_outbox_batch_size=50,
            jetstream_outbox_lease=1,
        ).prepare()
        flushing.fill(1000, keys=20)
        batches = []

        def kill(**_: Any) -> None:
            batches.append(1)
            if len(batches) == 4:
                server.kill()

        signals.outbox_published.connect(kill)
        with pytest.raises(OutboxUnavailableError):
            flushing.drain()
        signals.outbox_published.disconnect(kill)
        with pytest.raises(OutboxUnavailableError):
            flushing.drain()
        server.start()
        flows(flushing, 1000)
        flushing.close()


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_database_that_became_a_standby_is_an_outage(make: Make, database: Database) -> None:
    flushing = make()
    flushing.fill(10)
    flushing.sql("ALTER ROLE CURRENT_USER SET default_transaction_read_only = on")
    flushing.engine.dispose()
    with pytest.raises(OutboxUnavailableError, match="read-only"):
        flushing.drain()
    engine = create_engine(database.url)
    with engine.begin() as connection:
        connection.execute(text("SET TRANSACTION READ WRITE"))
        connection.execute(text("ALTER ROLE CURRENT_USER RESET default_transaction_read_only"))
    engine.dispose()
    flushing.engine.dispose()
    flows(flushing, 10)


@on_sqlite
def test_a_locked_sqlite_is_waited_for(make: Make, database: Database) -> None:
    flushing = make(jetstream_outbox_batch_size=100)
    flushing.fill(1000)
    locked, free = threading.Event(), threading.Event()

    def lock() -> None:
        path = database.url.removeprefix("sqlite+pysqlite:///")
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        locked.set()
        free.wait(1)
        connection.execute("COMMIT")
        connection.close()

    def flush() -> None:
        locked.wait(5)
        assert flushing.drain().sent == 1000

    start = time.monotonic()
    with Threads(lock, flush):
        pass
    assert time.monotonic() - start >= 1
    in_order(flushing.stored(), flushing.rows())


@pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
def test_what_loses_against_another_transaction_is_done_again(make: Make) -> None:
    """A real deadlock, over two rows, in which one of the two is chosen to lose."""
    flushing = make()
    flushing.fill(2)
    both, losses = threading.Barrier(2, timeout=10), []

    def work(first: str, second: str) -> None:
        met: list[int] = []

        def change(connection: Connection) -> None:
            connection.execute(touch, {"id": first})
            if not met:
                met.append(both.wait())
            else:
                losses.append(first)
            connection.execute(touch, {"id": second})

        flushing.outbox.database.transaction(change)

    touch = text("UPDATE jetstream_outbox SET last_error = 'x' WHERE event_id = :id")
    with Threads(lambda: work("1", "2"), lambda: work("2", "1")):
        pass
    assert len(losses) == 1


def test_a_conflict_that_does_not_end_is_an_outage(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushing = make()
    flushing.fill(5)
    conflict = sqlite3.OperationalError("database is locked")

    def fail(*_: Any, **__: Any) -> None:
        raise DBAPIError("UPDATE", {}, conflict)

    monkeypatch.setattr("celery_jetstream.database.TRIES", 2)
    with monkeypatch.context() as patch:
        patch.setattr(flushing.flusher.rows, "sent", fail)
        with pytest.raises(OutboxUnavailableError):
            flushing.drain()
    assert flushing.leases() == set()
    assert flushing.drain().duplicates == 5
    assert {row.due_at for row in flushing.rows()} == {AT_ONCE}
