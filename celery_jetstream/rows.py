"""The outbox's rows in SQL: written, found when due, and what became of them.

What may be published now is one predicate: ``status = 'pending' AND due_at <= now``. Rows that
may go at once all have one ``due_at``, so that the index gives them in the order of their ids and
a reader can go on from the last id it has seen, past whatever vacuum has not removed yet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Row,
    Select,
    String,
    and_,
    any_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal_column,
    select,
    true,
    update,
)

from .models import AT_ONCE, PARKED, Tables
from .sqltypes import db_now, kept

__all__ = ("Failure", "Fate", "Hold", "Key", "Rows")

Key = tuple[int, str, str]  # bucket, subject, ordering_key


@dataclass(frozen=True)
class Hold:
    """A key that waits: until a time, or until its failed event is retried or cancelled."""

    key: Key
    until: datetime
    over: bool


@dataclass(frozen=True)
class Fate:
    """What becomes of a row that was not stored.

    Attributes:
        id: the row's.
        error: why.
        status: ``pending`` where it is tried again, else how it ends.
        until: when it is tried again, and its key waits until then; :data:`PARKED` for an end.
    """

    id: int
    error: str
    status: str = "pending"
    until: datetime = PARKED


@dataclass(frozen=True)
class Failure:
    """What a row that failed has to go by: its tries, and the database's clock."""

    id: int
    attempts: int
    failing_for: float
    now: datetime


