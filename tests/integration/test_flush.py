"""The flush: every row into the stream once, in order for each key, whatever a row is like."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, func, select, update

from celery_jetstream import breaker, recorder, signals
from celery_jetstream.models import PARKED, bucket_of
from celery_jetstream.outbox_filter import Filter
from celery_jetstream.sqltypes import db_now
from tests.conftest import Names
from tests.flushing import Flushing, Responder, Threads, in_order, statements
from tests.servers import RedisServer, wait_until
from tests.stack import WORKER, CeleryProcess

Make = Callable[..., Flushing]

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("database", ["postgresql"], indirect=True)


@pytest.fixture
def make(make_flushing: Make) -> Make:
    """``make(**settings)``: an outbox in each of the databases, ready."""
    return make_flushing


@pytest.fixture
def flushing(make: Make) -> Flushing:
    return make()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again after 100 ms."""
    monkeypatch.setattr(recorder, "backoff", lambda *_: timedelta(seconds=0.1))


def cases(names: Iterable[str], *everywhere: str) -> Any:
    """Each case in SQLite, where databases make no difference; some in the others, too."""
    found = [(name, "sqlite") for name in names]
    found += [(name, kind) for name in everywhere for kind in ("postgresql", "mariadb")]
    return found


@pytest.fixture
def on() -> Iterator[Callable[..., None]]:
    """``on(signal, receiver)``, until the test ends."""
    connected: list[tuple[Any, Any]] = []

    def connect(signal: Any, receiver: Callable[..., None]) -> None:
        def receive(**arguments: Any) -> None:
            receiver(**arguments)

        signal.connect(receive, weak=False)
        connected.append((signal, receive))

    yield connect
    for signal, receive in connected:
        signal.disconnect(receive)


def refusal(err_code: int, code: int = 400, description: str = "no") -> bytes:
    error = {"code": code, "err_code": err_code, "description": description}
    return json.dumps({"error": error}).encode()


def drained(flushing: Flushing, *left: str) -> None:
    """Flushes until nothing is pending but what is expected to be left."""

    def flush() -> bool:
        flushing.drain()
        pending = {row.event_id for row in flushing.rows() if row.status == "pending"}
        return pending == set(left)

    wait_until(flush, 10, "the outbox to be empty")


# ── all of it ─────────────────────────────────────────────────────────────────


def test_a_flush_sends_each_row_once_and_the_rows_of_a_key_in_order(flushing: Flushing) -> None:
    flushing.fill(1300, keys=40)
    flushing.fill(200, keys=0)
    result = flushing.drain()
    assert (result.sent, result.duplicates, result.left, result.failed) == (1500, 0, 0, 0)
    assert (result.outage, result.busy, result.more) == (None, False, False)
    in_order(flushing.stored(), flushing.rows())
    rows = flushing.rows()
    assert {row.status for row in rows} == {"sent"}
    assert all(row.finished_at >= row.created_at and row.attempts == 0 for row in rows)
    assert flushing.leases() == set()
    assert flushing.drain().sent == 0


@on_sqlite
@pytest.mark.parametrize("size", [1, 7])
def test_a_batch_may_be_small(make: Make, size: int) -> None:
    flushing = make(jetstream_outbox_batch_size=size)
    flushing.fill(60, keys=5)
    assert flushing.drain().sent == 60
    in_order(flushing.stored(), flushing.rows())


def test_the_bytes_and_headers_are_those_that_were_written(flushing: Flushing) -> None:
    flushing.write("k", headers={"x-tenant": "Ää"}, payload={"text": "東京"})
    (row,) = flushing.rows()
    flushing.drain()
    (message,) = flushing.messages()
    assert message.data == bytes(row.body)
    assert (message.headers or {})["x-tenant"] == "Ää"


def test_what_is_sent_need_not_be_kept(make: Make) -> None:
    flushing = make(jetstream_outbox_retention=0)
    flushing.fill(100)
    flushing.write("x", start=500, payload=1, subject=flushing.other)
    assert flushing.drain().sent == 100
    assert [row.event_id for row in flushing.rows()] == ["500"]  # no stream takes it


