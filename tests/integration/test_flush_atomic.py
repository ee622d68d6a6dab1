"""Atomic batches: what one transaction wrote is in the stream whole or not at all."""

from __future__ import annotations

import asyncio
import base64
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from celery_jetstream import flusher, signals
from celery_jetstream.capabilities import ATOMIC_BATCHES
from celery_jetstream.sqltypes import db_now
from tests.databases import Database
from tests.flushing import Flushing, Responder, Threads, in_order, statements
from tests.servers import NatsServer, wait_until

pytestmark = pytest.mark.needs_nats(ATOMIC_BATCHES)

Make = Callable[..., Flushing]

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
on_servers = pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)


@pytest.fixture
def make(make_flushing: Make) -> Make:
    """``make(url, **settings)``: an outbox with atomic batches, ready."""
    return partial(make_flushing, jetstream_outbox_atomic=True)


@pytest.fixture
def flushing(make: Make) -> Flushing:
    return make()


def event(number: int, **more: Any) -> dict[str, Any]:
    return {
        "event_type": "order.paid",
        "payload": {"n": number},
        "event_id": str(number),
        "ordering_key": None,
        **more,
    }


def batches(flushing: Flushing) -> dict[str, list[str]]:
    """The batches in the stream, and the ids of their events; ``""`` for those without."""
    found: dict[str, list[str]] = {}
    for message in flushing.messages():
        headers = message.headers or {}
        found.setdefault(headers.get("Nats-Batch-Id", ""), []).append(headers["Nats-Msg-Id"])
    return found


def groups(flushing: Flushing) -> list[list[str]]:
    """The events of each batch, and those without one, each by itself; in the stream's order."""
    found = batches(flushing)
    alone = [[event_id] for event_id in found.pop("", [])]
    stored = flushing.stored()
    return sorted([*found.values(), *alone], key=lambda group: stored.index(group[0]))


def transactions(flushing: Flushing) -> list[list[str]]:
    """The events of each transaction."""
    found: dict[str, list[str]] = {}
    for row in flushing.rows():
        found.setdefault(row.transaction_id, []).append(row.event_id)
    return list(found.values())


def write_many(flushing: Flushing, count: int, size: int, keys: int = 13) -> None:
    """Transactions of so many events each, whose keys overlap."""
    for at in range(count):
        flushing.write(*(f"k{(at * 5 + n) % keys}" for n in range(size)))


def flows(flushing: Flushing) -> None:
    """Flushes until all is sent, and once in the stream, in order."""
    count = len(flushing.rows())

    def flush() -> bool:
        flushing.drain()
        return flushing.count("sent") == count

    wait_until(flush, 20, f"{count} rows to be sent")
    in_order(flushing.stored(), flushing.rows())


# ── one transaction, one batch ────────────────────────────────────────────────


def test_the_events_of_a_transaction_are_one_batch(flushing: Flushing) -> None:
    outbox = flushing.outbox
    with Session(flushing.engine) as session:
        outbox.add(session, **event(1))
        outbox.add_many(session, [event(2, ordering_key="k"), event(3)])
        outbox.add(session, **event(4, ordering_key="k", destination="elsewhere-app"))
        session.commit()
        outbox.add(session, **event(5))
        outbox.add(session, **event(6))
        session.commit()
        outbox.add(session, **event(7))
        session.rollback()
        outbox.add(session, **event(8))
        session.commit()
    flushing.update_stream(subjects=[f"{flushing.subject.split('.')[0]}.sync.*"])
    assert flushing.drain().sent == 7
    assert groups(flushing) == [["1", "2", "3", "4"], ["5", "6"], ["8"]]
    headers = [message.headers or {} for message in flushing.messages()]
    assert [one.get("Nats-Batch-Sequence") for one in headers] == [*"123412", None]
    assert [one.get("Nats-Batch-Commit") for one in headers] == [*[None] * 3, "1", None, "1", None]
    first = flushing.row("1").transaction_id
    assert headers[0]["Nats-Batch-Id"].startswith(first)
    assert {row.status for row in flushing.rows()} == {"sent"}
    in_order(flushing.stored(), flushing.rows())


def test_a_batch_has_its_sequences(flushing: Flushing, monkeypatch: pytest.MonkeyPatch) -> None:
    flushing.write(*"abc")
    seen: list[Any] = []

    def note(results: Any, **_: Any) -> None:
        seen.extend(results)

    signals.outbox_published.connect(note)
    flushing.drain()
    signals.outbox_published.disconnect(note)
    stored = [int((message.headers or {})["Nats-Sequence"]) for message in flushing.messages()]
    assert [result.sequence for result in seen] == stored
    assert [result.event_id for result in seen] == ["1", "2", "3"]


