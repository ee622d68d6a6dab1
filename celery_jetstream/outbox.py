"""The outbox: an event is written in the caller's transaction, and published after its commit.

``jetstream.outbox``. What is written here has been checked as what is published at once is, so
that an event that cannot be sent fails the transaction that it belongs to.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timedelta
from hashlib import blake2b
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from sqlalchemy import Connection as DatabaseConnection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session

from . import readers
from .config import Config
from .connection import Connection
from .database import Database, Engines, mapped_table
from .exceptions import EventError, shown
from .flusher import Flusher, FlushResult
from .models import AT_ONCE, PARKED, Tables, bucket_of, outbox_model
from .nudge import Nudger, nudge_after_commit
from .outbox_admin import OutboxAdmin
from .outcomes import Message, PublishResult, Verdict
from .publisher import Publisher
from .sqltypes import db_now
from .transactions import transaction_id

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

    Asynchronous = AsyncSession | async_scoped_session[Any] | AsyncConnection

__all__ = ("Outbox",)

logger = logging.getLogger(__name__)

Synchronous = Session | scoped_session[Any] | DatabaseConnection
#: Rows to be written by one statement, and when they are due.
Block = tuple[datetime | float, list[dict[str, Any]]]
T = TypeVar("T")

#: Characters of an ordering key.
KEY_LENGTH = 255
#: Bytes of bodies and headers in one statement: MariaDB takes 16 MiB, and escapes them.
BLOCK_SIZE = 4 * 1024**2
#: Seconds that a flush after a commit may take in a process that is connected; what is left then
#: is the beat's.
NUDGED_SECONDS = 2.0


class Outbox(OutboxAdmin):
    """One app's outbox in one process. Thread-safe; a forked child makes its own.

    Args:
        config: the settings.
        connection: the process's connection to NATS.
        publisher: the process's publisher.
        send_flush: sends the task ``flush_outbox``; for processes without a connection.
        engines: the process's; the outbox's database is one of them.
    """

    def __init__(
        self,
        config: Config,
        connection: Connection,
        publisher: Publisher,
        send_flush: Callable[[], None],
        engines: Engines,
    ) -> None:
        tables = Tables.of(mapped_table(config, "outbox", outbox_model))
        self.database = Database(engines, "outbox", tables)
        self.flusher = Flusher(config, self.database, connection, publisher)
        super().__init__(config, self.database, self.flusher)
        self._config = config
        self._connection = connection
        self._publisher = publisher
        self._send_flush = send_flush
        self._insert_at_once = self.flusher.rows.insert()  # once: half the time of an add
        self._nudger = Nudger(self._flush_soon)
        self._flushes_until = float("inf")

    # -- writing ---------------------------------------------------------------------------------

    @overload
    def add(self, session: Synchronous, **event: Any) -> str: ...
    @overload
    def add(self, session: Asynchronous, **event: Any) -> Awaitable[str]: ...
    def add(self, session: Any, **event: Any) -> str | Awaitable[str]:
        """Writes an event as a row, in the session's transaction; never commits.

        After the commit it is published within milliseconds, or, where that nudge is lost, by the
        next flush. A rollback, also of a savepoint, takes it back.

        Args:
            session: a ``Session`` or a Core ``Connection``; or an ``AsyncSession`` or
                ``AsyncConnection``, and then the result is to be awaited.
            event: the arguments of ``JetStream.publish``, and

                * ``ordering_key``: events with one key (and subject) are published in the order in
                  which they were written; default ``resource_type:resource_id``; ``None`` for none;
                * ``deliver_at`` (a time with its offset) or ``delay`` (seconds or a timedelta, by
                  the database's clock): not before; until then ``cancel`` takes it back;
                * ``on_failure``: where the event is given up, ``"park"`` has its key wait for it,
                  ``"skip"`` lets the key go on; default ``jetstream_outbox_on_failure``.

        Returns:
            The event's id.

        Raises:
            EventError: the event cannot be sent as it is; nothing was written.
            SubjectError: the subject or destination is not legal.
            sqlalchemy.exc.IntegrityError: there is a row with this ``event_id``.
        """
        due_at, row = self._row(event)
        event_id: str = row["event_id"]
        return self._write(session, [(due_at, [row])], event_id)

    @overload
    def add_many(self, session: Synchronous, events: Iterable[Mapping[str, Any]]) -> list[str]: ...
    @overload
    def add_many(
        self, session: Asynchronous, events: Iterable[Mapping[str, Any]]
    ) -> Awaitable[list[str]]: ...
    def add_many(
        self, session: Any, events: Iterable[Mapping[str, Any]]
    ) -> list[str] | Awaitable[list[str]]:
        """Writes many events in as few statements as the database allows; see :meth:`add`.

        All are checked before the first is written.

        Args:
            session: as for :meth:`add`.
            events: the arguments of :meth:`add` for each event, as dicts.

        Returns:
            The events' ids, in order.

        Raises:
            EventError: an event cannot be sent; names its index. Nothing was written.
        """
        blocks: list[Block] = []
        size = 0
        for index, event in enumerate(events):
            try:
                due_at, row = self._row(dict(event))
            except (EventError, TypeError, ValueError) as error:
                error.args = (f"event {index} of the batch: {error}", *error.args[1:])
                raise
            own = len(row["body"]) + len(row["headers"])
            size += own
            if not blocks or blocks[-1][0] != due_at or size > BLOCK_SIZE:
                blocks.append((due_at, []))
                size = own
            blocks[-1][1].append(row)
        ids = [row["event_id"] for _, rows in blocks for row in rows]
        return self._write(session, blocks, ids)

    def publish(self, event_type: str, payload: Any, **event: Any) -> PublishResult:
        """Writes an event in a transaction of its own, and nudges the flush.

        An event whose ``event_id`` has a row is not written again.

        Args:
            event_type: as for ``JetStream.publish``.
            payload: as there.
            event: the arguments of :meth:`add`.

        Returns:
            A result with ``success`` and ``queued``.

        Raises:
            EventError: the event cannot be sent as it is.
            OutboxUnavailableError: the database is away; nothing was written.
        """
        due_at, row = self._row({"event_type": event_type, "payload": payload, **event})

        def write(connection: DatabaseConnection) -> None:
            connection.execute(self._insert(due_at), row)

        duplicate = False
        try:
            self.database.transaction(write)
        except IntegrityError:
            if not self.exists(row["event_id"]):
                raise
            duplicate = True
        self.nudge()
        return PublishResult(
            True,
            row["event_id"],
            row["subject"],
            duplicate=duplicate,
            verdict=Verdict.QUEUED,
            queued=True,
        )

    def _row(self, event: dict[str, Any]) -> tuple[datetime | float, dict[str, Any]]:
        """When an event is due (a time, or seconds from now), and its row; checked."""
        due_at = _due_at(event.pop("deliver_at", None), event.pop("delay", None))
        ordering_key = event.pop("ordering_key", ...)
        on_failure = event.pop("on_failure", None) or self._config.outbox_on_failure
        if on_failure not in ("park", "skip"):
            raise EventError(f"on_failure is {shown(on_failure)}; give 'park' or 'skip'")
        for name in ("event_type", "payload"):
            if name not in event:
                raise EventError(f"the event has no {name}")
        message = self._publisher.message(**event)
        key = _ordering_key(ordering_key, message)
        headers = {name: value for name, value in message.headers.items() if name != "Nats-Msg-Id"}
        return due_at, {
            "event_id": message.event_id,
            "event_type": event["event_type"],
            "subject": message.subject,
            "ordering_key": key,
            "bucket": bucket_of(message.subject, key, message.event_id),
            "on_failure": on_failure,
            "headers": json.dumps(headers) if headers else "{}",
            "body": message.body,
        }

    def _insert(self, due_at: datetime | float) -> Any:
        if due_at is AT_ONCE:
            return self._insert_at_once
        moment = due_at if isinstance(due_at, datetime) else db_now(due_at)
        return self.flusher.rows.insert(moment)

    def _write(self, session: Any, blocks: list[Block], result: T) -> T | Awaitable[T]:
        """Executes the INSERTs; what is to be awaited, for an asynchronous session."""
        if _is_asynchronous(session):
            return self._write_async(session, blocks, result)
        if not isinstance(session, (Session, scoped_session, DatabaseConnection)):
            raise TypeError(f"{session!r} is neither a session nor a connection of SQLAlchemy's")
        self._execute(session, blocks)
        return result

    async def _write_async(self, session: Any, blocks: list[Block], result: T) -> T:
        if not hasattr(session, "run_sync"):  # an async_scoped_session
            session = session()
        await session.run_sync(self._execute, blocks)
        return result

    def _execute(self, session: Any, blocks: list[Block]) -> None:
        table, connection = self.flusher.rows.table, session
        if not isinstance(session, DatabaseConnection):  # a session's execute() flushes, from 2.1
            connection = session.connection(bind_arguments={"clause": table})
        with self.database.tables_there(connection):
            if self._config.outbox_atomic:
                blocks = _marked(blocks, transaction_id(connection))
            for due_at, rows in blocks:
                statement: Any = self._insert(due_at)
                if len(rows) > 1 and connection.dialect.insert_executemany_returning:
                    # has SQLAlchemy write VALUES of many rows, in as few statements as can be
                    statement = statement.returning(table.c.id)
                connection.execute(statement, rows).close()
        if blocks and self._config.outbox_nudge:
            nudge_after_commit(session, self.nudge)

    # -- flushing --------------------------------------------------------------------------------

    def drain(
        self, max_seconds: float | None = None, stop: Callable[[], bool] = lambda: False
    ) -> FlushResult:
        """Publishes what is due, here and now; any number at once is correct.

        Args:
            max_seconds: how long at the most; None until nothing is due.
            stop: asked between batches whether to end early.

        Raises:
            OutboxUnavailableError: the database is away.
            ConfigurationError: the tables are not there.
        """
        return self.flusher.flush(max_seconds, stop)

    def nudge(self, delay: float = 0.0) -> None:
        """Has the outbox flushed soon; never waits, never raises.

        Here, in a thread, where this process is connected to NATS; else by sending the task
        ``flush_outbox``.
        """
        if self._config.outbox_nudge:
            self._nudger.nudge(delay)

    def _flush_soon(self) -> None:
        if self._connection.connected:
            self.flusher.flush(NUDGED_SECONDS, lambda: time.monotonic() > self._flushes_until)
        else:
            self._send_flush()

    def close(self, timeout: float = 1.0) -> None:
        """Sends a nudge that is due; a flush that runs ends, and leaves no lease behind."""
        self._flushes_until = time.monotonic() + timeout / 2
        self._nudger.close(timeout)


def _is_asynchronous(session: Any) -> bool:
    """Whether it is one of ``sqlalchemy.ext.asyncio``, which is not imported: it needs greenlet."""
    found = sys.modules.get("sqlalchemy.ext.asyncio")
    return found is not None and isinstance(
        session, (found.AsyncSession, found.async_scoped_session, found.AsyncConnection)
    )


def _marked(blocks: list[Block], transaction: str) -> list[Block]:
    """With what the rows of a transaction have in common; what is due later goes by itself."""
    return [
        (due_at, [{**row, "transaction_id": transaction} for row in rows])
        if due_at is AT_ONCE
        else (due_at, rows)
        for due_at, rows in blocks
    ]


_delay = readers.seconds("0s", "36500d")


def _due_at(deliver_at: Any, delay: Any) -> datetime | float:
    if deliver_at is None and delay is None:
        return AT_ONCE
    if deliver_at is not None and delay is not None:
        raise EventError("give either deliver_at= or delay=, not both")
    if delay is not None:
        try:
            return _delay(delay) or AT_ONCE
        except ValueError as error:
            raise EventError(f"delay is {shown(delay)}: {error}") from None
    if not isinstance(deliver_at, datetime) or deliver_at.utcoffset() is None:
        raise EventError(f"deliver_at is {shown(deliver_at)}; give a datetime with its offset")
    if deliver_at >= PARKED:
        raise EventError(f"deliver_at is {shown(deliver_at)}; give a time before {PARKED:%Y}")
    return max(deliver_at, AT_ONCE + timedelta(seconds=1))


def _ordering_key(given: Any, message: Message) -> str:
    event = message.event
    if given is None or (given is ... and (event is None or not event.resource_id)):
        return ""
    if given is ... or isinstance(given, EllipsisType):
        assert event is not None
        key = f"{event.resource_type}:{event.resource_id}"
        if not _is_key(key):
            key = f"{key.encode().hex()[:64]}-{blake2b(key.encode(), digest_size=16).hexdigest()}"
        return key
    if not isinstance(given, str) or not _is_key(given):
        raise EventError(
            f"ordering_key is {shown(given)}; give printable text of 1 to {KEY_LENGTH} characters, "
            "with no blank at either end, or None for an event that need not wait for others"
        )
    return given


def _is_key(text: str) -> bool:
    """Whether it is a key in every database; in MariaDB ``"a "`` would be ``"a"``."""
    return 0 < len(text) <= KEY_LENGTH and text.isprintable() and text == text.strip()
