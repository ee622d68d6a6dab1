"""The inbox's rows in SQL: may a handler run, and how did it end.

Whether an event is to be handled is one statement, an upsert that takes the row only where nobody
has done it and nobody is at it. It never waits for a run that holds the row in an open transaction
(SQLite, which has one writer at a time, is the exception): on PostgreSQL a transaction-level
advisory lock is tried first, on MariaDB the statement does not wait for locks.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Table,
    and_,
    bindparam,
    case,
    cast,
    exc,
    func,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite

from .database import is_conflict
from .delivery import Delivery
from .sqltypes import UtcDateTime, db_now, kept

__all__ = ("Answer", "Entry", "InboxRows", "Verdict")

#: Of ``owner``, what tells the hand-over; the rest is of one run.
PREFIX = 16


class Verdict(enum.Enum):
    """What the inbox says to a run that wants to begin, or to be recorded as failed."""

    OURS = "the row is ours"
    PROCESSED = "it is done"
    BUSY = "another run is at it"


@dataclass(frozen=True)
class Answer:
    """What the inbox says, and how many runs of this message have failed by now."""

    verdict: Verdict
    attempts: int = 0


@dataclass(frozen=True)
class Entry:
    """One hand-over of an event to a handler.

    Attributes:
        event_id: the event's; ``stream:sequence`` where it has none.
        handler: the handler's key.
        event_type: the event's.
        delivery: the hand-over.
        owner: its run; the first :data:`PREFIX` characters are the same for all of one hand-over.
    """

    event_id: str
    handler: str
    event_type: str
    delivery: Delivery
    owner: str = field(default="")

    def __post_init__(self) -> None:
        if not self.event_id:
            named = f"{self.delivery.stream}:{self.delivery.sequence}"
            object.__setattr__(self, "event_id", named)
        handed = blake2b(self.delivery.reply.encode(), digest_size=PREFIX // 2).hexdigest()
        object.__setattr__(self, "owner", handed + secrets.token_hex(PREFIX // 2))

    @property
    def log_fields(self) -> dict[str, Any]:
        """What a line about it has in its ``extra``."""
        known = {"event_id": self.event_id, "event_type": self.event_type, "handler": self.handler}
        return self.delivery.log_fields | known

    @property
    def lock(self) -> int:
        """A number for the event and the handler, of 64 bits with a sign."""
        named = f"{self.event_id}\0{self.handler}".encode()
        return int.from_bytes(blake2b(named, digest_size=8).digest(), "big", signed=True)


class InboxRows:
    """The statements over one inbox. Each is given the connection that it runs on."""

    def __init__(self, table: Table, lease: float) -> None:
        self.table = table
        self._lease = lease
        self._prepared: dict[tuple[str, str], Any] = {}
        columns = table.c
        self._key = and_(
            columns.event_id == bindparam("its_id"), columns.handler == bindparam("its_handler")
        )
        self._found = select(columns.status, columns.owner, columns.attempts).where(self._key)

    def begin(self, connection: Connection, entry: Entry, *, within: bool) -> Answer:
        """Takes the row for a run.

        Args:
            connection: the run's own transaction, or one for this statement alone.
            entry: the hand-over.
            within: the row becomes ``processed`` now, with the transaction that the run is in;
                else ``processing``, for as long as the lease.
        """
        return self._take(connection, "processed" if within else "processing", entry, None)

    def fail(self, connection: Connection, entry: Entry, error: str) -> Answer:
        """Records that a run failed; ``PROCESSED`` where the event is done all the same."""
        return self._take(connection, "failed", entry, kept(error))

    def finish(self, connection: Connection, entry: Entry) -> None:
        """The run that held a lease has ended well."""
        done = update(self.table).where(self._key, self.table.c.status != "processed")
        connection.execute(
            done.values(
                status="processed", leased_until=None, processed_at=db_now(), updated_at=db_now()
            ),
            _named(entry),
        )

    def has(self, connection: Connection, entry: Entry) -> bool:
        """Whether the run still has its row, in its own transaction."""
        row = connection.execute(self._found, _named(entry)).first()
        return row is not None and row.owner == entry.owner

    def release(self, connection: Connection, entry: Entry) -> None:
        """The run was cut off through no fault of its own: another may begin at once."""
        columns = self.table.c
        ours = func.substr(columns.owner, 1, PREFIX) == entry.owner[:PREFIX]
        cut_off = update(self.table).where(self._key, columns.status == "processing", ours)
        connection.execute(
            cut_off.values(status="received", leased_until=None, updated_at=db_now()),
            _named(entry),
        )

    def renew(self, connection: Connection, owners: Collection[str]) -> int:
        """The runs of these owners go on; returns how many still have their row."""
        columns = self.table.c
        running = update(self.table).where(
            columns.owner.in_(sorted(owners)), columns.status == "processing"
        )
        return connection.execute(running.values(leased_until=db_now(self._lease))).rowcount

    # -- the upsert ------------------------------------------------------------------------------

    def _take(self, connection: Connection, status: str, entry: Entry, error: str | None) -> Answer:
        values = {
            "event_id": entry.event_id,
            "handler": entry.handler,
            "event_type": entry.event_type[:255],
            "deliveries": entry.delivery.num_delivered,
            "stream": entry.delivery.stream,
            "sequence": entry.delivery.sequence,
            "owner": entry.owner,
            "last_error": error,
        }
        dialect = connection.dialect.name
        if dialect == "postgresql":
            return self._take_locked(connection, status, entry, values)
        if dialect in ("mysql", "mariadb"):
            return self._take_mysql(connection, status, entry, values)
        taking = self._prepare(dialect, status, lambda: self._upsert(sqlite.insert, status))
        row = connection.execute(taking, values).first()
        return self._refusal(connection, entry) if row is None else Answer(Verdict.OURS, row[0])

    def _take_locked(
        self, connection: Connection, status: str, entry: Entry, values: dict[str, Any]
    ) -> Answer:
        """PostgreSQL: an advisory lock until the transaction's end; the row itself would block."""
        taking = self._prepare("postgresql", status, lambda: self._locked(status))
        got, attempts = connection.execute(taking, {**values, "lock": entry.lock}).one()
        if not got:
            return Answer(Verdict.BUSY)
        return self._refusal(connection, entry) if attempts is None else _ours(attempts)

    def _take_mysql(
        self, connection: Connection, status: str, entry: Entry, values: dict[str, Any]
    ) -> Answer:
        dialect: Any = connection.dialect
        taking = self._prepare("mysql", status, lambda: _NoWait(self._odku(status), dialect))
        try:
            row = taking.execute(connection, values)
            if row is None:  # MySQL has no RETURNING
                row = connection.execute(self._found, _named(entry)).one()
        except exc.DBAPIError as error:
            if is_conflict(error):
                return Answer(Verdict.BUSY)
            raise
        found, owner, attempts = row
        if owner == entry.owner:
            return _ours(attempts)
        return Answer(Verdict.PROCESSED if found == "processed" else Verdict.BUSY)

    def _refusal(self, connection: Connection, entry: Entry) -> Answer:
        row = connection.execute(self._found, _named(entry)).first()
        done = row is not None and row.status == "processed"
        return Answer(Verdict.PROCESSED if done else Verdict.BUSY)

    def _prepare(self, dialect: str, status: str, make: Any) -> Any:
        found = self._prepared.get((dialect, status))
        if found is None:
            found = self._prepared[dialect, status] = make()
        return found

    def _new(self, status: str) -> dict[str, Any]:
        """The columns of a row as it becomes, beside those that are parameters."""
        none: Any = cast(null(), UtcDateTime)
        return {
            "status": status,
            "attempts": 1 if status == "failed" else 0,
            "leased_until": db_now(self._lease) if status == "processing" else none,
            "first_seen_at": db_now(),
            "updated_at": db_now(),
            "processed_at": db_now() if status == "processed" else none,
        }

    def _free(self, status: str, owner: Any) -> ColumnElement[bool]:
        """Whether a row that is there may be taken: not done, and nobody at it."""
        columns = self.table.c
        over: ColumnElement[bool] = columns.leased_until <= db_now()
        if status == "failed":  # of the run itself
            over = or_(over, func.substr(columns.owner, 1, PREFIX) == func.substr(owner, 1, PREFIX))
        at_work = and_(columns.status == "processing", over)
        return or_(columns.status == "received", columns.status == "failed", at_work)

    def _changes(self, status: str, given: Any) -> list[tuple[str, Any]]:
        """How a row that is there changes; attempts are those of its newest message."""
        columns = self.table.c
        newer = or_(given.stream != columns.stream, given.sequence > columns.sequence)
        before = case((newer, 0), else_=columns.attempts)
        new = self._new(status)
        return [
            ("attempts", before + new["attempts"]),
            ("sequence", case((newer, given.sequence), else_=columns.sequence)),
            ("stream", given.stream),
            ("deliveries", given.deliveries),
            ("last_error", func.coalesce(given.last_error, columns.last_error)),
            ("leased_until", new["leased_until"]),
            ("processed_at", new["processed_at"]),
            ("updated_at", new["updated_at"]),
            ("status", status),
        ]

    def _upsert(self, insert: Any, status: str) -> Any:
        parameters = {name: bindparam(name, type_=self.table.c[name].type) for name in _GIVEN}
        writing = insert(self.table).values(**parameters, **self._new(status))
        return self._or_change(writing, status)

    def _or_change(self, writing: Any, status: str) -> Any:
        changes = {**dict(self._changes(status, writing.excluded)), "owner": writing.excluded.owner}
        return writing.on_conflict_do_update(
            index_elements=["event_id", "handler"],
            set_=changes,
            where=self._free(status, writing.excluded.owner),
        ).returning(self.table.c.attempts)

    def _locked(self, status: str) -> Any:
        number = bindparam("lock", type_=BigInteger)
        lock = select(func.pg_try_advisory_xact_lock(number).label("got")).cte("its_lock")
        values = {
            **{name: bindparam(name, type_=self.table.c[name].type) for name in _GIVEN},
            **self._new(status),
        }
        row = select(*(_column(value, name) for name, value in values.items())).where(lock.c.got)
        writing = postgresql.insert(self.table).from_select(list(values), row)
        mine = self._or_change(writing, status).cte("mine")
        return select(lock.c.got, mine.c.attempts).select_from(lock.outerjoin(mine, true()))

    def _odku(self, status: str) -> Any:
        """Assignments are made from left to right: ``owner``, of one run, says if it was taken."""
        parameters: dict[str, Any] = {name: bindparam(name) for name in _GIVEN}
        writing = mysql.insert(self.table).values(**parameters, **self._new(status))
        given, columns = writing.inserted, self.table.c
        taken = columns.owner == given.owner
        free = self._free(status, given.owner)
        changes: list[tuple[str, Any]] = [("owner", func.if_(free, given.owner, columns.owner))]
        changes += [
            (name, func.if_(taken, value, columns[name]))
            for name, value in self._changes(status, given)
        ]
        return writing.on_duplicate_key_update(changes)