class Rows:
    """The statements over one outbox. Each is given the connection that it runs on."""

    def __init__(self, tables: Tables, *, with_age: bool = False) -> None:
        self.table = tables.outbox
        self.holds_table = tables.holds
        columns = tables.outbox.c
        self._pending = columns.status == literal_column("'pending'")
        # Where ids are given: no planner shall think of the index of what is due, which on
        # PostgreSQL seems empty to one who last looked while nothing was.
        self._unfinished = columns.finished_at.is_(None)
        # Not "=": with the order by due_at and id no planner reads from the first row that was
        # ever sent instead.
        self._at_once = columns.due_at <= AT_ONCE
        self._later = and_(self._pending, columns.due_at > AT_ONCE, columns.due_at <= db_now())
        self._let_go = delete(tables.holds).where(_of_key(tables.holds))
        self._wanted = (
            columns.id,
            columns.event_id,
            columns.subject,
            columns.ordering_key,
            columns.bucket,
            columns.transaction_id,
            columns.on_failure,
            columns.headers,
            columns.body,
            *(self._age() if with_age else ()),
        )

    def _age(self) -> tuple[Any, ...]:
        """When a row was written, unless it was to go later; and the time, by the same clock."""
        columns = self.table.c
        at_once = case((columns.due_at <= AT_ONCE, columns.created_at))
        return at_once.label("written_at"), db_now().label("read_at")

    # -- writing ---------------------------------------------------------------------------------

    def insert(self, due_at: ColumnElement[datetime] | datetime = AT_ONCE) -> Any:
        """The INSERT for one row or many; the parameters are the other columns."""
        return insert(self.table).values(
            status="pending", attempts=0, due_at=due_at, created_at=db_now()
        )

    # -- what is due -----------------------------------------------------------------------------

    def probe(
        self, connection: Connection, limit: int, without: Collection[str] = ()
    ) -> dict[int, int]:
        """Bucket to count of the first rows that are due; one cheap query where there are none."""
        columns = self.table.c
        due = and_(self._pending, columns.due_at <= db_now(), self._not_to(without))
        first = select(columns.bucket).where(due).order_by(columns.due_at, columns.id).limit(limit)
        sample = first.subquery("sample")
        counted = select(sample.c.bucket, func.count()).group_by(sample.c.bucket)
        return {row[0]: row[1] for row in connection.execute(counted)}

    def at_once(
        self,
        connection: Connection,
        buckets: Collection[int] | None,
        limit: int,
        without: Collection[str] = (),
    ) -> Sequence[Row[Any]]:
        """The first rows that may go at once, in order; ``None``: of all buckets."""
        columns = self.table.c
        found = self._reading(buckets, without).where(self._pending, self._at_once)
        return connection.execute(found.order_by(columns.due_at, columns.id).limit(limit)).all()

    def at_once_ids(
        self,
        connection: Connection,
        buckets: Collection[int] | None,
        limit: int,
        without: Collection[str] = (),
    ) -> Sequence[int]:
        """The ids of the first rows that may go at once, as they are in one moment, in order."""
        columns = self.table.c
        found = self._reading(buckets, without).with_only_columns(columns.id)
        found = found.where(self._pending, self._at_once)
        return connection.scalars(found.order_by(columns.due_at, columns.id).limit(limit)).all()

    def these(
        self, connection: Connection, ids: Sequence[int], without: Collection[str] = ()
    ) -> Sequence[Row[Any]]:
        """Those rows of some ids that may go at once still, in order."""
        found = self._reading(None, without).where(
            self._among(connection, ids), self._unfinished, self._at_once
        )
        return sorted(connection.execute(found, {"ids": list(ids)}), key=_id)

    def later(
        self,
        connection: Connection,
        buckets: Collection[int] | None,
        limit: int,
        without: Collection[str] = (),
    ) -> Sequence[Row[Any]]:
        """Rows whose time has come."""
        columns = self.table.c
        found = self._reading(buckets, without).where(self._later)
        return connection.execute(found.order_by(columns.due_at, columns.id).limit(limit)).all()

    def members(self, connection: Connection, transactions: Collection[str]) -> Sequence[Row[Any]]:
        """All rows that some transactions wrote, and whether each may still go at once.

        Not what was cancelled: the rest can do without it.
        """
        columns, these = self.table.c, sorted(transactions)
        if connection.dialect.name == "postgresql":
            some = columns.transaction_id == any_(bindparam("these", these, ARRAY(String)))
        else:
            some = columns.transaction_id.in_(these)
        waits = case((and_(self._pending, self._at_once), 1), else_=0).label("waits")
        wanted: tuple[Any, ...] = (columns.id, columns.transaction_id, columns.bucket, waits)
        published = columns.status != literal_column("'cancelled'")
        return connection.execute(select(*wanted).where(some, published)).all()

    def _reading(self, buckets: Collection[int] | None, without: Collection[str]) -> Select[Any]:
        mine = true() if buckets is None else self.table.c.bucket.in_(sorted(buckets))
        return select(*self._wanted).where(mine, self._not_to(without))

    def _not_to(self, subjects: Collection[str]) -> ColumnElement[bool]:
        return self.table.c.subject.not_in(sorted(subjects)) if subjects else true()

    # -- what became of them ---------------------------------------------------------------------

    def sent(self, connection: Connection, ids: Sequence[int], *, keep: bool) -> int:
        """Records what JetStream has stored, or (``keep=False``) deletes it."""
        ours = and_(self._among(connection, ids), self._unfinished)
        done = (
            update(self.table).where(ours).values(status="sent", finished_at=db_now())
            if keep
            else delete(self.table).where(ours)
        )
        return connection.execute(done, {"ids": list(ids)}).rowcount

    def failures(self, connection: Connection, ids: Sequence[int]) -> dict[int, Failure]:
        """How often, and for how long by the database's clock, pending rows have failed."""
        columns = self.table.c
        found = select(columns.id, columns.attempts, columns.failing_since, db_now().label("now"))
        found = found.where(self._among(connection, ids), self._unfinished)
        failures = {}
        for row in connection.execute(found, {"ids": list(ids)}):
            since = row.failing_since or row.now
            age = (row.now - since).total_seconds()
            failures[row.id] = Failure(row.id, row.attempts, age, row.now)
        return failures

    def fail(self, connection: Connection, fates: Sequence[Fate]) -> None:
        """Records rows that were not stored, and for no outage. In one transaction."""
        columns = self.table.c
        failed = update(self.table).where(columns.id == bindparam("row"), self._unfinished)
        failed = failed.values(
            attempts=columns.attempts + 1,
            failing_since=func.coalesce(columns.failing_since, db_now()),
            last_error=bindparam("error"),
        )
        later = [fate for fate in fates if fate.status == "pending"]
        if later:
            values = [{"row": f.id, "error": kept(f.error), "until": f.until} for f in later]
            connection.execute(failed.values(due_at=bindparam("until")), values)
        if len(later) < len(fates):
            given_up = failed.values(status=bindparam("fate"), finished_at=db_now())
            values = [
                {"row": f.id, "error": kept(f.error), "fate": f.status}
                for f in fates
                if f.status != "pending"
            ]
            connection.execute(given_up, values)

    # -- keys that wait --------------------------------------------------------------------------

    def holds(self, connection: Connection, buckets: Collection[int]) -> list[Hold]:
        """The keys of these buckets that wait for a failed event."""
        columns = self.holds_table.c
        over = case((columns.until <= db_now(), 1), else_=0)
        found = select(columns.bucket, columns.subject, columns.ordering_key, columns.until, over)
        found = found.where(columns.bucket.in_(sorted(buckets)))
        return [
            Hold((bucket, subject, key), until, bool(is_over))
            for bucket, subject, key, until, is_over in connection.execute(found)
        ]

    def hold(self, connection: Connection, fates: Mapping[Key, Fate]) -> None:
        """Has keys wait for one of their rows each. In the transaction that records its failure."""
        if fates:
            connection.execute(self._let_go, [_named(key) for key in fates])
            values = [
                {
                    "bucket": bucket,
                    "subject": subject,
                    "ordering_key": ordering_key,
                    "until": fate.until,
                    "outbox_id": fate.id,
                }
                for (bucket, subject, ordering_key), fate in fates.items()
            ]
            connection.execute(insert(self.holds_table), values)

    def release(self, connection: Connection, holds: Sequence[Hold]) -> None:
        """Lets keys go on: what waited may go at once, in order. In one transaction.

        Found first and changed by their ids then: a range of the index would be locked on MySQL,
        against the producers' INSERTs.
        """
        columns = self.table.c
        waiting = and_(self._pending, columns.due_at == bindparam("until"), _of_key(self.table))
        found = select(columns.id).where(waiting)
        for hold in holds:
            values = {**_named(hold.key), "until": hold.until}
            ids = connection.scalars(found, values).all()
            for at in range(0, len(ids), 1000):
                some = and_(self._among(connection, ids), self._unfinished)
                freeing = update(self.table).where(some).values(due_at=AT_ONCE)
                connection.execute(freeing, {"ids": list(ids[at : at + 1000])})
        connection.execute(self._let_go, [_named(hold.key) for hold in holds])

    def wait(self, connection: Connection, ids: Sequence[int]) -> None:
        """Has rows wait for as long as their keys are held (nothing where they are not)."""
        held, columns = self.holds_table, self.table.c
        until = select(held.c.until).where(
            held.c.bucket == columns.bucket,
            held.c.subject == columns.subject,
            held.c.ordering_key == columns.ordering_key,
        )
        waiting = and_(self._among(connection, ids), self._unfinished, until.exists())
        changing = update(self.table).where(waiting).values(due_at=until.scalar_subquery())
        connection.execute(changing, {"ids": list(ids)})

    def _among(self, connection: Connection, ids: Sequence[int]) -> ColumnElement[bool]:
        """``id`` among the parameter ``ids``, as the database likes it best."""
        if connection.dialect.name == "postgresql":
            return self.table.c.id == any_(bindparam("ids", type_=ARRAY(BigInteger)))
        return self.table.c.id.in_(bindparam("ids", expanding=True))


def backoff(attempts: int, jitter: float) -> timedelta:
    """Full jitter: a random part of 1, 2, 4, … seconds, 300 at the most.

    Args:
        attempts: tries before this one.
        jitter: between 0 and 1.
    """
    most = min(300.0, 2.0 ** min(attempts, 30))
    return timedelta(seconds=max(0.05, most * jitter))


def _of_key(table: Any) -> ColumnElement[bool]:
    """The rows of the key that the parameters name; see :func:`_named`."""
    return and_(
        table.c.bucket == bindparam("its_bucket"),
        table.c.subject == bindparam("its_subject"),
        table.c.ordering_key == bindparam("its_key"),
    )


def _named(key: Key) -> dict[str, Any]:
    return dict(zip(("its_bucket", "its_subject", "its_key"), key, strict=True))


def _id(row: Row[Any]) -> int:
    found: int = row.id
    return found
