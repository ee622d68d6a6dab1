"""The outbox, when what flushes it dies: nothing lost, nothing twice, every key in its order.

Real processes, killed at named points or at a random moment. Each test prints its account
(``-s``); ``CRASH_SEED=…`` repeats the moments. With ``--rounds`` above 1 there are 5,000 events in
each round, else some hundreds.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis

from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.crash.shops import PATIENCE, Account, Program, Shop, stopped
from tests.databases import Database
from tests.servers import MariaServer, PostgresServer, RedisServer, need
from tests.stack import WORKER, CeleryProcess

pytestmark = pytest.mark.timeout(240)

POINTS = ("claimed", "sent", "published")
KINDS = ("postgresql", "sqlite")

MakeShop = Callable[..., Shop]


@pytest.fixture
def make_shop(tmp_path: Path, names: Names) -> Iterator[MakeShop]:
    """``make_shop(database, nats_url, **settings)``; all ends with the test."""
    shops: list[Shop] = []

    def make(database: Database, nats_url: str, **settings: Any) -> Shop:
        shops.append(Shop(tmp_path, nats_url, names, database, **settings))
        return shops[-1]

    yield make
    for shop in shops:
        shop.close()


@pytest.fixture
def dice() -> random.Random:
    seed = int(os.environ.get("CRASH_SEED") or random.SystemRandom().randrange(10**6))
    print(f"\nCRASH_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(params=KINDS)
def own_database(request: pytest.FixtureRequest) -> Database:
    found: Database = request.getfixturevalue(request.param)
    return found


def right(shop: Shop, account: Account) -> None:
    assert account.is_right, f"{account}\n{shop.logs()}"


# -- flushers killed -------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS)
def test_flusher_is_killed(
    point: str,
    own_database: Database,
    make_shop: MakeShop,
    nats_server: NatsServer,
    dice: random.Random,
    rounds: int,
) -> None:
    """Up to five times (once in a short run), and then one comes to the end."""
    events, batch, most = (5000, 200, 5) if rounds > 1 else (600, 50, 1)
    shop = make_shop(own_database, nats_server.url, jetstream_outbox_batch_size=batch)
    total = Account(f"all rounds, kill at {point}, {own_database.kind}")
    for number in range(rounds):
        shop.write(events)
        kills = kill_until_sent(shop, point, dice, most)
        account = shop.account(f"round {number}, kill at {point}, {own_database.kind}", kills)
        assert kills, "none was killed: this shows nothing"
        assert account.events == events
        right(shop, account)
        total.events += events
        total.kills += kills
        total.refused += account.refused
        shop.forget()
    print(total)


def kill_until_sent(shop: Shop, point: str, dice: random.Random, most: int) -> int:
    """Starts a flusher after each that was killed, ``most`` times; returns how many were."""
    kills = 0
    while shop.is_pending():
        kill = at(point, dice.randint(1, 8), dice)
        flusher = shop.start("flush", kill=kill if kills < most else None)
        ended = flusher.wait(PATIENCE)
        assert ended in (0, -signal.SIGKILL), flusher.text()[-3000:]
        kills += ended != 0
    return kills


def at(point: str, nth: int, dice: random.Random, number: int = signal.SIGKILL) -> dict[str, Any]:
    """How a process is to end itself; the seconds are those of a batch."""
    return {"point": point, "nth": nth, "seconds": dice.uniform(0, 0.01), "signal": number}


@pytest.mark.soak
def test_two_flushers_are_killed(
    own_database: Database,
    make_shop: MakeShop,
    nats_server: NatsServer,
    dice: random.Random,
    rounds: int,
) -> None:
    events, batch, most = (5000, 200, 6) if rounds > 1 else (600, 50, 3)
    shop = make_shop(own_database, nats_server.url, jetstream_outbox_batch_size=batch)
    for number in range(rounds):
        shop.write(events)
        flushers = [start_killed(shop, dice) for _ in range(2)]
        while len(flushers) < most and wait_for_end(shop, flushers):
            flushers.append(start_killed(shop, dice))
        while shop.is_pending():
            assert shop.start("flush").wait(PATIENCE) == 0
        kills = sum(flusher.wait(PATIENCE) == -signal.SIGKILL for flusher in flushers)
        assert kills, "none was killed: this shows nothing"
        what = f"round {number}, two flushers, {own_database.kind}"
        right(shop, shop.account(what, kills))
        shop.forget()


def start_killed(shop: Shop, dice: random.Random) -> Program:
    return shop.start("flush", kill=at(dice.choice(POINTS), dice.randint(1, 4), dice))


def wait_for_end(shop: Shop, flushers: list[Program]) -> bool:
    """Waits until all is sent, or fewer than two run; whether there is more to send."""

    def ended() -> bool:
        return sum(flusher.poll() is None for flusher in flushers) < 2

    wait_until(lambda: ended() or not shop.is_pending(), PATIENCE, "the end of a flusher")
    return shop.is_pending()


def test_flusher_stands_still_for_longer_than_its_lease(
    own_database: Database,
    make_shop: MakeShop,
    nats_server: NatsServer,
    dice: random.Random,
    rounds: int,
) -> None:
    """SIGSTOP in the middle of a batch; another does the rest; SIGCONT.

    One that stands still with SQLite's lock has all others wait: then it goes on after 3 leases.
    In a short run at one of the points.
    """
    events, batch = (5000, 500) if rounds > 1 else (600, 100)
    shop = make_shop(own_database, nats_server.url, jetstream_outbox_batch_size=batch)
    for number, point in enumerate(POINTS * rounds if rounds > 1 else [dice.choice(POINTS)]):
        shop.write(events)
        still = shop.start("flush", kill=at(point, 2, dice, signal.SIGSTOP))
        wait_until(lambda process=still: stopped(process), PATIENCE, "the flusher to stand still")
        assert shop.is_pending()
        other = shop.start("flush")
        other.join(3 if own_database.kind == "sqlite" else PATIENCE)
        what = "the rest" if other.poll() == 0 else "nothing: SQLite was locked"
        still.send(signal.SIGCONT)
        for flusher in (still, other):
            assert flusher.wait(PATIENCE) == 0, flusher.text()[-3000:]
        what = f"round {number}, stopped at {point}, {own_database.kind}; the other sent {what}"
        right(shop, shop.account(what, kills=1))
        shop.forget()


# -- servers killed --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["postgresql", pytest.param("mariadb", marks=pytest.mark.soak)])
def test_servers_are_killed(
    kind: str, make_shop: MakeShop, own_nats: NatsServer, dice: random.Random, rounds: int
) -> None:
    """The database, NATS, and both at once, under two writers; one relay lives through it all.

    In a short run, of MariaDB only the last.
    """
    need(kind)
    faults = [("database",), ("NATS",), ("database", "NATS")]
    if kind == "mariadb" and rounds == 1:
        del faults[:2]
    with (PostgresServer if kind == "postgresql" else MariaServer)() as server:
        server.create_database("shop")
        database = Database(kind, server.url("shop"))
        shop = make_shop(database, own_nats.url, jetstream_outbox_batch_size=100)
        relay = start_relay(shop)
        writers = start_writers(shop)
        for number in range(rounds):
            for fault in faults:
                goes_on(shop, dice.randint(1, 10))
                killed = [server if what == "database" else own_nats for what in fault]
                for one in killed:
                    one.kill()
                for one in reversed(killed):
                    one.start()
                goes_on(shop, 5)
                print(f"round {number}: killed {' and '.join(fault)}")
        stop(writers)
        shop.wait_sent()
        stop([relay])
        assert "failed; another follows" not in relay.text(), relay.text()
        kills = sum(map(len, faults)) * rounds
        right(shop, shop.account(f"servers killed, {kind}", kills))


def start_relay(shop: Shop) -> CeleryProcess:
    return shop.celery("jetstream", "outbox", "relay", "--interval", "0.05")


def start_writers(shop: Shop, count: int = 2, pace: float = 0.005) -> list[Program]:
    writers = [shop.start("write", f"w{number}-", pace) for number in range(count)]
    goes_on(shop, 10)
    return writers


def goes_on(shop: Shop, count: int) -> None:
    """Waits until so many more transactions are committed, and so many more batches sent."""
    for what in ("committed", "published"):
        shop.wait_ledger(what, len(shop.ledger(what)) + count)


def stop(processes: Sequence[Program | CeleryProcess]) -> None:
    for process in processes:
        process.send(signal.SIGTERM)
    for process in processes:
        assert process.wait(PATIENCE) == 0, process.text()[-3000:]


# -- Celery's processes killed ---------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("own_database", ["postgresql", "sqlite"], indirect=True)
def test_celery_processes_are_killed(
    own_database: Database,
    make_shop: MakeShop,
    nats_server: NatsServer,
    own_redis: RedisServer,
    dice: random.Random,
    rounds: int,
) -> None:
    """A pool's child, the worker, beat, and FLUSHALL, under two writers."""
    shop = celery_shop(make_shop, own_database, nats_server, own_redis)
    worker, beat = start_worker(shop), start_beat(shop)
    writers = start_writers(shop)
    kills = 0
    for number in range(rounds):
        goes_on(shop, dice.randint(3, 10))
        kill_child(worker)
        goes_on(shop, 3)
        worker.kill()
        worker = start_worker(shop)
        goes_on(shop, 3)
        beat.kill()
        beat = start_beat(shop)
        goes_on(shop, 3)
        lost = flush_broker(own_redis)
        goes_on(shop, 3)
        kills += 3
        print(f"round {number}: child, worker, beat, FLUSHALL ({lost} messages)")
    stop(writers)
    shop.wait_sent()
    right(shop, shop.account(f"Celery's processes killed, {own_database.kind}", kills))