_GIVEN = (
    "event_id",
    "handler",
    "event_type",
    "deliveries",
    "stream",
    "sequence",
    "owner",
    "last_error",
)


class _NoWait:
    """An upsert that does not wait for a lock (MySQL, untried: a second; it knows no less)."""

    def __init__(self, statement: Any, dialect: Any) -> None:
        self._returns = bool(dialect.is_mariadb)
        if self._returns:
            columns = statement.table.c
            statement = statement.returning(columns.status, columns.owner, columns.attempts)
            before = "SET STATEMENT innodb_lock_wait_timeout=0 FOR "
        else:
            statement = statement.prefix_with("/*+ SET_VAR(innodb_lock_wait_timeout=1) */")
            before = ""
        self._compiled = statement.compile(dialect=dialect)
        self._sql = before + str(self._compiled)

    def execute(self, connection: Connection, values: dict[str, Any]) -> Any:
        """The row's status, owner and attempts; None where the server returns none."""
        named: Any = self._compiled.construct_params(values)
        if self._compiled.positiontup is not None:
            named = tuple(named[name] for name in self._compiled.positiontup)
        result = connection.exec_driver_sql(self._sql, named)
        return result.one() if self._returns else None


def _column(value: Any, name: str) -> Any:
    if isinstance(value, (str, int)):
        value = bindparam(f"new_{name}", value)
    return value.label(name)


def _named(entry: Entry) -> dict[str, str]:
    return {"its_id": entry.event_id, "its_handler": entry.handler}


def _ours(attempts: int) -> Answer:
    return Answer(Verdict.OURS, int(attempts))
