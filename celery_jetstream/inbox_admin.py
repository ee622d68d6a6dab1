"""What an administrator does with the inbox: look, prune, have an event handled once more."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    and_,
    delete,
    func,
    inspect,
    literal_column,
    or_,
    select,
    tuple_,
    update,
)

from . import schema, subjects
from .config import Config
from .database import Database, again
from .inbox_models import STATUSES
from .inbox_rows import InboxRows
from .outbox_changes import BATCH, Progress, pause
from .specs import retention_warnings
from .sqltypes import db_now

__all__ = ("EVERYTHING", "InboxAdmin", "InboxFilter", "InboxRow")

#: Rows are counted no further than this.
CAP = 10_000


@dataclass(frozen=True)
class InboxFilter:
    """Which rows; all that is given must be true of a row.

    Attributes:
        status: one of ``received``, ``processing``, ``processed``, ``failed``.
        event_type: a type, or a pattern as handlers have it: ``user.*``, ``order.>``.
        handler: the handler's task name, or its ``inbox_key``.
        event_id: the event's id.
        older_than: seconds since ``updated_at``, by the database's clock, at least.
        newer_than: the same, at most.
    """

    status: str | None = None
    event_type: str | None = None
    handler: str | None = None
    event_id: str | None = None
    older_than: float | None = None
    newer_than: float | None = None

    def __post_init__(self) -> None:
        if self.status is not None and self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}; give one of {', '.join(STATUSES)}")
        if self.event_type is not None:
            subjects.validate_pattern(self.event_type)

    def conditions(self, table: Table) -> list[ColumnElement[bool]]:
        """What SQL can tell; :meth:`admits` tells the rest."""
        row = table.c
        equal = ("handler", "event_id")
        found = [row[name] == value for name in equal if (value := getattr(self, name)) is not None]
        if self.status is not None:
            found.append(row.status == literal_column(f"'{self.status}'"))
        if self.event_type is not None:
            literal = self.event_type.partition("*")[0].partition(">")[0]
            found.append(row.event_type.startswith(literal, autoescape=True))
        if self.older_than is not None:
            found.append(row.updated_at <= db_now(-self.older_than))
        if self.newer_than is not None:
            found.append(row.updated_at >= db_now(-self.newer_than))
        return found

    def admits(self, event_type: str) -> bool:
        """Whether an event type falls under the pattern."""
        return self.event_type is None or subjects.matches(self.event_type, event_type)


EVERYTHING = InboxFilter()


@dataclass(frozen=True)
class InboxRow:
    """A row of the inbox, to be shown; as in :class:`~celery_jetstream.models.InboxMixin`.

    Attributes:
        age: seconds since ``updated_at``, by the database's clock.
    """

    event_id: str
    handler: str
    event_type: str
    status: str
    attempts: int
    deliveries: int
    stream: str
    sequence: int
    leased_until: datetime | None
    first_seen_at: datetime
    updated_at: datetime
    processed_at: datetime | None
    last_error: str | None
    age: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in vars(self).items()
        }


class InboxAdmin:
    """The commands over one inbox; part of ``jetstream.inbox``. Thread-safe.

    All of them raise ``InboxUnavailableError`` where the database is away, and, but for
    :meth:`create_tables`, :meth:`ddl` and :meth:`differences`, ``ConfigurationError`` where the
    table is not there.

    Args:
        config: the settings.
        database: the inbox's.
        rows: its statements.
    """

    def __init__(self, config: Config, database: Database[tuple[Table]], rows: InboxRows) -> None:
        self._config = config
        self.database = database
        self.rows = rows

    # -- tables ----------------------------------------------------------------------------------

    def create_tables(self) -> None:
        """Creates the table; harmless to repeat, and where several processes start at once.

        Raises:
            ConfigurationError: there is no such schema, or this user may not create tables.
        """
        schema.create_tables(self.database)

    def ddl(self) -> str:
        """The SQL that makes the table in an empty database."""
        return schema.ddl(self.database.engine.dialect, self.database.tables)

    def differences(self) -> list[str]:
        """What of the table is not as it must be, in words to act on; empty where all is."""
        with self.database.statements() as connection:
            return schema.differences(connection, self.database.tables)

    # -- looking ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """How the inbox is: ``database``, ``table``, ``differences``, ``retention``, ``warnings``.

        With the table there, also ``counts`` by status (of at most 10,000 rows of each) and
        ``oldest_processing``: seconds since the oldest of those that run began, None where none
        does.
        """
        table = self.rows.table
        found: dict[str, Any] = {
            "database": self.database.engine.dialect.name,
            "table": table.fullname,
            "retention": self._config.inbox_retention,
            "warnings": retention_warnings(
                self._config.inbox_retention, self._config.max_age, self._config.duplicate_window
            ),
        }
        with self.database.statements() as connection:
            found["differences"] = schema.differences(connection, self.database.tables)
            if inspect(connection).has_table(table.name, schema=table.schema):
                found |= self._counts(connection)
        return found

    def _counts(self, connection: Connection) -> dict[str, Any]:
        row = self.rows.table.c
        counts: dict[str, int | str] = {}
        for status in STATUSES:
            some = select(row.event_id).where(row.status == literal_column(f"'{status}'"))
            counted = select(func.count()).select_from(some.limit(CAP + 1).subquery())
            count = connection.scalars(counted).one()
            counts[status] = f"{CAP}+" if count > CAP else count
        oldest = select(func.min(row.updated_at), db_now()).where(row.status == "processing")
        since, now = connection.execute(oldest).one()
        age = None if since is None else round((now - since).total_seconds(), 3)
        return {"counts": counts, "oldest_processing": age}

    def get(self, event_id: str, handler: str | None = None) -> list[InboxRow]:
        """The rows of an event: one for each handler that has seen it."""
        return self.find(InboxFilter(event_id=event_id, handler=handler), limit=1000)

    def find(self, chosen: InboxFilter = EVERYTHING, limit: int = 50) -> list[InboxRow]:
        """Rows, those first that changed last; ``limit`` of them at the most."""
        table, found = self.rows.table, list[InboxRow]()
        names = [field.name for field in fields(InboxRow) if field.name != "age"]
        wanted = select(*(table.c[name] for name in names), db_now().label("now"))
        wanted = wanted.where(*chosen.conditions(table))
        wanted = wanted.order_by(table.c.updated_at.desc(), table.c.event_id, table.c.handler)
        with self.database.statements() as connection:
            for row in connection.execute(wanted.limit(limit if not chosen.event_type else BATCH)):
                if chosen.admits(row.event_type) and len(found) < limit:
                    values = dict(row._mapping)
                    age = (values.pop("now") - values["updated_at"]).total_seconds()
                    found.append(InboxRow(**values, age=round(age, 3)))
        return found

    # -- changing --------------------------------------------------------------------------------

    def reset(self, event_id: str, handler: str | None = None) -> int:
        """Has an event handled once more when its message comes again (a forced redrive).

        What is ``processed`` becomes ``received``, its attempts are 0; **the effect of the first
        time stays**.

        Args:
            event_id: the event's.
            handler: of this handler only.

        Returns:
            How many rows it changed.
        """
        row = self.rows.table.c
        done = and_(row.event_id == event_id, row.status == literal_column("'processed'"))
        if handler is not None:
            done = and_(done, row.handler == handler)
        again_ = update(self.rows.table).where(done)
        again_ = again_.values(
            status="received", attempts=0, processed_at=None, updated_at=db_now()
        )
        return self.database.transaction(lambda connection: connection.execute(again_)).rowcount

    def prune(
        self,
        older_than: float | None = None,
        *,
        dry_run: bool = False,
        max_seconds: float | None = None,
        stop: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
    ) -> int:
        """Deletes rows that nothing has changed for so long; not one that is being processed.

        An event whose row is deleted is handled again where its message comes again.

        Args:
            older_than: seconds since ``updated_at``; default ``jetstream_inbox_retention``.
            dry_run: only count them.
            max_seconds: how long at the most.
            stop: asked between batches whether to end early.
            progress: called with rows done and rows in all.

        Returns:
            How many it deleted. Of several at once each counts its own.
        """
        end = float("inf") if max_seconds is None else time.monotonic() + max_seconds
        table, row = self.rows.table, self.rows.table.c
        age = self._config.inbox_retention if older_than is None else older_than
        deleted = total = 0
        with self.database.statements() as connection:
            until = connection.scalars(select(db_now(-age))).one()
            at_rest = or_(row.status != "processing", row.leased_until <= db_now())
            old = and_(row.updated_at < until, at_rest)
            if dry_run or progress:
                total = connection.scalar(select(func.count()).select_from(table).where(old)) or 0
            if dry_run:
                return total
            found = select(row.event_id, row.handler).where(old)
            found = found.order_by(row.updated_at).limit(BATCH)
            while not stop() and time.monotonic() < end:
                keys = [tuple(key) for key in connection.execute(found)]
                if not keys:
                    break
                some = delete(table).where(tuple_(row.event_id, row.handler).in_(sorted(keys)), old)
                deleted += again(partial(connection.execute, some)).rowcount
                if progress:
                    progress(deleted, total)
                pause()
        return deleted
