"""How each end of a task is recorded and settled with an inbox: real worker, PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from celery_jetstream.testing import NatsServer, wait_until
from tests.banking import Bank
from tests.conftest import Names
from tests.databases import Database
from tests.servers import PostgresServer, RedisServer
from tests.stack import in_both_modes

SETTINGS: dict[str, Any] = {
    "jetstream_backoff": [0.2],
    "jetstream_ack_wait": 5,
    "jetstream_max_deliver": 3,
    "jetstream_inbox_lease": 3,
}


@pytest.fixture(scope="module", params=["bridge", "direct"])
def bank(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    nats_server: NatsServer,
    redis_server: RedisServer,
    postgres_server: PostgresServer,
) -> Iterator[Bank]:
    """One worker (and one bridge) for all of these tests: starting a worker costs seconds."""
    directory: Path = tmp_path_factory.mktemp("bank")
    mark = f"{os.getpid()}-{request.param}"
    names = Names(f"bank-{mark}", f"hub-{mark}", f"inbox-{mark}")
    user = f"bank_{request.param}_{os.getpid()}"
    postgres_server.create_user(user)
    url = postgres_server.url("postgres", user)
    direct = request.param == "direct"
    bank = Bank(directory, nats_server.url, redis_server.url, names, url, direct=direct, **SETTINGS)
    try:
        bank.start()
        yield bank
    finally:
        bank.close()


def send(bank: Bank, event_type: str, timeout: float = 40, **payload: Any) -> str:
    """Publishes one event and waits until its message is settled for good."""
    (event_id,) = bank.publish(event_type, **payload)
    bank.wait_ledger(lambda: bool(bank.runs(event_id)), timeout, event_type)
    wait_until(lambda: bank.left() == 0, timeout, f"{event_type} to be settled")
    return event_id


def dead(bank: Bank, event_id: str) -> list[dict[str, Any]]:
    return [d for d in bank.dead_letters() if d["context"]["event_id"] == event_id]


def test_an_effect_and_its_row_commit_together(bank: Bank) -> None:
    event_id = send(bank, "paid.once")
    row = bank.row(event_id)
    assert bank.effects()[event_id] == 1
    assert (row.status, row.attempts, row.handler) == ("processed", 0, "tests.apps.bank.paid")
    assert (row.event_type, row.deliveries, row.leased_until) == ("paid.once", 1, None)
    assert row.processed_at is not None


@pytest.mark.parametrize("kind", ["paid.twice", "noted.twice"])
def test_a_duplicate_is_acked_and_not_run(bank: Bank, kind: str) -> None:
    event_id = send(bank, kind)
    bank.publish_again(event_id, kind, id=0)
    wait_until(lambda: bank.left() == 0, 30, "the duplicate to be settled")
    assert bank.effects()[event_id] == len(bank.runs(event_id)) == 1
    assert not dead(bank, event_id)


@pytest.mark.parametrize("kind", ["paid.failing", "noted.failing"])
def test_failures_are_counted_by_the_row(bank: Bank, kind: str) -> None:
    event_id = send(bank, kind, fail=2)
    assert [line["retries"] for line in bank.runs(event_id)] == [0, 1, 2]
    row = bank.row(event_id)
    assert bank.effects()[event_id] == 1
    assert (row.status, row.attempts) == ("processed", 2)
    assert row.last_error == "RuntimeError('not yet')"


def test_none_left_is_a_dead_letter_and_the_row_is_failed(bank: Bank) -> None:
    event_id = send(bank, "paid.never", fail=99)
    (letter,) = dead(bank, event_id)
    assert letter["reason"] == "max_deliveries_exceeded"
    row = bank.row(event_id)
    assert (row.status, row.attempts) == ("failed", 3)
    assert bank.effects()[event_id] == 0


def test_autoretry_counts_and_gives_up_by_the_row(bank: Bank) -> None:
    event_id = send(bank, "retried.never", fail=99)
    assert [line["retries"] for line in bank.runs(event_id)] == [0, 1, 2]  # max_retries=2
    (letter,) = dead(bank, event_id)
    assert (letter["reason"], letter["context"]["error_class"]) == (
        "max_deliveries_exceeded",
        "OSError",
    )
    assert bank.row(event_id).attempts == 3
    assert bank.effects()[event_id] == 0


def test_a_retry_that_is_not_thrown_rolls_back_as_well(bank: Bank) -> None:
    event_id = send(bank, "quiet.once")
    wait_until(lambda: bank.effects()[event_id], 30, "its second run")
    assert [line["retries"] for line in bank.runs(event_id)] == [0, 1]
    assert bank.effects()[event_id] == 1
    assert (bank.row(event_id).status, bank.row(event_id).attempts) == ("processed", 1)


def test_a_dead_letter_sent_again_runs_again_with_all_its_attempts(bank: Bank) -> None:
    event_id = send(bank, "refused.first")
    (letter,) = dead(bank, event_id)
    assert letter["reason"] == "unrecoverable_error"
    row = bank.row(event_id)
    assert (row.status, row.attempts, row.handler) == ("failed", 1, "refused")
    bank.ledger_file.with_name(bank.ledger_file.name + ".mended").touch()
    bank.publish_again(event_id, "refused.first", id=0)
    wait_until(lambda: bank.effects()[event_id] == 1, 30, "the redrive to run")
    row = bank.row(event_id)
    assert (row.status, row.attempts) == ("processed", 0)


def test_what_is_processed_runs_again_only_after_a_reset(bank: Bank) -> None:
    event_id = send(bank, "paid.forced")
    assert bank.inbox.reset(event_id) == 1
    assert bank.row(event_id).status == "received"
    bank.publish_again(event_id, "paid.forced", id=0)
    wait_until(lambda: bank.effects()[event_id] == 2, 30, "the forced redrive to run")
    assert bank.row(event_id).status == "processed"


@pytest.mark.parametrize("kind", ["paid.killed", "noted.killed"])
def test_a_killed_child_is_a_failure_that_main_records(bank: Bank, kind: str) -> None:
    event_id = send(bank, kind, die="before", id=f"{kind}-before")
    wait_until(lambda: bank.effects()[event_id], 30, "its second run")
    assert [line["retries"] for line in bank.runs(event_id)] == [0, 1]
    row = bank.row(event_id)
    assert (row.status, row.attempts) == ("processed", 1)
    assert "WorkerLostError" in (row.last_error or "")
    assert bank.effects()[event_id] == 1


def test_killed_between_commit_and_ack_it_is_not_run_again(bank: Bank) -> None:
    """Also at its last attempt: what the row calls done is no dead letter."""
    event_id = send(bank, "paid.killed", die="committed", fail=2, id="committed")
    assert [line["retries"] for line in bank.runs(event_id)] == [0, 1, 2]
    assert bank.effects()[event_id] == 1
    assert bank.row(event_id).status == "processed"
    assert not dead(bank, event_id)


def test_always_killed_it_is_one_dead_letter(bank: Bank) -> None:
    event_id = send(bank, "paid.killer", timeout=60, die="after", deaths=99, id="killer")
    (letter,) = dead(bank, event_id)
    assert letter["context"]["error_class"] == "WorkerLostError"
    assert len(bank.runs(event_id)) == 3
    assert bank.row(event_id).attempts == 3
    assert bank.effects()[event_id] == 0


def test_the_hard_time_limit_is_a_failure_that_main_records(bank: Bank) -> None:
    event_id = send(bank, "limited.once")
    wait_until(lambda: bank.effects()[event_id], 30, "its second run")
    row = bank.row(event_id)
    assert (row.status, row.attempts) == ("processed", 1)
    assert "TimeLimitExceeded" in (row.last_error or "")
    assert bank.effects()[event_id] == 1


def test_an_event_added_to_the_outbox_leaves_with_the_effect_or_not_at_all(bank: Bank) -> None:
    event_id = send(bank, "passed.on", die="after", id="passed")
    wait_until(lambda: bank.effects()[event_id], 30, "its second run")
    with bank.engine.connect() as connection:
        written = connection.scalars(text("SELECT event_id FROM jetstream_outbox")).all()
    assert written == [event_id]
    assert bank.effects()[event_id] == 1


def test_an_event_without_an_id_is_known_by_its_message(bank: Bank) -> None:
    before = len(bank.ledger("handled"))
    bank.publish_again("", "paid.nameless", id=0)
    bank.wait_ledger(lambda: len(bank.ledger("handled")) > before, 30, "the event without an id")
    (row,) = (r for r in bank.inbox.find(limit=1000) if r.event_type == "paid.nameless")
    assert row.event_id == f"{row.stream}:{row.sequence}"


def test_a_handler_without_an_inbox_has_no_row(bank: Bank) -> None:
    (event_id,) = bank.publish("plain.one")
    bank.wait_ledger(lambda: bool(bank.runs(event_id, "handled")), 30, "plain")
    assert bank.inbox.get(event_id) == []


def test_a_bridge_warns_where_the_inbox_forgets_too_early(
    tmp_path: Path,
    nats_server: NatsServer,
    redis_server: RedisServer,
    postgresql: Database,
    names: Names,
) -> None:
    bank = Bank(
        tmp_path,
        nats_server.url,
        redis_server.url,
        names,
        postgresql.url,
        jetstream_inbox_retention="1m",
    )
    try:
        bridge = bank.bridge()
        assert (
            "jetstream_inbox_retention=60 is less than the stream's duplicate window of 120 s"
            in (bridge.text())
        )
    finally:
        bank.close()


@in_both_modes
@pytest.mark.parametrize(("pool", "concurrency"), [("threads", 4), ("gevent", 10), ("solo", 1)])
def test_in_every_pool(
    tmp_path: Path,
    nats_server: NatsServer,
    redis_server: RedisServer,
    postgresql: Database,
    names: Names,
    pool: str,
    concurrency: int,
    direct: bool,
) -> None:
    """Each event comes twice, some fail once, and each effect is there once."""
    bank = Bank(
        tmp_path,
        nats_server.url,
        redis_server.url,
        names,
        postgresql.url,
        direct=direct,
        **SETTINGS,
    )
    try:
        bank.start(pool=pool, concurrency=concurrency)
        ids = [f"e{number}" for number in range(60)]
        for number, event_id in enumerate(ids):
            kind = ("paid.pool", "noted.pool")[number % 2]
            for _ in range(2):
                bank.publish_again(event_id, kind, id=number, fail=number % 10 == 0, seconds=0.01)
        bank.exactly_once(ids, f"{pool}: each event twice")
        failed = [row for row in bank.inbox.find(limit=100) if row.attempts]
        assert len(failed) == 6
    finally:
        bank.close()


def test_a_duplicate_while_it_runs_comes_again_and_does_not_wait(bank: Bank) -> None:
    """``seconds`` stand for minutes: three duplicates a worker of two, and no place is blocked."""
    (event_id,) = bank.publish("paid.slow", seconds=6)
    bank.wait_ledger(lambda: bool(bank.runs(event_id)), 30, "it to run")
    for _ in range(3):
        bank.publish_again(event_id, "paid.slow", id=0, seconds=6)
    (other,) = bank.publish("paid.quick")
    wait_until(lambda: bank.effects()[other] == 1, 5.5, "another to be handled beside it")
    assert bank.effects()[event_id] == 0, "the slow one is done: this shows nothing"
    wait_until(lambda: bank.left() == 0, 40, "the duplicates to be settled")
    assert bank.effects()[event_id] == len(bank.runs(event_id)) == 1
    assert bank.row(event_id).attempts == 0
    assert not dead(bank, event_id)