@on_sqlite
def test_a_flush_ends_when_its_time_is_over(make: Make) -> None:
    flushing = make(jetstream_outbox_batch_size=10)
    flushing.fill(20_000, keys=0)
    result = flushing.drain(0.2)
    assert result.more
    assert 0 < result.sent < 20_000
    assert result.seconds < 2
    assert flushing.count("sent") == result.sent
    assert flushing.leases() == set()


@on_sqlite
def test_a_flush_ends_when_it_is_told(make: Make) -> None:
    flushing = make(jetstream_outbox_batch_size=10)
    flushing.fill(500)
    asked: list[None] = []
    result = flushing.outbox.drain(stop=lambda: asked.append(None) or len(asked) > 8)  # type: ignore[func-returns-value]
    assert result.more
    assert 0 < result.sent < 500
    assert flushing.count("sent") == result.sent
    assert flushing.drain().sent == 500 - result.sent
    in_order(flushing.stored(), flushing.rows())


def test_a_later_row_goes_when_its_time_has_come_and_blocks_nobody(flushing: Flushing) -> None:
    flushing.write("k", delay=0.4)
    flushing.write("k", "other")
    flushing.write("k", delay=3600)
    assert flushing.drain().sent == 2
    assert flushing.stored() == ["2", "3"]
    wait_until(lambda: flushing.drain().sent, 5, "the delay to be over")
    assert flushing.stored() == ["2", "3", "1"]
    assert flushing.row("4").status == "pending"
    assert flushing.drain().more is False


# ── many at once ──────────────────────────────────────────────────────────────