@pytest.mark.parametrize(
    "own_database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.soak)], indirect=True
)
def test_two_beats_and_four_flushers(
    own_database: Database,
    make_shop: MakeShop,
    nats_server: NatsServer,
    own_redis: RedisServer,
    rounds: int,
) -> None:
    """Two beats, a worker of two, a relay, a program that drains (and is killed); all at once."""
    shop = celery_shop(make_shop, own_database, nats_server, own_redis)
    shop.write(500)
    flushers = [start_worker(shop), start_beat(shop), start_beat(shop), start_relay(shop)]
    writers = start_writers(shop, pace=0.002)
    for _ in range(rounds):
        drain = shop.start("flush")
        goes_on(shop, 20)
        drain.kill()

    def who() -> int:
        return len({line["pid"] for line in shop.ledger("published")})

    wait_until(lambda: who() >= 3, PATIENCE, "three of them to have flushed")
    stop(writers)
    shop.wait_sent()
    assert all(process.poll() is None for process in flushers)
    what = f"two beats, {who()} processes that flushed, {own_database.kind}"
    right(shop, shop.account(what, kills=rounds))


def celery_shop(
    make_shop: MakeShop, database: Database, nats: NatsServer, redis: RedisServer
) -> Shop:
    return make_shop(
        database,
        nats.url,
        broker_url=redis.url,
        jetstream_outbox_batch_size=50,
        jetstream_outbox_flush_interval=0.5,
    )