@on_servers
def test_a_savepoint_is_of_its_transaction(flushing: Flushing) -> None:
    with flushing.engine.connect() as connection:
        flushing.outbox.add(connection, **event(1))
        with connection.begin_nested():
            flushing.outbox.add(connection, **event(2))
        savepoint = connection.begin_nested()
        flushing.outbox.add(connection, **event(3))
        savepoint.rollback()
        connection.commit()
        flushing.outbox.add_many(connection, [event(4), event(5)])
        connection.commit()
    assert flushing.drain().sent == 4
    assert groups(flushing) == [["1", "2"], ["4", "5"]]


@on_sqlite
def test_asynchronous_sessions_have_transactions_too(
    flushing: Flushing, database: Database
) -> None:
    async def write() -> None:
        engine = create_async_engine(database.async_url)
        async with AsyncSession(engine) as session, session.begin():
            await flushing.outbox.add(session, **event(1))
            await flushing.outbox.add(session, **event(2))
        async with engine.begin() as connection:
            await flushing.outbox.add_many(connection, [event(3), event(4)])
        await engine.dispose()

    asyncio.run(write())
    assert flushing.drain().sent == 4
    assert groups(flushing) == [["1", "2"], ["3", "4"]]


@on_sqlite
def test_what_is_due_later_and_what_is_alone_goes_by_itself(flushing: Flushing) -> None:
    with Session(flushing.engine) as session:
        for one in (event(1), event(2, delay=3600), event(3)):
            flushing.outbox.add(session, **one)
        session.commit()
        flushing.outbox.add_many(session, [event(4), event(5, delay=3600)])
        session.commit()
    flushing.outbox.publish(**event(6))
    assert flushing.drain().sent == 4
    assert groups(flushing) == [["1", "3"], ["4"], ["6"]]


@on_sqlite
def test_what_was_cancelled_is_not_missed(flushing: Flushing) -> None:
    flushing.write(*"abc")
    flushing.outbox.cancel("2")
    assert flushing.drain().sent == 2
    assert groups(flushing) == [["1", "3"]]


@on_sqlite
def test_off_nothing_is_different(make: Make) -> None:
    flushing = make(jetstream_outbox_atomic=False)
    flushing.write(*"abc")
    assert flushing.drain().sent == 3
    assert set(batches(flushing)) == {""}
    assert {row.transaction_id for row in flushing.rows()} == {None}
    assert "allow_atomic" not in flushing.api(f"STREAM.INFO.{flushing.stream}")["config"]


@on_sqlite
def test_who_flushes_must_have_it_on_too(make: Make) -> None:
    make().write(*"abc")
    other = make(jetstream_outbox_atomic=False)
    assert other.drain().sent == 3
    assert set(batches(other)) == {""}


