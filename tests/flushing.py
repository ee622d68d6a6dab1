"""An outbox with its stream, for tests of the flush: rows in, messages out, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from celery import Celery
from nats.aio.msg import Msg
from sqlalchemy import Connection, event, select, text, update

from celery_jetstream import JetStream, capabilities
from celery_jetstream.deadletter import fetch_original
from celery_jetstream.delivery import Delivery
from celery_jetstream.flusher import Flusher, FlushResult
from celery_jetstream.models import bucket_of
from celery_jetstream.outbox import Outbox
from celery_jetstream.schema import create_tables
from celery_jetstream.session import Session
from celery_jetstream.sqltypes import db_now
from tests.conftest import Names
from tests.databases import Database

BATCHED_GET = capabilities.Feature("a direct get of several messages", (2, 11, 0), "")

__all__ = ("Flushing", "Responder", "Threads", "in_order", "statements")


class Flushing:
    """One process's outbox: an app, its connections to NATS and to the database.

    Events have numbers as ids, in the order of writing.
    """

    def __init__(self, url: str, database: Database, names: Names, **settings: Any) -> None:
        self.again: Callable[[], Flushing] = lambda: Flushing(url, database, names, **settings)
        self.app = Celery("test", broker="memory://", set_as_current=False)
        self.settings: dict[str, Any] = {
            "jetstream_nats_urls": url,
            "jetstream_stream_name": names.stream_name,
            "jetstream_app_name": names.app_name,
            "jetstream_destination_app": names.destination_app,
            "jetstream_database_url": database.url,
            "jetstream_outbox_nudge": False,
            **settings,
        }
        self.app.conf.update(self.settings)
        self.jetstream = JetStream(self.app)
        self.stream = names.stream_name
        self.subject = f"{names.app_name}.sync.{names.destination_app}"
        self.other = f"{names.app_name}.other"
        self.kind = database.kind
        self._written = 0

    @property
    def outbox(self) -> Outbox:
        return self.jetstream.outbox

    @property
    def flusher(self) -> Flusher:
        return self.outbox.flusher

    @property
    def engine(self) -> Any:
        return self.outbox.database.engine

    @property
    def table(self) -> Any:
        return self.outbox.database.tables.outbox

    @property
    def buckets(self) -> Any:
        return self.outbox.database.tables.buckets

    def prepare(self) -> Flushing:
        """Makes the tables and the stream."""
        create_tables(self.outbox.database)
        self.jetstream.provision()
        self.update_stream(allow_direct=True)
        return self

    def close(self) -> None:
        self.jetstream.close()

    # -- rows ------------------------------------------------------------------------------------

    def write(self, *keys: str | None, start: int | None = None, **event: Any) -> list[str]:
        """Writes an event for each key, with the next number as its id."""
        first = self._written + 1 if start is None else start
        events = [
            {
                "event_type": "order.paid",
                "payload": {"n": number},
                "event_id": str(number),
                "ordering_key": key,
                "subject": self.subject,
                **event,
            }
            for number, key in enumerate(keys, first)
        ]
        self._written = max(self._written, first + len(keys) - 1)
        with self.engine.begin() as connection:
            return self.outbox.add_many(connection, events)

    def fill(self, count: int, *, keys: int = 100, subject: str = "", **columns: Any) -> None:
        """Writes many plain rows, at once: number n has the key ``k{n % keys}`` (0: none)."""
        subject = subject or self.subject
        first, self._written = self._written + 1, self._written + count
        rows = [_row(number, keys, subject) for number in range(first, first + count)]
        statement = self.flusher.rows.insert()
        with self.engine.begin() as connection:
            for at in range(0, count, 10_000):
                connection.execute(statement, rows[at : at + 10_000])
            if columns:
                inserted = self.table.c.event_id.in_([row["event_id"] for row in rows])
                connection.execute(update(self.table).where(inserted).values(columns))

    def rows(self, *ids: str) -> list[Any]:
        """The rows, all or some, in the order of their writing."""
        found = select(self.table).order_by(self.table.c.id)
        if ids:
            found = found.where(self.table.c.event_id.in_(ids))
        with self.engine.connect() as connection:
            return list(connection.execute(found).all())

    def row(self, event_id: str) -> Any:
        (row,) = self.rows(event_id)
        return row

    def count(self, status: str) -> int:
        return sum(row.status == status for row in self.rows())

    def statuses(self) -> dict[str, str]:
        return {row.event_id: row.status for row in self.rows()}

    def change(self, *ids: str, **values: Any) -> None:
        """Changes rows by hand."""
        with self.engine.begin() as connection:
            changed = update(self.table).where(self.table.c.event_id.in_(ids)).values(values)
            assert connection.execute(changed).rowcount == len(ids)

    def sql(self, statement: str, **values: Any) -> Any:
        with self.engine.begin() as connection:
            result = connection.execute(text(statement), values)
            return result.all() if result.returns_rows else result.rowcount

    def sql_rows(self, statement: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(statement).all())

    def sql_now(self) -> Any:
        """The database's clock."""
        with self.engine.connect() as connection:
            return connection.execute(select(db_now())).scalar_one()

    def lease(self, owner: str, until: Any, buckets: Sequence[int] = range(64)) -> None:
        """Gives buckets to somebody, whoever has them."""
        table = self.outbox.database.tables.buckets
        theirs = table.c.bucket.in_(list(buckets))
        with self.engine.begin() as connection:
            connection.execute(update(table).where(theirs).values(owner=owner, until=until))

    def leases(self) -> set[str]:
        """Who has buckets (or had, and did not give them back)."""
        table = self.outbox.database.tables.buckets
        with self.engine.connect() as connection:
            return set(connection.scalars(select(table.c.owner))) - {""}

    def holds(self) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(select(self.outbox.database.tables.holds)).all())

    # -- flushing --------------------------------------------------------------------------------

    def drain(self, max_seconds: float | None = 20.0) -> FlushResult:
        return self.outbox.drain(max_seconds)

    # -- the stream ------------------------------------------------------------------------------

    def stored(self, stream: str = "") -> list[str]:
        """The ids in the stream, in its order."""
        return [(message.headers or {})["Nats-Msg-Id"] for message in self.messages(stream)]

    def messages(self, stream: str = "") -> list[Msg]:
        return self.jetstream.connection.run(self._read, stream or self.stream)

    async def _read(self, stream: str) -> list[Msg]:
        session = await self.jetstream.connection.session()
        if not capabilities.has(session.server_version, BATCHED_GET):
            return await _read_one_by_one(session, stream)
        inbox, found, ended = session.client.new_inbox(), list[Msg](), asyncio.Event()

        def receive(message: Msg) -> None:
            if message.data:
                found.append(message)
            else:  # the end of the batch, or nothing there
                ended.set()

        subscription = await session.subscribe(inbox, receive)
        left, sequence = True, 1
        while left:
            ended.clear()
            request = {"batch": 5000, "seq": sequence}
            await session.publish(
                f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), reply=inbox
            )
            before = len(found)
            await asyncio.wait_for(ended.wait(), 20)
            left = len(found) > before
            sequence = int((found[-1].headers or {})["Nats-Sequence"]) + 1 if found else 1
        await session.unsubscribe(subscription)
        return found

    def api(self, operation: str, **request: Any) -> dict[str, Any]:
        """A request to JetStream's API that must succeed."""
        answer = self.jetstream.connection.run(self.jetstream._api, operation, request)
        assert "error" not in answer, answer
        return answer

    def make_stream(self, name: str, *subjects: str, **config: Any) -> None:
        self.api(
            f"STREAM.CREATE.{name}", name=name, subjects=list(subjects), allow_direct=True, **config
        )

    def update_stream(self, **config: Any) -> None:
        found = self.api(f"STREAM.INFO.{self.stream}")["config"]
        self.api(f"STREAM.UPDATE.{self.stream}", **{**found, **config})


