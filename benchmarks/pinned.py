"""What the outbox's SQL costs while an old transaction keeps vacuum from removing anything.

``python -m benchmarks.pinned [--rounds 12] [--each 5000]``: so many rows are written and flushed,
again and again, while a REPEATABLE READ transaction is open in PostgreSQL; the time of the flush's
statements, round by round, and the last two rounds against the first two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text

from celery_jetstream.testing import NatsServer
from tests.conftest import Names
from tests.databases import Database
from tests.flushing import Flushing
from tests.servers import PostgresServer


class Clock:
    """Seconds that the statements of an engine take, and how many there are."""

    def __init__(self, engine: Engine) -> None:
        self.seconds = 0.0
        self.statements = 0
        self._start = 0.0
        event.listen(engine, "before_cursor_execute", self._before)
        event.listen(engine, "after_cursor_execute", self._after)

    def _before(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def _after(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._start
        self.statements += 1


@contextmanager
def pinned(url: str) -> Iterator[None]:
    """An old transaction that has seen the table."""
    engine = create_engine(url)
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        _look(connection)
        yield
    engine.dispose()


def _look(connection: Connection) -> None:
    connection.execute(text("SELECT count(*) FROM jetstream_outbox")).scalar_one()


def measure(flushing: Flushing, rounds: int, rows: int) -> list[float]:
    """Seconds of SQL of each round's flush."""
    clock, took = Clock(flushing.engine), []
    for _ in range(rounds):
        flushing.fill(rows)
        before = clock.seconds
        result = flushing.drain(60)
        assert result.sent == rows, result
        took.append(clock.seconds - before)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--each", type=int, default=5000)
    arguments, _ = parser.parse_known_args()  # `make bench` gives --rows, for the plans
    with NatsServer() as nats, PostgresServer() as server:
        for pin in (False, True):
            name = f"pinned_{pin}".lower()
            server.create_user(name)
            database = Database("postgresql", server.url("postgres", name))
            names = Names(f"hub-{name}", f"desk-{name}", f"stream-{name}")
            flushing = Flushing(nats.url, database, names, jetstream_outbox_batch_size=500)
            flushing.prepare()
            if pin:
                with pinned(database.url):
                    took = measure(flushing, arguments.rounds, arguments.each)
            else:
                took = measure(flushing, arguments.rounds, arguments.each)
            flushing.close()
            first, last = sum(took[:2]) / 2, sum(took[-2:]) / 2
            print(f"{'pinned' if pin else 'free'}: SQL of a round, ms:", end=" ")
            print(*(f"{1000 * seconds:.0f}" for seconds in took))
            print(f"  first two {arguments.each / first:.0f} rows/s, last two", end=" ")
            print(f"{arguments.each / last:.0f} rows/s: {first / last:.2f}")


if __name__ == "__main__":
    main()
