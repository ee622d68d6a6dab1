"""Our outbox in a process of its own: fills it, drains it, and writes as an application does."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from celery import Celery
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
)
from sqlalchemy.orm import Session, sessionmaker

from benchmarks import events, process
from celery_jetstream import JetStream, signals
from celery_jetstream.schema import create_tables

#: The business's own table.
ORDERS = Table("orders", MetaData(), Column("id", Integer, primary_key=True), Column("body", Text))
NOTIFY = text("SELECT pg_notify('bench', '')")


class Client:
    """One app with an outbox.

    Args:
        database: the URL.
        nats: the URL; ``None`` never to connect.
        conf: further settings of Celery, ``jetstream_…`` and others.
        ordered: whether each event has its key.
        nudged: whether commits nudge; the filling never does.
    """

    def __init__(
        self,
        database: str,
        nats: str,
        conf: dict[str, Any],
        ordered: bool = True,
        nudged: bool = False,
    ) -> None:
        nudging = {**conf, "jetstream_outbox_nudge": nudged}
        self._jetstream = app_of(database, nats, nudging).jetstream
        silent = {**conf, "jetstream_outbox_nudge": False}
        self._quiet = app_of(database, nats, silent).jetstream
        self._outbox = self._jetstream.outbox
        self._engine = self._outbox.database.engine
        self._ordered = ordered
        self._statements = 0
        body = self._jetstream.publisher.message(**self._event(0, events.SIZE)).body
        self._size = 2 * events.SIZE - len(body)

    def _event(self, number: int, size: int = 0) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "event_type": "bench.created",
            "payload": events.payload(number, size or self._size),
        }
        if self._ordered:
            return {**arguments, "resource_type": "customer", "resource_id": events.key(number)}
        return arguments

    def _row_event(self, number: int) -> dict[str, Any]:
        return {**self._event(number), **({} if self._ordered else {"ordering_key": None})}

    # -- the backlog -----------------------------------------------------------------------------

    def create(self) -> None:
        """Makes the tables and the stream; is not connected to NATS by that."""
        create_tables(self._outbox.database)
        ORDERS.create(self._engine, checkfirst=True)
        self._quiet.provision()
        self._quiet.close()

    def connect(self) -> None:
        """Connects to NATS, so that nudges are followed here."""
        self._jetstream.connection.run(self._jetstream.connection.session, 5)

    def fill(self, first: int, count: int) -> None:
        with Session(self._quiet.outbox.database.engine) as session:
            for start in range(first, first + count, 1000):
                numbers = range(start, min(start + 1000, first + count))
                self._quiet.outbox.add_many(
                    session, [self._row_event(number) for number in numbers]
                )
            session.commit()

    def fill_fast(self, first: int, count: int) -> None:
        """Such rows, made by PostgreSQL out of one for each key: a million in a minute."""
        mark = 900_000_001
        rows = []
        for name in {events.key(number): number for number in range(10_000)}:
            event = self._event(0)
            event["payload"] |= {"number": mark, "key": name}
            _, row = self._outbox._row({**event, "resource_id": name, "event_id": f"bench-{mark}"})
            rows.append(row)
        filling = text(
            f"INSERT INTO {self._outbox.flusher.rows.table.name} (event_id, event_type, subject, "
            "ordering_key, bucket, on_failure, headers, body, status, attempts, due_at, created_at)"
            " SELECT 'bench-' || n, :event_type, :subject, k.name, k.bucket, :on_failure, :headers,"
            " convert_to(replace(k.body, :mark, n::text), 'UTF8'), 'pending', 0, 'epoch', now() "
            "FROM generate_series(cast(:first AS int), :last) n "
            "JOIN unnest(cast(:names AS text[]), cast(:buckets AS int[]), cast(:bodies AS text[])) "
            "WITH ORDINALITY AS k(name, bucket, body, i) ON k.i = 1 + n % :keys ORDER BY n"
        )
        with self._engine.begin() as connection:
            connection.execute(
                filling,
                {
                    **rows[0],
                    "mark": str(mark),
                    "first": first,
                    "last": first + count - 1,
                    "names": [row["ordering_key"] for row in rows],
                    "buckets": [row["bucket"] for row in rows],
                    "bodies": [row["body"].decode() for row in rows],
                    "keys": len(rows),
                },
            )

    def drain(self, first: int | None = None) -> dict[str, Any]:
        """Publishes what is there, or the first so many; counts the statements."""
        self._statements = sent = 0

        def count(*_: Any) -> None:
            self._statements += 1

        def published(rows: Any, **_: Any) -> None:
            nonlocal sent
            sent += len(rows)

        event.listen(self._engine, "before_cursor_execute", count)
        signals.outbox_published.connect(published, weak=False)
        start = time.perf_counter()
        result = self._outbox.drain(stop=lambda: first is not None and sent >= first)
        took = time.perf_counter() - start
        event.remove(self._engine, "before_cursor_execute", count)
        signals.outbox_published.disconnect(published)
        return {"seconds": took, "statements": self._statements, **result.as_dict()}

    def pending(self) -> dict[str, Any]:
        table = self._outbox.flusher.rows.table
        with self._engine.connect() as connection:
            by_status = select(table.c.status, func.count()).group_by(table.c.status)
            return {"rows": dict(connection.execute(by_status).tuples().all())}

    # -- the application -------------------------------------------------------------------------

    def write(self, count: int, gap: float) -> dict[str, Any]:
        """Writes events one by one; when each commit was, by the clock on the wall."""
        committed = []
        with Session(self._engine) as session:
            for number in range(count):
                time.sleep(gap)
                self._outbox.add(session, **self._row_event(number))
                session.commit()
                committed.append(time.time_ns())
        return {"committed": committed}

    def commit(self, threads: int, seconds: float, extra: str) -> dict[str, Any]:
        """Commits orders for a while, each with what else there is: nothing, row or notify."""
        sessions = sessionmaker(self._engine_for(threads))
        counts, spent = [0] * threads, [0.0] * threads
        barrier = threading.Barrier(threads + 1)

        def work(mine: int) -> None:
            with sessions() as session:
                for _ in range(20):  # warm
                    session.execute(insert(ORDERS).values(body="o" * 200))
                    session.commit()
                barrier.wait()
                end = time.perf_counter() + seconds
                number = mine * 10_000_000
                while time.perf_counter() < end:
                    number += 1
                    session.execute(insert(ORDERS).values(body="o" * 200))
                    if extra != "nothing":
                        arguments = self._row_event(number)
                        start = time.perf_counter()
                        self._outbox.add(session, **arguments)
                        spent[mine] += time.perf_counter() - start
                    if extra == "notify":
                        session.execute(NOTIFY)
                    session.commit()
                    counts[mine] += 1

        running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for thread in running:
            thread.start()
        barrier.wait()
        start = time.perf_counter()
        for thread in running:
            thread.join()
        took = time.perf_counter() - start
        commits = sum(counts)
        return {"commits": commits, "seconds": took, "add_us": 1e6 * sum(spent) / commits}

    def _engine_for(self, threads: int) -> Any:
        if not hasattr(self, "_applications"):
            self._applications = create_engine(self._engine.url, pool_size=threads)
        return self._applications

    def add(self, how: str, transactions: int, size: int) -> dict[str, Any]:
        """Writes so many events per transaction; microseconds per event, the median."""
        took = []
        with Session(self._engine) as session:
            for number in range(transactions):
                given = [self._row_event(number * size + index) for index in range(size)]
                start = time.perf_counter()
                self._adders[how](session, given)
                took.append(1e6 * (time.perf_counter() - start) / size)
                session.commit()
        return {"us": statistics.median(took)}

    @property
    def _adders(self) -> dict[str, Callable[[Session, list[dict[str, Any]]], None]]:
        def insert_each(session: Session, given: list[dict[str, Any]]) -> None:
            for arguments in given:
                session.execute(insert(ORDERS), {"body": json.dumps(arguments)})

        def add_each(session: Session, given: list[dict[str, Any]]) -> None:
            for arguments in given:
                self._quiet.outbox.add(session, **arguments)

        def add_many(session: Session, given: list[dict[str, Any]]) -> None:
            self._quiet.outbox.add_many(session, given)

        return {"INSERT": insert_each, "add": add_each, "add_many": add_many}


def app_of(database: str, nats: str, conf: dict[str, Any]) -> Celery:
    """The app, as all of its processes have it."""
    app = Celery("bench", set_as_current=False)
    app.conf.update(
        {
            "broker_url": "memory://",
            "broker_connection_retry_on_startup": True,
            "jetstream_app_name": "bench",
            "jetstream_destination_app": "desk",
            "jetstream_stream_name": "bench",
            "jetstream_database_url": database,
            "jetstream_nats_urls": nats,
            **conf,
        }
    )
    JetStream(app)
    return app


if __name__ == "__main__":
    client = Client(**process.settings())
    process.serve(
        {
            "add": client.add,
            "commit": client.commit,
            "connect": client.connect,
            "create": client.create,
            "drain": client.drain,
            "fill": client.fill,
            "fill_fast": client.fill_fast,
            "pending": client.pending,
            "write": client.write,
        }
    )