async def _read_one_by_one(session: Session, stream: str) -> list[Msg]:
    """As JetStream's direct get would return them."""
    answer = await session.ask(f"$JS.API.STREAM.INFO.{stream}")
    state = json.loads(answer.data)["state"]
    sequences = range(max(1, state["first_seq"]), state["last_seq"] + 1)
    found: list[Msg] = []
    for start in range(0, len(sequences), 256):
        block = [
            Delivery.from_reply(f"$JS.ACK.{stream}.none.1.{sequence}.0.0.0")
            for sequence in sequences[start : start + 256]
        ]
        originals = await asyncio.gather(*(fetch_original(session, one) for one in block))
        for delivery, original in zip(block, originals, strict=True):
            if original is not None:
                own = {"Nats-Subject": original.subject, "Nats-Sequence": str(delivery.sequence)}
                headers = {**original.headers, **own}
                found.append(Msg(session.client, original.subject, "", original.body, headers))
    return found


class Responder:
    """Answers what is published to a subject that no stream has, as it is told."""

    def __init__(self, flushing: Flushing) -> None:
        self.accepted: list[str] = []
        self.answers: dict[str, bytes | None] = {}
        self._flushing = flushing
        flushing.jetstream.connection.run(self._listen)

    async def _listen(self) -> None:
        self._session = await self._flushing.jetstream.connection.session()
        await self._session.subscribe(self._flushing.other, self._answer)

    def _answer(self, message: Msg) -> None:
        event_id = (message.headers or {})["Nats-Msg-Id"]
        answer = self.answers.get(event_id, b"")
        if answer == b"":
            self.accepted.append(event_id)
            answer = b'{"stream":"x","seq":%d}' % len(self.accepted)
        if answer is not None:
            self._session.post(message.reply, answer, {}, None)
            self._session.flush()


def _row(number: int, keys: int, subject: str) -> dict[str, Any]:
    event_id, key = str(number), f"k{number % keys}" if keys else ""
    return {
        "event_id": event_id,
        "event_type": "order.paid",
        "subject": subject,
        "ordering_key": key,
        "bucket": bucket_of(subject, key, event_id),
        "on_failure": "park",
        "headers": "{}",
        "body": b'{"event_id":"%d","event_type":"order.paid","payload":{"n":%d}}'
        % (number, number),
    }


def in_order(stored: Sequence[str], rows: Sequence[Any]) -> None:
    """Each row is in the stream once, and those of a key in the order of their writing."""
    assert len(stored) == len(set(stored)), "stored twice"
    assert set(stored) == {row.event_id for row in rows}
    at = {event_id: place for place, event_id in enumerate(stored)}
    last: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.ordering_key:
            key = (row.subject, row.ordering_key)
            assert last.get(key, -1) < at[row.event_id], f"{row.event_id} came too early"
            last[key] = at[row.event_id]


@contextlib.contextmanager
def statements(engine: Any) -> Iterator[list[str]]:
    """What is executed meanwhile."""
    seen: list[str] = []

    def note(_: Connection, __: Any, statement: str, *___: Any) -> None:
        seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)


class Threads:
    """Functions that run at once; what one of them raises is raised at the end."""

    def __init__(self, *functions: Callable[[], object]) -> None:
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(one,)) for one in functions]

    def _run(self, function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            self._errors.append(error)

    def __enter__(self) -> Threads:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(60)
        if self._errors:
            raise self._errors[0]