@pytest.mark.timeout(120)
def test_four_flushers_and_pruning_at_once_while_events_are_written(make: Make) -> None:
    first = make(jetstream_outbox_batch_size=100)
    others = [make(jetstream_outbox_batch_size=100) for _ in range(3)]
    count, written = 2000, threading.Event()
    sent: list[int] = []
    deleted: list[int] = []

    def write() -> None:
        try:
            for _ in range(count // 50):
                first.fill(50, keys=17)
        finally:
            written.set()

    def flush(flushing: Flushing) -> None:
        while not written.is_set() or first_left():
            sent.append(flushing.drain(0.2).sent)

    def first_left() -> int:
        return int(first.sql("SELECT count(*) FROM jetstream_outbox WHERE status='pending'")[0][0])

    def prune() -> None:
        while not written.is_set():
            deleted.append(first.outbox.prune(0, max_seconds=0.2))

    start = time.perf_counter()
    with Threads(write, prune, *(lambda one=one: flush(one) for one in (first, *others))):
        pass
    took = time.perf_counter() - start
    print(f"{first.kind}: {count / took:.0f} rows/s, {sum(deleted)} pruned meanwhile")
    assert sum(sent) == count
    stored = [int(event_id) for event_id in first.stored()]
    assert len(stored) == len(set(stored)) == count
    for key in range(17):
        numbers = [number for number in stored if number % 17 == key]
        assert numbers == sorted(numbers)
    assert len(first.rows()) == count - sum(deleted)
    assert {row.status for row in first.rows()} <= {"sent"}
    assert first.leases() == set()


@on_sqlite
def test_who_finds_all_of_it_taken_says_so(flushing: Flushing) -> None:
    flushing.fill(10)
    flushing.lease("another", db_now(60))
    result = flushing.drain()
    assert (result.sent, result.busy, result.more) == (0, True, True)
    assert flushing.leases() == {"another"}


@on_sqlite
def test_who_finds_a_part_of_it_taken_sends_the_rest(flushing: Flushing) -> None:
    flushing.fill(300)
    taken = range(20)
    flushing.lease("another", db_now(60), taken)
    result = flushing.drain()
    theirs = {row.event_id for row in flushing.rows() if row.bucket in taken}
    assert theirs
    assert result.sent == 300 - len(theirs)
    assert result.busy
    assert set(flushing.stored()).isdisjoint(theirs)


# ── leases ────────────────────────────────────────────────────────────────────


def test_the_rows_of_a_flusher_that_died_wait_for_its_lease(flushing: Flushing) -> None:
    flushing.fill(50)
    start = time.monotonic()
    flushing.lease("dead", db_now(0.5))
    assert flushing.drain().busy
    assert flushing.stored() == []
    wait_until(lambda: flushing.drain().sent == 50, 10, "the lease to end")
    assert time.monotonic() - start >= 0.5
    in_order(flushing.stored(), flushing.rows())


def test_a_table_without_its_leases_is_completed(flushing: Flushing) -> None:
    flushing.fill(50)
    flushing.sql("DELETE FROM jetstream_outbox_buckets")
    assert flushing.drain().sent == 50


@pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
def test_a_lease_is_renewed_while_a_flush_goes_on(make: Make, on: Callable[..., None]) -> None:
    flushing = make(jetstream_outbox_batch_size=4, jetstream_outbox_lease=1)
    flushing.fill(48, keys=3)
    left: list[timedelta] = []

    def slowly(**_: Any) -> None:
        end = time.monotonic() + 0.1
        wait_until(lambda: time.monotonic() > end, 1, "a slow stream")
        ((until, now),) = flushing.sql_rows(
            select(func.min(flushing.buckets.c.until), db_now()).where(
                flushing.buckets.c.owner != ""
            )
        )
        left.append(until - now)

    on(signals.outbox_published, slowly)
    result = flushing.drain()
    assert result.sent == 48
    assert result.seconds > 1.1
    assert min(left) > timedelta(0)
    assert flushing.leases() == set()


@pytest.mark.parametrize("database", ["mariadb", "sqlite"], indirect=True)
def test_who_has_lost_its_lease_stops(
    make: Make, on: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    flushing = make(jetstream_outbox_batch_size=10, jetstream_outbox_lease=1)
    flushing.fill(100, keys=3)

    def stand_still(rows: Any, **_: Any) -> None:
        if rows[0].id <= 10:  # as after a SIGSTOP: half the lease is over, and others came
            end = time.monotonic() + 0.6
            wait_until(lambda: time.monotonic() > end, 1, "time to pass")
            flushing.lease("another", db_now(60))

    on(signals.outbox_published, stand_still)
    result = flushing.drain()
    assert result.sent == 10  # recorded, whoever has the lease
    assert result.busy
    assert "was lost" in caplog.text
    assert flushing.leases() == {"another"}
    flushing.lease("", db_now(-1))
    assert flushing.drain().sent == 90
    in_order(flushing.stored(), flushing.rows())


# ── the worker's clock is not asked ───────────────────────────────────────────

AHEAD = """
import datetime, json, os, sys, time
import psycopg  # built with the real datetime
real, ahead = time.time, float(sys.argv[2])
class Ahead(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=ahead)
    @classmethod
    def utcnow(cls):
        return super().utcnow() + datetime.timedelta(seconds=ahead)
time.time = lambda: real() + ahead
datetime.datetime = Ahead
from celery import Celery
from celery_jetstream import JetStream
app = Celery("test", broker="memory://")
app.conf.update(json.loads(sys.argv[1]))
result = JetStream(app).outbox.drain(10)
print(json.dumps(result.as_dict()))
"""


@pytest.mark.parametrize(
    ("hours", "database"),
    [(24, "postgresql"), (24, "mariadb"), (-24, "sqlite")],
    indirect=["database"],
)
def test_a_worker_whose_clock_is_wrong_sends_what_is_due_and_nothing_else(
    flushing: Flushing, hours: int
) -> None:
    elsewhere = {bucket_of(flushing.subject, "a", ""), bucket_of(flushing.other, "d", "")}
    key = next(k for k in "bcdefghij" if bucket_of(flushing.subject, k, "") not in elsewhere)
    flushing.write("a", key)
    flushing.write("c", delay=3600)
    flushing.write("d", start=10, subject=flushing.other)  # is tried, and waits
    flushing.lease("another", db_now(60), [flushing.row("2").bucket])
    conf = {name: flushing.app.conf[name] for name in flushing.settings}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", AHEAD, json.dumps(conf), str(hours * 3600)],
        capture_output=True,
        text=True,
        check=False,
        timeout=40,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sent"] == 1, done.stderr
    assert flushing.stored() == ["1"]
    now = flushing.sql_now()
    tried = flushing.row("10")
    assert tried.attempts >= 1, done.stderr
    assert abs(tried.failing_since - now) < timedelta(seconds=30)
    assert abs(tried.due_at - now) < timedelta(seconds=30)
    flushing.lease("", db_now(-1))
    assert flushing.drain().sent == 1


@on_postgresql
def test_a_celery_worker_whose_clock_is_a_day_ahead_flushes(
    flushing: Flushing, redis_server: RedisServer, names: Names, tmp_path: Any
) -> None:
    flushing.fill(20)
    queue = f"flush-{names.app_name}"
    conf = {name: flushing.app.conf[name] for name in flushing.settings}
    conf |= {
        "broker_url": redis_server.url,
        "task_default_queue": queue,
        "jetstream_outbox_flush_interval": 0.5,
        "jetstream_outbox_queue": queue,
    }
    ahead = {"SHOP_CONF": json.dumps(conf), "SHOP_CLOCK_AHEAD": "86400"}
    beat = ["beat", "-l", "INFO", "-s", str(tmp_path / "schedule")]
    started = []
    try:
        for which, module, arguments in (
            ("worker", "tests.apps.shop_ahead", [*WORKER, "-P", "solo"]),
            ("beat", "tests.apps.shop_ahead", beat),
        ):
            command = [sys.executable, "-m", "celery", "-A", module, *arguments]
            clock = ahead if which == "worker" else {**ahead, "SHOP_CLOCK_AHEAD": "0"}
            environment = {**clock, "SHOP_LEDGER": os.devnull}
            started.append(CeleryProcess(tmp_path / f"{which}.log", command, environment))
        wait_until(
            lambda: flushing.count("sent") == 20, 30, "the worker to flush what beat asks for"
        )
        flushing.fill(5)
        wait_until(lambda: flushing.count("sent") == 25, 30, "the next tick")
    except TimeoutError as error:
        raise AssertionError(f"{error}: {[one.text() for one in started]}") from None
    finally:
        for one in started:
            one.kill()
    in_order(flushing.stored(), flushing.rows())


# ── a row fails ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [2, 1000])
def test_after_an_unknown_error_the_key_waits_and_then_goes_on_in_order(
    make: Make, size: int, soon: None
) -> None:
    flushing = make(jetstream_outbox_batch_size=size)
    responder = Responder(flushing)
    responder.answers = {"2": b"garbage"}
    flushing.write(*"aaabba", subject=flushing.other)
    result = flushing.drain()
    assert result.retried >= 1  # again, where this took longer than it is to wait
    assert result.left == 0
    assert responder.accepted[:1] == ["1"]
    assert set(responder.accepted) >= {"1", "4", "5"}
    failed = flushing.row("2")
    assert failed.status == "pending"
    assert failed.attempts >= 1
    assert failed.failing_since is not None
    assert failed.finished_at is None
    assert failed.last_error == "the answer is no PubAck"
    flushing.write("a", "b", subject=flushing.other)
    flushing.drain()
    assert flushing.row("8").status == "sent"
    assert {flushing.row(number).status for number in "2367"} == {"pending"}
    assert {flushing.row(number).attempts for number in "367"} == {0}
    del responder.answers["2"]
    drained(flushing)
    of_a = [number for number in responder.accepted if number in "12367"]
    assert of_a == list("12367")
    assert flushing.holds() == []
    assert flushing.row("2").attempts >= 1  # it is told what it took


def test_an_unknown_error_is_given_up_after_enough_tries_and_time(make: Make, soon: None) -> None:
    flushing = make(jetstream_outbox_max_attempts=2, jetstream_outbox_max_age=3600)
    responder = Responder(flushing)
    responder.answers = {"1": b"[]"}
    flushing.write(*"aab", subject=flushing.other)
    flushing.drain()
    started = flushing.row("1").failing_since

    def tried() -> bool:
        flushing.drain()
        return flushing.row("1").attempts > 2

    wait_until(tried, 10, "more attempts than outbox_max_attempts")
    failing = flushing.row("1")
    assert (failing.status, failing.failing_since) == ("pending", started)  # time is not over
    table = flushing.table
    with flushing.engine.begin() as connection:
        long_ago = update(table).where(table.c.event_id == "1").values(failing_since=db_now(-3601))
        connection.execute(long_ago)
    drained(flushing, "2")
    assert flushing.row("1").status == "exception"
    assert flushing.row("2").due_at == PARKED
    assert flushing.drain().sent == 0


def test_a_refusal_is_final_at_once_and_parks_its_key_only(
    flushing: Flushing, caplog: pytest.LogCaptureFixture
) -> None:
    flushing.update_stream(max_msg_size=2000)
    flushing.write("a", "b")
    flushing.write("a", payload="x" * 3000)  # 3
    flushing.write(*"aba")
    result = flushing.drain()
    assert (result.sent, result.failed, result.left) == (3, 1, 0)
    failed = flushing.row("3")
    assert failed.status == "failed"
    assert failed.attempts == 1
    assert "10054" in failed.last_error
    assert "given up (failed)" in caplog.text
    assert flushing.statuses() == {
        **dict.fromkeys("125", "sent"),
        "3": "failed",
        **dict.fromkeys("46", "pending"),
    }
    flushing.write(*"ab")  # new rows of the key wait, too
    assert flushing.drain().sent == 1
    assert {flushing.row(number).due_at for number in "467"} == {PARKED}
    with statements(flushing.engine) as seen:
        assert flushing.drain().sent == 0
    assert len(seen) == 1  # what is parked costs nothing

    flushing.update_stream(max_msg_size=-1)
    assert flushing.outbox.retry(Filter(event_id="3")).changed == 1
    assert flushing.drain().sent == 4
    in_order(flushing.stored(), flushing.rows())
    assert flushing.holds() == []


@on_sqlite
def test_a_refused_event_that_is_cancelled_lets_its_key_go_on(flushing: Flushing) -> None:
    flushing.update_stream(max_msg_size=2000)
    flushing.write("a", payload="x" * 3000)
    flushing.write("a", "a")
    flushing.drain()
    assert flushing.outbox.cancel("1").changed == 1
    assert flushing.drain().sent == 2
    assert flushing.stored() == ["2", "3"]
    assert flushing.row("1").status == "cancelled"


@on_sqlite
def test_with_skip_the_key_goes_on_without_it(flushing: Flushing) -> None:
    flushing.update_stream(max_msg_size=2000)
    flushing.write("a", payload="x" * 3000, on_failure="skip")
    flushing.write("a", "a")
    result = flushing.drain()
    assert (result.sent, result.failed) == (2, 1)
    assert flushing.stored() == ["2", "3"]
    assert flushing.holds() == []


@on_sqlite
def test_rows_without_a_key_wait_for_nobody(flushing: Flushing) -> None:
    flushing.update_stream(max_msg_size=2000)
    flushing.write(None, payload="x" * 3000)
    flushing.write(None, None)
    result = flushing.drain()
    assert (result.sent, result.failed) == (2, 1)
    assert flushing.holds() == []


ANSWERS = {
    "resources": (refusal(10023, 503), "outage"),
    "being stored": (refusal(10158, 409), "outage"),
    "full": (refusal(10077, 503), "outage"),
    "not the leader": (refusal(10009, 500), "outage"),
    "a new 503": (refusal(19999, 503), "outage"),
    "no answer": (None, "outage"),
    "sealed": (refusal(10109), "failed"),
    "a new 400": (refusal(19999), "failed"),
    "a new 500": (refusal(19999, 500), "retried"),
    "no JSON": (b"\xff\x00", "retried"),
    "no PubAck": (b'{"stream":1}', "retried"),
    "words": (refusal(19999, 500, "a\0b \ud800 c"), "retried"),
}


@pytest.mark.parametrize(("answer", "database"), cases(ANSWERS, "words"), indirect=["database"])
def test_what_the_answer_says_is_heeded(
    make: Make, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_jetstream.flusher.PUBLISH_TIMEOUT", 0.2)
    flushing = make()
    responder = Responder(flushing)
    said, outcome = ANSWERS[answer]
    responder.answers = {"1": said}
    flushing.write("a", "a", subject=flushing.other)
    before = flushing.rows()
    result = flushing.drain(0.5)
    row = flushing.row("1")
    if outcome == "outage":
        assert flushing.rows() == before
        assert result.outage
        assert result.left == 2
    elif outcome == "failed":
        assert (row.status, row.attempts, result.failed) == ("failed", 1, 1)
    else:
        assert row.status == "pending"
        assert row.attempts >= 1
    assert flushing.row("2").status == "pending"
    assert responder.accepted == []


# ── a row is damaged ──────────────────────────────────────────────────────────

DAMAGES: dict[str, dict[str, Any]] = {
    "no JSON": {"body": b"{"},
    "binary": {"body": b"\x00\xff\xfe"},
    "empty": {"body": b""},
    "a list": {"body": b"[1]"},
    "another's": {"body": b'{"event_id": "1"}'},
    "its headers": {"headers": "{"},
    "a list of headers": {"headers": "[1]"},
    "a header that breaks the line": {"headers": '{"a": "b\\r\\nc: d"}'},
    "its subject": {"subject": "a b"},
    "a wildcard": {"subject": "a.>"},
    "too deep": {"body": b"[" * 100_000},
}


def test_a_damaged_row_parks_its_key_and_nothing_else(make: Make) -> None:
    """One of each kind at once, in the middle of keys of their own."""
    flushing = make(jetstream_outbox_batch_size=10)
    for _ in range(4):
        flushing.write(*DAMAGES, "whole")
    keys = len(DAMAGES) + 1
    for number, damage in enumerate(DAMAGES.values(), keys + 1):
        flushing.change(str(number), **damage)
    result = flushing.drain()
    in_other_keys = sum("subject" in damage for damage in DAMAGES.values())
    assert result.exceptions == len(DAMAGES)
    assert result.sent == keys + 3 + 2 * in_other_keys
    for number, (key, damage) in enumerate(DAMAGES.items(), keys + 1):
        before, damaged, *after = (
            flushing.row(str(n)) for n in range(number - keys, 4 * keys + 1, keys)
        )
        assert (before.status, damaged.status) == ("sent", "exception"), key
        assert damaged.attempts == 1
        assert "Traceback" in damaged.last_error
        assert len(damaged.last_error) <= 4000
        ends = "sent" if "subject" in damage else "pending"  # then they are of another key
        assert {row.status for row in after} == {ends}, key
    assert {hold.until for hold in flushing.holds()} == {PARKED}
    flushing.write(*DAMAGES)
    assert flushing.drain().sent == in_other_keys
    for number in range(keys + 1, 2 * keys):
        body = b'{"event_id":"%d"}' % number
        flushing.change(str(number), body=body, headers="{}", subject=flushing.subject)
    flushing.outbox.retry(Filter())
    flushing.drain()
    stored = flushing.stored()
    assert sorted(map(int, stored)) == list(range(1, 4 * keys + keys))
    for number, damage in enumerate(DAMAGES.values(), 1):
        if "subject" not in damage:
            numbers = [
                int(n) for n in stored if (int(n) - number) % keys == 0 and int(n) <= 4 * keys
            ]
            assert numbers == sorted(numbers)


@on_sqlite
def test_a_damaged_row_behind_one_that_fails_is_given_up_in_its_turn(
    flushing: Flushing, soon: None
) -> None:
    responder = Responder(flushing)
    responder.answers = {"1": b"garbage"}
    flushing.write(*"aaa", subject=flushing.other)
    flushing.change("2", body=b"{")
    flushing.drain()
    assert flushing.statuses() == dict.fromkeys("123", "pending")
    responder.answers = {}
    drained(flushing, "3")
    assert flushing.statuses() == {"1": "sent", "2": "exception", "3": "pending"}
    assert responder.accepted == ["1"]


@on_sqlite
def test_many_failures_are_recorded_in_few_statements_and_said_once(
    flushing: Flushing, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "PAUSE", (60.0, 60.0))  # no probe, however slow the machine
    caplog.set_level(logging.WARNING)
    flushing.fill(500, keys=250, subject=flushing.other)
    flushing.update_stream(subjects=[flushing.subject])
    with statements(flushing.engine) as seen:
        result = flushing.drain()
    assert result.retried == 250
    assert len(seen) < 30, seen
    assert len([record for record in caplog.records if "tried again" in record.message]) == 1


# ── what it costs ─────────────────────────────────────────────────────────────


def test_statements_per_event(flushing: Flushing) -> None:
    count = 10_000 if flushing.kind == "postgresql" else 3000
    flushing.fill(count)
    with statements(flushing.engine) as seen:
        assert flushing.drain().sent == count
    print(f"{flushing.kind}: {len(seen) / count:.4f} statements per event")
    assert len(seen) <= count / 100
    with statements(flushing.engine) as seen:
        flushing.drain()
    assert len(seen) == 1, seen
    flushing.fill(1)
    with statements(flushing.engine) as seen:
        assert flushing.drain().sent == 1
    assert len(seen) <= 8, seen


@on_postgresql
def test_no_transaction_is_open_while_the_network_is_waited_for(make: Make) -> None:
    flushing = make(jetstream_outbox_batch_size=10)
    responder = Responder(flushing)
    asked = threading.Event()
    responder.answers = {str(number): None for number in range(1, 21)}
    flushing.fill(20, subject=flushing.other)
    states: list[str] = []

    def look() -> None:
        wait_until(lambda: asked.is_set(), 10, "the flush")
        for _ in range(20):
            found = flushing.sql(
                "SELECT state FROM pg_stat_activity WHERE usename = current_user"
                " AND pid <> pg_backend_pid()"
            )
            states.extend(state for (state,) in found)

    def claimed(**_: Any) -> None:
        asked.set()

    signals.outbox_claimed.connect(claimed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("celery_jetstream.flusher.PUBLISH_TIMEOUT", 1.0)
        with Threads(look):
            result = flushing.drain(1)
    assert result.left == 10
    assert set(states) == {"idle"}


@on_postgresql
def test_nothing_of_a_database_session_is_used(flushing: Flushing) -> None:
    """As behind PgBouncer with transactions pooled."""
    found: list[Any] = []

    def look(connection: Any, *_: Any) -> None:
        with connection.cursor() as cursor:
            for query in (
                "SELECT name FROM pg_prepared_statements",
                "SELECT locktype FROM pg_locks WHERE locktype = 'advisory'",
                "SELECT name FROM pg_settings WHERE source = 'session'"
                " AND name NOT LIKE 'transaction_%'",
                "SELECT name FROM pg_cursors WHERE is_holdable",
            ):
                found.append(cursor.execute(query).fetchall())
        connection.rollback()

    event.listen(flushing.engine, "checkin", look)
    flushing.update_stream(max_msg_size=2000)
    flushing.fill(3000)
    flushing.write("a", payload="x" * 3000)
    for _ in range(12):  # psycopg would prepare at the fifth time
        flushing.fill(5)
        flushing.drain()
    event.remove(flushing.engine, "checkin", look)
    assert len(found) > 100
    assert [one for one in found if one] == []