def test_many_transactions_are_read_whole(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than fit into one read, and into what is learned at once."""
    monkeypatch.setattr(flusher, "AHEAD", 3)
    flushing = make(jetstream_outbox_batch_size=10)
    write_many(flushing, 40, 7)
    flushing.write("k1", "k2")
    flushing.fill(5, keys=0)
    assert flushing.drain().sent == 287
    assert sorted(map(len, groups(flushing))) == [1] * 5 + [2] + [7] * 40
    assert sorted(map(sorted, transactions(flushing)[:-1])) == sorted(
        sorted(group) for group in groups(flushing) if len(group) > 1
    )
    in_order(flushing.stored(), flushing.rows())


@on_sqlite
def test_it_costs_one_more_statement_for_each_read(flushing: Flushing) -> None:
    write_many(flushing, 100, 10)
    with statements(flushing.engine) as seen:
        assert flushing.drain().sent == 1000
    asked = [one for one in seen if "transaction_id IN" in one]
    assert len(asked) == 1
    assert len(seen) <= 12, seen


# ── order ─────────────────────────────────────────────────────────────────────


@on_servers
def test_transactions_that_cross_go_in_the_order_of_their_keys(flushing: Flushing) -> None:
    """One before the other in one key, after it in another: one of them cannot be a batch."""
    add, engine = flushing.outbox.add, flushing.engine
    with engine.connect() as one, engine.connect() as other:
        add(one, **event(1, ordering_key="a"))
        add(other, **event(2, ordering_key="b"))
        add(other, **event(3, ordering_key="a"))
        add(one, **event(4, ordering_key="b"))
        one.commit()
        other.commit()
    assert flushing.drain().sent == 4
    in_order(flushing.stored(), flushing.rows())
    assert groups(flushing) == [["1"], ["2", "3"], ["4"]]


@on_servers
def test_transactions_of_other_keys_may_cross(flushing: Flushing) -> None:
    add, engine = flushing.outbox.add, flushing.engine
    with engine.connect() as one, engine.connect() as other:
        for number in range(1, 9):
            connection, key = (one, "a") if number % 2 else (other, "b")
            add(connection, **event(number, ordering_key=key))
        one.commit()
        other.commit()
    assert flushing.drain().sent == 8
    assert sorted(groups(flushing)) == [list("1357"), list("2468")]


@on_servers
def test_four_flushers_at_once_keep_the_order(make: Make) -> None:
    flushers = [make(jetstream_outbox_batch_size=50) for _ in range(4)]
    first = flushers[0]
    for _ in range(150):
        first.write(*(f"k{random.randrange(9)}" for _ in range(random.randrange(1, 6))))
    count = len(first.rows())

    def flush(one: Flushing) -> None:
        wait_until(
            lambda: one.drain(0.2).sent == 0 and first.count("sent") == count, 30, "the flush"
        )

    with Threads(*(lambda one=one: flush(one) for one in flushers)):
        pass
    in_order(first.stored(), first.rows())


@on_sqlite
def test_an_event_that_fails_holds_up_the_transactions_of_its_key(flushing: Flushing) -> None:
    flushing.update_stream(max_msg_size=1000)
    flushing.write("a", payload="x" * 2000)
    flushing.write("b", "a", "c", start=2)
    flushing.write("c", "d", start=5)
    flushing.write("e", "f", start=7)
    result = flushing.drain()
    assert (result.failed, result.sent) == (1, 6)
    assert flushing.row("3").status == "pending"  # its key waits; the rest went without it
    assert sorted(groups(flushing)) == [["2"], ["4"], ["5", "6"], ["7", "8"]]


# ── singly ────────────────────────────────────────────────────────────────────


def test_a_known_id_has_the_transaction_sent_singly(flushing: Flushing) -> None:
    flushing.jetstream.publish("order.paid", {"n": 2}, event_id="2").raise_for_error()
    flushing.write("a", "a", "b", None)
    flushing.write("a", "b")
    result = flushing.drain()
    assert (result.sent, result.duplicates) == (6, 1)
    stored = flushing.stored()
    assert sorted(stored) == list("123456")
    assert groups(flushing)[-1] == ["5", "6"]
    assert stored.index("1") < stored.index("5")
    assert stored.index("3") < stored.index("6")


@on_sqlite
def test_a_batch_that_was_stored_and_is_sent_again_is_there_once(flushing: Flushing) -> None:
    flushing.write("a", "a", "b")
    flushing.drain()
    flushing.change("1", "2", "3", status="pending", finished_at=None)
    result = flushing.drain()
    assert (result.sent, result.duplicates) == (3, 3)
    assert groups(flushing) == [["1", "2", "3"]]


@on_sqlite
@pytest.mark.parametrize("count", [1000, 1001])
def test_a_batch_has_a_thousand_events_at_the_most(make: Make, count: int) -> None:
    flushing = make(jetstream_outbox_batch_size=3000)
    flushing.write(*(f"k{number % 7}" for number in range(count)))
    flushing.write("k1", "k2")
    assert flushing.drain().sent == count + 2
    in_order(flushing.stored(), flushing.rows())
    sizes = Counter(map(len, groups(flushing)))
    assert sizes == ({1000: 1, 2: 1} if count == 1000 else {1: 1001, 2: 1})


@on_sqlite
def test_a_transaction_larger_than_a_read_goes_singly(make: Make) -> None:
    flushing = make(jetstream_outbox_batch_size=10)
    flushing.write(*"ab")
    flushing.write(*(f"k{number % 3}" for number in range(25)))
    flushing.write(*"ab")
    assert flushing.drain().sent == 29
    in_order(flushing.stored(), flushing.rows())
    assert Counter(map(len, groups(flushing))) == {1: 25, 2: 2}


@on_sqlite
def test_large_events_are_sent_in_pieces(flushing: Flushing) -> None:
    """More bytes than are laid ready at a time."""
    flushing.write(*(f"k{number % 3}" for number in range(30)), payload="x" * 100_000)
    assert flushing.drain().sent == 30
    assert [len(group) for group in groups(flushing)] == [30]


def test_a_part_that_another_flusher_has_goes_singly(flushing: Flushing) -> None:
    flushing.write(*"abcdefgh")
    theirs = {row.bucket for row in flushing.rows()[:2]}
    flushing.lease("another", db_now(60), sorted(theirs))
    result = flushing.drain()
    assert result.sent == sum(row.bucket not in theirs for row in flushing.rows())
    assert set(batches(flushing)) == {""}
    flushing.lease("", db_now(-1))
    flows(flushing)
    assert set(batches(flushing)) == {""}


@on_sqlite
def test_a_subject_of_no_stream_harms_no_other_event(
    flushing: Flushing, caplog: pytest.LogCaptureFixture
) -> None:
    for first, subjects in ((1, ["", "other", ""]), (4, ["", "", "other"])):
        flushing.outbox.database.transaction(
            lambda connection, first=first, subjects=subjects: flushing.outbox.add_many(
                connection,
                [
                    event(number, subject=flushing.other if one else flushing.subject)
                    for number, one in enumerate(subjects, first)
                ],
            )
        )

    def flush() -> bool:
        flushing.drain()
        return flushing.count("sent") == 4

    wait_until(flush, 10, "the events that a stream takes")
    assert sorted(flushing.stored()) == list("1345")
    assert {row.status for row in flushing.rows("2", "6")} == {"pending"}
    assert all(row.attempts for row in flushing.rows("2", "6"))


@on_sqlite
def test_an_answer_that_names_no_batch_is_not_believed(flushing: Flushing) -> None:
    """As of a server before 2.12: it took the message for itself."""
    responder = Responder(flushing)
    flushing.write("a", "a", "b", subject=flushing.other)
    assert flushing.drain().sent == 3
    assert responder.accepted[-3:] == ["1", "3", "2"]


@on_sqlite
def test_what_cannot_be_sent_does_not_keep_the_rest_back(
    flushing: Flushing, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushing.write(*"abc")
    flushing.jetstream.provision()
    size = len(flushing.row("2").body)
    flushing.change("2", body=bytes(flushing.row("2").body) + b" " * (2 * 1024**2 - size))
    result = flushing.drain()
    assert (result.sent, result.failed) == (2, 1)
    assert sorted(flushing.stored()) == ["1", "3"]


@on_sqlite
def test_a_damaged_row_does_not_keep_the_rest_back(flushing: Flushing) -> None:
    flushing.write(*"abc")
    flushing.change("2", body=b"{")
    result = flushing.drain()
    assert (result.sent, result.exceptions) == (2, 1)
    assert sorted(flushing.stored()) == ["1", "3"]


# ── where the stream takes no batches ─────────────────────────────────────────


def headers_on_disk(flushing: Flushing) -> list[str]:
    """The headers of each message; the old server gives one at a time."""
    count = flushing.api(f"STREAM.INFO.{flushing.stream}")["state"]["messages"]
    found = [
        flushing.api(f"STREAM.MSG.GET.{flushing.stream}", seq=number + 1)["message"]["hdrs"]
        for number in range(count)
    ]
    return [base64.b64decode(one).decode() for one in found]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.message for one in caplog.records if "no atomic batches" in one.message]


@on_sqlite
def test_an_old_server_gets_them_singly_and_that_is_said_once(
    make: Make, old_nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    flushing = make(old_nats_server.url)
    flushing.write("a", "a", "b")
    assert flushing.drain().sent == 3
    flushing.write("a", "a", "b")
    flushing.jetstream.reconnect()
    wait_until(lambda: flushing.drain().sent == 3, 5, "the second transaction")
    found = headers_on_disk(flushing)
    assert len(found) == 6
    assert not [one for one in found if "Nats-Batch" in one]
    assert len(warnings(caplog)) == 1
    assert [one for one in caplog.records if one.levelno > logging.WARNING] == []


@on_sqlite
def test_a_stream_is_given_the_switch_where_it_is_ours(make: Make) -> None:
    before = make(jetstream_outbox_atomic=False)
    assert "allow_atomic" not in before.api(f"STREAM.INFO.{before.stream}")["config"]
    flushing = _with(before)
    try:
        flushing.write(*"abc")
        assert flushing.drain().sent == 3
        assert [len(group) for group in groups(flushing)] == [3]
    finally:
        flushing.close()


@on_sqlite
def test_a_stream_of_somebody_else_is_left_as_it_is(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    before = make(jetstream_outbox_atomic=False)
    flushing = _with(before, jetstream_auto_provision=False)
    try:
        flushing.write(*"abc")
        assert flushing.drain().sent == 3
        assert set(batches(flushing)) == {""}
        assert len(warnings(caplog)) == 1
    finally:
        flushing.close()


@on_sqlite
def test_a_stream_that_cannot_have_the_switch_is_taken_without(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    before = make(jetstream_outbox_atomic=False)
    found = before.api(f"STREAM.INFO.{before.stream}")["config"]
    before.api(f"STREAM.DELETE.{before.stream}")
    before.api(f"STREAM.CREATE.{before.stream}", **{**found, "persist_mode": "async"})
    flushing = _with(before)
    try:
        flushing.jetstream.provision()
        flushing.write(*"abc")
        assert flushing.drain().sent == 3
        assert set(batches(flushing)) == {""}
        assert len(warnings(caplog)) == 1
    finally:
        flushing.close()


@on_sqlite
def test_a_stream_of_another_name_may_have_the_subjects(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    before = make(jetstream_outbox_atomic=False)
    flushing = _with(before, jetstream_auto_provision=False, jetstream_stream_name="nowhere")
    try:
        flushing.write(*"abc")
        assert flushing.drain().sent == 3
        assert len(warnings(caplog)) == 1
    finally:
        flushing.close()


@on_sqlite
@pytest.mark.parametrize("provisions", [False, True])
def test_who_may_not_ask(make: Make, caplog: pytest.LogCaptureFixture, provisions: bool) -> None:
    """Without auto_provision it is not asked, but tried; else who may not goes on singly."""
    config = """
        jetstream: {}
        authorization: { users: [
          {user: admin, password: secret}
          {user: poor, password: secret, permissions: {publish: {deny: "$JS.API.STREAM.>"}}}
        ] }
    """
    with NatsServer(config=config) as server:
        url = server.url.replace("//", "//admin:secret@")
        before = make(url)
        poor = server.url.replace("//", "//poor:secret@")
        flushing = _with(before, jetstream_nats_urls=poor, jetstream_auto_provision=provisions)
        try:
            flushing.write(*"abc")
            assert flushing.drain().sent == 3
            assert ("" in batches(before)) == provisions
            assert len(warnings(caplog)) == int(provisions)
            connection = flushing.jetstream.connection
            session = connection.run(connection.session)
            assert ("violation" in str(session.error).lower()) == provisions
        finally:
            flushing.close()


# ── outages ───────────────────────────────────────────────────────────────────


def all_whole(flushing: Flushing) -> None:
    """Each transaction is one batch."""
    assert sorted(map(sorted, groups(flushing))) == sorted(map(sorted, transactions(flushing)))


@on_sqlite
def test_a_full_stream_has_none_of_it(flushing: Flushing, quick: None) -> None:
    flushing.update_stream(max_msgs=4, discard="new")
    flushing.write(*"abc")
    flushing.write(*"abe")
    flushing.write(*"x")
    assert flushing.drain().outage
    assert flushing.statuses() == {
        **dict.fromkeys("1237", "sent"),
        **dict.fromkeys("456", "pending"),
    }
    assert {row.attempts for row in flushing.rows()} == {0}
    flushing.update_stream(max_msgs=-1)
    flows(flushing)
    all_whole(flushing)


@on_sqlite
def test_a_server_that_hangs_leaves_all_rows_pending(
    make: Make, own_server: NatsServer, quick: None
) -> None:
    flushing = make(own_server.url, jetstream_outbox_batch_size=100)
    write_many(flushing, 60, 5)
    before = flushing.rows()
    own_server.pause()
    results = [flushing.drain(5) for _ in range(4)]
    assert all(result.outage for result in results), results
    assert flushing.rows() == before
    own_server.resume()
    flows(flushing)
    all_whole(flushing)
    assert {row.attempts for row in flushing.rows()} == {0}


@on_sqlite
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_server_that_dies_in_the_middle_has_whole_transactions(
    make: Make, own_server: NatsServer, quick: None, at: int
) -> None:
    flushing = make(own_server.url, jetstream_outbox_batch_size=50)
    write_many(flushing, 80, 5)
    seen: list[int] = []

    def kill(rows: Sequence[Any], **_: Any) -> None:
        seen.append(len(rows))
        if len(seen) == at:
            own_server.kill()

    signals.outbox_claimed.connect(kill)
    result = flushing.drain()
    signals.outbox_claimed.disconnect(kill)
    assert result.outage
    assert result.sent < 400
    own_server.start()
    flows(flushing)
    all_whole(flushing)


def _with(like: Flushing, **settings: Any) -> Flushing:
    """Another process's outbox, with atomic batches; nothing is provisioned for it."""
    made = like.again()
    made.app.conf.update({"jetstream_outbox_atomic": True, **settings})
    return made