def start_worker(shop: Shop) -> CeleryProcess:
    name = f"w{len(shop.processes)}@%h"
    return shop.celery(*WORKER, "-P", "prefork", "-c", "2", "-n", name)


def start_beat(shop: Shop) -> CeleryProcess:
    schedule = shop.directory / f"schedule-{len(shop.processes)}"
    return shop.celery("beat", "-s", str(schedule), "--pidfile=")


def kill_child(worker: CeleryProcess) -> None:
    """A child in the middle of a flush, if there is one in this moment."""
    file = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    wait_until(lambda: file.read_text().split(), PATIENCE, "children of the worker")
    os.kill(int(file.read_text().split()[0]), signal.SIGKILL)


def flush_broker(redis_server: RedisServer) -> int:
    """FLUSHALL; returns how many keys there were."""
    with redis.Redis.from_url(redis_server.url) as client:
        count: int = client.dbsize()
        client.flushall()
        return count


# -- writers killed --------------------------------------------------------------------------------


def test_writer_is_killed_in_the_middle_of_a_transaction(
    database: Database, make_shop: MakeShop, nats_server: NatsServer
) -> None:
    shop = make_shop(database, nats_server.url)
    relay = start_relay(shop)
    writer = shop.start("hang")
    shop.wait_ledger("in the middle")
    if database.kind != "sqlite":  # there none can publish meanwhile
        shop.wait_ledger("published")
    (middle,) = shop.ledger("in the middle")
    writer.kill()
    wait_until(lambda: len(shop.rows()) == 50, PATIENCE, "the rows of what was committed")
    shop.wait_sent()
    stop([relay])
    right(shop, shop.account(f"writer killed, {database.kind}", kills=1))
    assert set(shop.rows()) == set(shop.committed())
    assert not set(shop.rows()) & set(middle["ids"])
