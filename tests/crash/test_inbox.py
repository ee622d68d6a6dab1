"""Effects exactly once: what is killed, doubled or away, and the ledger in the database after it.

After each: every effect once, nothing stuck, nothing dead that did not fail by itself, and every
row of the inbox says ``processed``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from celery_jetstream.models import AT_ONCE
from celery_jetstream.testing import NatsServer, wait_until
from tests.banking import Bank
from tests.conftest import Names
from tests.crash import faults
from tests.servers import PostgresServer, RedisServer
from tests.stack import in_both_modes_soak

pytestmark = pytest.mark.timeout(240)

MakeBank = Callable[..., Bank]


@pytest.fixture
def make_bank(
    tmp_path: Path,
    nats_server: NatsServer,
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    names: Names,
) -> Iterator[MakeBank]:
    made: list[Bank] = []

    def make(
        nats: NatsServer = nats_server, postgres: PostgresServer | None = None, **settings: Any
    ) -> Bank:
        user = f"bank_{os.getpid()}_{names.app_name.replace('-', '_')}"
        server = postgres or postgres_server
        server.create_user(user)
        url = server.url("postgres", user)
        settings = {**faults.SETTINGS, **settings}
        bank = Bank(tmp_path, nats.url, redis_server.url, names, url, **settings)
        made.append(bank)
        return bank

    yield make
    for bank in made:
        bank.close()


def load(bank: Bank, count: int = 100) -> list[str]:
    """Some of each form; each tenth takes 50 ms, so that some are always in the middle."""
    kinds = ("paid.load", "paid.load", "noted.load")
    return bank.publish_many(
        [(kinds[n % 3], {"id": n, "seconds": 0.05 if n % 10 == 0 else 0}) for n in range(count)]
    )


@in_both_modes_soak
@pytest.mark.parametrize("point", ["before", "after", "committed"])
def test_a_child_is_killed(make_bank: MakeBank, rounds: int, point: str, direct: bool) -> None:
    """Before its effect, between effect and commit, between commit and ack."""
    bank = make_bank(direct=direct)
    bank.start()
    events: list[str] = []
    for number in range(rounds):
        events += load(bank)
        events += bank.publish("paid.victim", die=point, id=f"{point}-{number}")
        events += load(bank)
        bank.exactly_once(events, f"kill -9 of a child, {point}")
    assert len(list(bank.directory.glob("*.died"))) == rounds, "nobody was killed"


@in_both_modes_soak
def test_a_child_is_killed_around_a_call(make_bank: MakeBank, rounds: int, direct: bool) -> None:
    """Before its effect; between effect and mark such a handler runs twice, which is said."""
    bank = make_bank(direct=direct)
    bank.start()
    events: list[str] = []
    for number in range(rounds):
        events += bank.publish("noted.victim", die="before", id=f"noted-{number}")
        events += load(bank)
        bank.exactly_once(events, "kill -9 of a child around a call")
    assert len(list(bank.directory.glob("*.died"))) == rounds, "nobody was killed"


@in_both_modes_soak
def test_a_worker_is_killed(make_bank: MakeBank, rounds: int, direct: bool) -> None:
    bank = make_bank(direct=direct)
    (worker,) = bank.start()
    events: list[str] = []
    for number in range(rounds):
        victims = bank.publish("paid.victim", 2, seconds=2)
        events += victims + bank.publish_many([("paid.load", {"id": n}) for n in range(200)])
        bank.wait_ledger(
            lambda victims=victims: all(bank.runs(victim) for victim in victims), 60, "victims"
        )
        worker.kill()
        worker = bank.start_worker()
        bank.exactly_once(events, f"kill -9 of a worker, round {number}")
    again = [line for line in bank.ledger("begun") if line["type"] == "paid.victim"]
    assert len(again) >= 3 * rounds, "no victim was cut off"


@in_both_modes_soak
def test_nats_server_is_killed(
    make_bank: MakeBank, own_nats: NatsServer, rounds: int, direct: bool
) -> None:
    bank = make_bank(direct=direct, nats=own_nats)
    bank.start()
    events: list[str] = []
    for _ in range(rounds):
        events += load(bank, 300)
        begun = len(bank.ledger("begun"))
        bank.wait_ledger(lambda b=begun: len(bank.ledger("begun")) > b + 50, 60, "the middle")
        own_nats.kill()
        own_nats.start()
        bank.exactly_once(events, "kill -9 of nats-server")


@in_both_modes_soak
def test_one_event_published_twice_with_two_workers(
    make_bank: MakeBank, rounds: int, direct: bool
) -> None:
    bank = make_bank(direct=direct)
    bank.start(workers=2)
    events: list[str] = []
    for number in range(rounds):
        new = [f"twice-{number}-{n}" for n in range(100)]
        kinds = [("paid.twice", "noted.twice")[n % 2] for n in range(100)]
        for event_id, kind in zip(new, kinds, strict=True):
            for _ in range(2):
                bank.publish_again(event_id, kind, id=event_id, seconds=0.02)
        events += new
        bank.exactly_once(events, "each event published twice, two workers")


def wait_depth(bank: Bank, least: int, what: str) -> None:
    wait_until(lambda: faults.depth(bank) >= least, 30, what)


@pytest.mark.soak
def test_one_message_delivered_to_two_bridges(make_bank: MakeBank, rounds: int) -> None:
    """One stands still for longer than ack_wait: what it has dispatched, the other does too."""
    bank = make_bank()
    bridges = [bank.bridge(), bank.bridge()]
    events: list[str] = []
    for _ in range(rounds):
        left = faults.depth(bank)  # copies that the last worker did not come to
        new = load(bank, 200)
        events += new
        wait_depth(bank, left + 200, "a copy of each in the queue")
        bridges[0].send(signal.SIGSTOP)
        wait_depth(bank, left + 250, "some to be dispatched twice")
        worker = bank.start_worker()
        bridges[0].send(signal.SIGCONT)
        bank.exactly_once(events, "one message delivered to two bridges")
        worker.kill()  # busy with duplicates still
    assert bank.refused() >= rounds, "no second copy came to a worker"


@pytest.mark.soak
def test_ids_that_a_restart_forgot_come_again(
    make_bank: MakeBank, own_nats: NatsServer, rounds: int
) -> None:
    """An outbox whose flusher was killed before it recorded what it had sent."""
    bank = make_bank(nats=own_nats)
    hub = bank.hub_with_outbox()
    outbox = hub.outbox
    bank.start()
    events: list[str] = []
    for number in range(rounds):
        new = [f"again-{number}-{n}" for n in range(100)]
        for event_id in new:
            outbox.publish("paid.again", {"id": event_id}, event_id=event_id)
        outbox.drain()
        events += new
        bank.exactly_once(events, "before the restart")
        own_nats.restart()
        wait_until(lambda: bank.hub.connected and hub.connected, 30, "the hubs to be back")
        before = bank.stored()
        with outbox.database.engine.begin() as connection:
            connection.execute(
                text(
                    "UPDATE jetstream_outbox SET status = 'pending', finished_at = NULL, "
                    "due_at = :due"
                ),
                {"due": AT_ONCE.replace(tzinfo=None)},
            )
        sent = wait_until(lambda: outbox.drain().sent, 30, "the outbox to be flushed again")
        assert sent == len(events)
        assert bank.stored() == before + sent, "the server knew some of them"
        bank.exactly_once(events, "ids forgotten by a restart, published again by an outbox")
    hub.close()


@in_both_modes_soak
def test_the_database_is_restarted_in_mid_handler(
    make_bank: MakeBank, own_postgres: PostgresServer, rounds: int, direct: bool
) -> None:
    bank = make_bank(direct=direct, postgres=own_postgres)
    bank.start()
    events: list[str] = []
    for _ in range(rounds):
        events += bank.publish("paid.slow", 2, seconds=1)
        events += bank.publish_many([("paid.load", {"id": n}) for n in range(200)])
        begun = len(bank.ledger("begun"))
        bank.wait_ledger(lambda b=begun: len(bank.ledger("begun")) > b, 60, "the middle")
        own_postgres.kill()
        own_postgres.start()
        bank.exactly_once(events, "the database restarted in mid-handler")


@in_both_modes_soak
def test_the_database_is_away_for_ten_times_the_retry_span(
    make_bank: MakeBank, own_postgres: PostgresServer, direct: bool
) -> None:
    """The span is five attempts with 0.2 s between them: 1 s."""
    bank = make_bank(direct=direct, postgres=own_postgres)
    bank.start()
    (pausing,) = [p for p in bank.processes if direct or "bridge is ready" in p.text()]
    own_postgres.kill()
    events = bank.publish_many([("paid.load", {"id": n}) for n in range(200)])
    pausing.wait_for("pauses: its database is away", 30)
    faults.let_pass(10)
    assert bank.dead_count() == 0
    assert not bank.ledger("begun")
    own_postgres.start()
    bank.exactly_once(events, "the database away for ten times the retry span")
    assert pausing.text().count("pauses: its database is away") == 1
    assert pausing.text().count("its database answers again") == 1
    rows = bank.inbox.find(limit=1000)
    assert {row.attempts for row in rows} == {0}
    if direct:
        assert {row.deliveries for row in rows} == {1}, "what waits in the worker came again"


@pytest.mark.soak
def test_deploys_cost_no_attempt(make_bank: MakeBank) -> None:
    """One attempt is allowed, and three workers come and go with all that they hold."""
    bank = make_bank(jetstream_max_deliver=1)
    bank.bridge()
    events = bank.publish("paid.slow", 16, seconds=0.4)
    for _ in range(2):
        worker = bank.start_worker()
        begun = len(bank.ledger("begun"))
        bank.wait_ledger(lambda b=begun: len(bank.ledger("begun")) >= b + 2, 60, "some to run")
        assert worker.stop(60) == 0
    bank.start_worker()
    bank.exactly_once(events, "three workers, one attempt")
    rows = bank.inbox.find(limit=100)
    assert {row.attempts for row in rows} == {0}
    assert max(row.deliveries for row in rows) > 1, "nothing was handed back"


@in_both_modes_soak
def test_a_cold_shutdown_lets_another_begin_at_once(make_bank: MakeBank, direct: bool) -> None:
    """Its row is given back, so that the lease of a minute is not waited for."""
    bank = make_bank(direct=direct)
    (worker,) = bank.start()
    (around,) = bank.publish("noted.slow", seconds=2)
    (within,) = bank.publish("paid.slow", seconds=2)
    bank.wait_ledger(lambda: bool(bank.runs(around) and bank.runs(within)), 60, "both to run")
    worker.send(signal.SIGQUIT)
    worker.wait(60)
    assert not bank.effects()
    bank.start_worker()
    began = time.monotonic()
    bank.exactly_once([around, within], "SIGQUIT of a worker")
    assert time.monotonic() - began < 30
    assert len(bank.runs(around)) == len(bank.runs(within)) == 2
    assert {row.attempts for row in bank.inbox.find()} == {0}


def test_a_long_handler_with_a_duplicate_every_second(make_bank: MakeBank) -> None:
    """Eight seconds stand for eight minutes, and an ack_wait of 3 s for one of three minutes."""
    bank = make_bank()
    bank.start()
    (event_id,) = bank.publish("paid.long", seconds=8)
    bank.wait_ledger(lambda: bool(bank.runs(event_id)), 60, "it to run")
    for number in range(7):
        bank.publish_again(event_id, "paid.long", id=0, seconds=8)
        (other,) = bank.publish("paid.quick")
        wait_until(lambda other=other: bank.effects()[other] == 1, 5, "another beside it")
        faults.let_pass(1)
        assert not bank.effects()[event_id] or number > 4
    bank.wait_effects([event_id])
    assert bank.effects()[event_id] == len(bank.runs(event_id)) == 1
    assert bank.row(event_id).attempts == 0
    assert bank.dead_count() == 0
