"""What an administrator does with the outbox: look, retry, cancel, prune, replay.

Everything here is safe beside producers and flushers, and beside itself: short transactions, leases
where rows that are not sent are changed, and the database's clock. Nothing that is not published
is ever deleted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Connection, and_, delete, func, inspect, literal_column, select

from . import schema
from .config import Config
from .database import Database, again
from .flusher import Flusher
from .models import AT_ONCE, PARKED, Tables
from .outbox_changes import BATCH, Change, Outcome, Progress, free_waiting, pause
from .outbox_filter import EVERY_ROW, Filter, OutboxRow, shown_columns
from .outbox_replay import Moment, Replay, ReplayResult
from .outbox_status import table_state
from .sqltypes import db_now

__all__ = ("OutboxAdmin",)


class OutboxAdmin:
    """The commands over one outbox; part of ``jetstream.outbox``. Thread-safe.

    All of them raise ``OutboxUnavailableError`` where the database is away, and, but for
    :meth:`create_tables`, :meth:`ddl` and :meth:`differences`, ``ConfigurationError`` where the
    tables are not there.

    Args:
        config: the settings.
        database: the outbox's.
        flusher: this process's.
    """

    def __init__(self, config: Config, database: Database[Tables], flusher: Flusher) -> None:
        self._config = config
        self.database = database
        self.flusher = flusher

    def nudge(self, delay: float = 0.0) -> None:
        """Has the outbox flushed soon; here nobody does."""

    # -- tables ----------------------------------------------------------------------------------

    def create_tables(self) -> None:
        """Creates the tables; harmless to repeat, and where several processes start at once.

        What is there is left as it is; see :meth:`differences`.

        Raises:
            ConfigurationError: there is no such schema, or this user may not create tables.
        """
        schema.create_tables(self.database)

    def ddl(self) -> str:
        """The SQL that makes the tables in this kind of database, where there are none."""
        return schema.ddl(self.database.engine.dialect, self.database.tables)

    def differences(self) -> list[str]:
        """What in the database is not as it must be, each in words to act on; empty where all is.

        More columns are welcome where they may be left out of an INSERT.
        """
        with self.database.statements() as connection:
            return self._differences(connection)

    def _differences(self, connection: Connection) -> list[str]:
        tables, size = self.database.tables, self._config.max_payload
        return schema.differences(connection, tables, size)

    # -- looking ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """How the outbox is, as plain values for JSON; cheap whatever the table's size.

        ``database`` and ``tables`` (names), ``differences`` (see :meth:`differences`), ``breaker``
        (of this process), and where the tables are there ``counts`` by status (up to 10,000, then
        ``"10000+"``), ``oldest_due`` and ``oldest_pending`` (seconds or None: of the events that
        may go now, and of all that are pending), ``parked_keys``, and ``leases`` (owner to count
        of buckets).
        """
        tables, dialect = self.database.tables, self.database.engine.dialect
        found: dict[str, Any] = {
            "database": dialect.name,
            "tables": [table.fullname for table in tables],
            "breaker": self.flusher.breaker.tell(),
        }
        with self.database.statements() as connection:
            found["differences"] = self._differences(connection)
            if all(inspect(connection).has_table(t.name, schema=t.schema) for t in tables):
                found |= table_state(connection, tables)
        return found

    def exists(self, event_id: str) -> bool:
        """Whether there is a row with this event_id, whatever became of it."""
        columns = self.database.tables.outbox.c
        with self.database.statements() as connection:
            found = connection.scalar(select(columns.id).where(columns.event_id == event_id))
        return found is not None

    def get(self, event_id: str) -> OutboxRow | None:
        """The row of an event, with its headers and body; None where there is none."""
        tables = self.database.tables
        wanted = select(*shown_columns(tables, content=True))
        with self.database.statements() as connection:
            row = connection.execute(wanted.where(tables.outbox.c.event_id == event_id)).first()
        return None if row is None else OutboxRow.of(row)

    def find(
        self,
        chosen: Filter = EVERY_ROW,
        limit: int = 50,
        after: int | None = None,
    ) -> list[OutboxRow]:
        """Rows in the order in which they were written, without headers and body.

        Args:
            chosen: which ones.
            limit: how many at the most.
            after: go on after the row with this id.
        """
        tables, found = self.database.tables, list[OutboxRow]()
        columns, last = tables.outbox.c, after or 0
        wanted = select(*shown_columns(tables)).where(*chosen.conditions(tables))
        wanted = wanted.order_by(columns.id).limit(min(limit, BATCH))
        with self.database.statements() as connection:
            while len(found) < limit:
                page = connection.execute(wanted.where(columns.id > last)).all()
                if not page:
                    break
                last = page[-1].id
                found += [OutboxRow.of(row) for row in page if chosen.admits(row.event_type)]
        return found[:limit]

    # -- changing --------------------------------------------------------------------------------

    def retry(
        self, chosen: Filter, *, dry_run: bool = False, progress: Progress | None = None
    ) -> Outcome:
        """Has events published again that were given up, or wait for their next try.

        They may go at once, as if they had never failed (``last_error`` stays to be read), and the
        events of their keys that wait for them follow, in order.

        Args:
            chosen: which ones; ``Filter()`` for all.
            dry_run: only count them.
            progress: called with rows done and rows in all.
        """
        columns, pending = self.database.tables.outbox.c, self._status("pending")
        waiting = and_(
            pending, columns.attempts > 0, columns.due_at > db_now(), columns.due_at < PARKED
        )
        values = {
            "status": "pending",
            "due_at": AT_ONCE,
            "attempts": 0,
            "failing_since": None,
            "finished_at": None,
        }
        change = self._change(chosen, (self._status("failed", "exception"), waiting), values)
        if dry_run:
            return Outcome(change.count())
        outcome = change.run(progress)
        free_waiting(self.database)
        self.nudge()
        return outcome

    def cancel(
        self, chosen: Filter | str, *, dry_run: bool = False, progress: Progress | None = None
    ) -> Outcome:
        """Takes events back that are not sent: pending ones and those that were given up.

        What waited for one of them goes on. What is being published now is left: ``in_flight``.

        Args:
            chosen: which ones, ``Filter()`` for all; or one event's id.
            dry_run: only count them.
            progress: called with rows done and rows in all.
        """
        if isinstance(chosen, str):
            chosen = Filter(event_id=chosen)
        values = {"status": "cancelled", "finished_at": db_now()}
        eligible = (self._status("failed", "exception"), self._status("pending"))
        change = self._change(chosen, eligible, values)
        if dry_run:
            return Outcome(change.count())
        outcome = change.run(progress)
        if outcome.changed:
            self.nudge()
        return outcome

    def _change(self, chosen: Filter, eligible: Any, values: dict[str, Any]) -> Change:
        lease = self._config.outbox_lease
        return Change(self.database, self.flusher.rows, lease, chosen, eligible, values)

    def prune(
        self,
        older_than: float | None = None,
        *,
        dry_run: bool = False,
        max_seconds: float | None = None,
        stop: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
    ) -> int:
        """Deletes rows that were sent so long ago; nothing else is ever deleted.

        Also lets rows go that wait for a failed event that somebody has deleted.

        Args:
            older_than: seconds since ``finished_at``; default ``jetstream_outbox_retention``.
            dry_run: only count them.
            max_seconds: how long at the most.
            stop: asked between batches whether to end early.
            progress: called with rows done and rows in all.

        Returns:
            How many it deleted. Of several at once each counts its own.
        """
        end = float("inf") if max_seconds is None else time.monotonic() + max_seconds
        table = self.database.tables.outbox
        columns, sent = table.c, self._status("sent")
        age = self._config.outbox_retention if older_than is None else older_than
        deleted = total = 0
        with self.database.statements() as connection:
            until = connection.scalars(select(db_now(-age))).one()
            old = and_(sent, columns.finished_at < until)
            if dry_run or progress:
                total = connection.scalar(select(func.count()).where(old)) or 0
            if dry_run:
                return total
            found = select(columns.id, columns.finished_at).where(old)
            found = found.order_by(columns.finished_at).limit(BATCH)
            since = AT_ONCE
            while not stop() and time.monotonic() < end:
                # from where it was: what is deleted stays in the index until it is vacuumed
                batch = connection.execute(found.where(columns.finished_at >= since)).all()
                if not batch:
                    break
                since = batch[-1].finished_at
                ids = sorted(row.id for row in batch)
                some = delete(table).where(columns.id.in_(ids), sent)
                deleted += again(partial(connection.execute, some)).rowcount
                if progress:
                    progress(deleted, total)
                pause()
        free_waiting(self.database)
        return deleted

    def replay(
        self,
        since: Moment,
        until: Moment | None = None,
        chosen: Filter = EVERY_ROW,
        *,
        after: int = 0,
        dry_run: bool = False,
        rate: float | None = None,
        stop: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
    ) -> ReplayResult:
        """Publishes events again that were sent and are kept, in the order of their ids.

        For a JetStream that has lost what it had stored (its default is to sync to disk every two
        minutes). Bytes and ``event_id`` are those of the first time, so that consumers with an
        inbox pass over what they have handled; **others handle it twice**. As the stream would
        drop a known ``Nats-Msg-Id``, each gets a new one, and so does a second replay; the header
        ``x-replay`` says when the replay began. The rows are not changed.

        Args:
            since: what was stored (``finished_at``) since a time, or since so long ago: seconds or
                text such as ``"1h"``.
            until: and until then.
            chosen: which of them (its ages are those of ``created_at``).
            after: go on after the row with this id: the ``last_id`` of a replay that ended early.
            dry_run: only count them.
            rate: events a second, at the most.
            stop: asked between batches whether to end early.
            progress: called with rows done and rows in all.

        Returns:
            How far it came. An outage ends it, and is the result's ``error``.

        Raises:
            ValueError: ``since`` or ``until`` is neither.
        """
        replay = Replay(
            self.flusher, chosen, since=since, until=until, after=after, rate=rate, stop=stop
        )
        return ReplayResult(sent=replay.count()) if dry_run else replay.run(progress)

    def _status(self, *statuses: str) -> Any:
        """Written out, so that the database sees that its partial index is meant."""
        column = self.database.tables.outbox.c.status
        among: list[Any] = [literal_column(f"'{status}'") for status in statuses]
        return column == among[0] if len(among) == 1 else column.in_(among)
