"""Changes to rows that are not sent: page by page, each under the leases of its buckets.

While a command holds a bucket's lease no flusher publishes from it, so that a row that is
cancelled is not on its way, and a key's rows go on in order.

Rows are found first and changed by their ids then, never by a range: on MySQL that would lock the
gap in the index into which the producers insert.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, select, update

from .database import Database
from .leases import Lease
from .models import AT_ONCE, PARKED, Tables
from .outbox_filter import Filter
from .rows import Rows

__all__ = ("BATCH", "Change", "Outcome", "Progress", "free_waiting", "pause")

#: Told of rows that are done, and of how many there are.
Progress = Callable[[int, int], None]

#: Rows of one transaction.
BATCH = 1000
#: Seconds that a command waits for leases, in all, and between two looks.
PATIENCE, LOOK = 5.0, 0.02
#: Seconds between two batches, at the most.
PAUSE = 0.02


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        changed: rows that it changed (``dry_run``: would change).
        in_flight: rows that it left, since they are being published now.
    """

    changed: int = 0
    in_flight: int = 0


class Change:
    """One change of many rows.

    Args:
        database: of the outbox.
        rows: its statements.
        lease_seconds: how long a lease on buckets holds.
        chosen: the filter.
        eligible: the rows that can be changed so, as conditions that exclude each other (one for
            each index that finds them).
        values: what they become.
    """

    def __init__(
        self,
        database: Database[Tables],
        rows: Rows,
        lease_seconds: float,
        chosen: Filter,
        eligible: Sequence[ColumnElement[bool]],
        values: Mapping[str, Any],
    ) -> None:
        self._database = database
        self._tables = database.tables
        self._table = self._tables.outbox
        self._rows = rows
        self._lease_seconds = lease_seconds
        self._filter = chosen
        self._where = chosen.conditions(self._tables)
        self._eligible = eligible
        self._values = dict(values)
        self._patience = PATIENCE

    def run(self, progress: Progress | None = None) -> Outcome:
        """Changes them; those of buckets that flushers do not let go of in time are left."""
        total = self.count() if progress else 0
        changed = in_flight = 0
        with self._database.statements() as connection:
            last = connection.scalar(select(func.max(self._table.c.id))) or 0
            for condition in self._eligible:
                for found in self._pages(connection, condition, last):
                    done, left = self._apply(connection, condition, found)
                    changed, in_flight = changed + done, in_flight + left
                    if progress:
                        progress(changed + in_flight, total)
                    pause()
        return Outcome(changed, in_flight)

    def count(self) -> int:
        """How many there are now."""
        with self._database.statements() as connection:
            last = connection.scalar(select(func.max(self._table.c.id))) or 0
            return sum(
                len(found)
                for condition in self._eligible
                for found in self._pages(connection, condition, last)
            )

    def _pages(self, connection: Connection, condition: ColumnElement[bool], last: int) -> Any:
        """Pages of those that were there when it began."""
        columns, after = self._table.c, 0
        wanted = select(columns.id, columns.event_type, columns.bucket)
        wanted = wanted.where(condition, *self._where, columns.id <= last)
        wanted = wanted.order_by(columns.id).limit(BATCH)
        while page := connection.execute(wanted.where(columns.id > after)).all():
            after = page[-1].id
            if found := [row for row in page if self._filter.admits(row.event_type)]:
                yield found

    def _apply(
        self, connection: Connection, condition: ColumnElement[bool], found: Sequence[Row[Any]]
    ) -> tuple[int, int]:
        lease = Lease(self._tables, self._lease_seconds)
        try:
            held = self._take(connection, lease, {row.bucket for row in found})
            ours = [row.id for row in found if row.bucket in held]
            changed = self._change(connection, lease, condition, ours) if ours else 0
        finally:
            lease.give_back(connection)
        return changed, len(found) - len(ours)

    def _take(
        self, connection: Connection, lease: Lease, wanted: Collection[int]
    ) -> frozenset[int]:
        while True:
            start = time.monotonic()
            held = lease.take(connection, wanted)
            if held.issuperset(wanted) or self._patience <= 0:
                return held
            time.sleep(random.uniform(0.5, 1.0) * LOOK)
            self._patience -= time.monotonic() - start

    def _change(
        self,
        connection: Connection,
        lease: Lease,
        condition: ColumnElement[bool],
        ids: Sequence[int],
    ) -> int:
        columns = self._table.c
        # once more, now that nobody else changes them
        still = select(columns.id).where(columns.id.in_(ids), condition)
        ours = list(connection.scalars(still))
        behind = _behind(self._tables, ours)
        while len(some := list(connection.scalars(behind.limit(BATCH)))) == BATCH:
            # many: in several transactions, while their key is held still
            self._database.transaction(partial(_free, table=self._table, ids=some))
            lease.renew(connection)
            pause()

        def finish(connection: Connection) -> int:
            change = update(self._table).where(columns.id.in_(ours), condition)
            changed = connection.execute(change.values(self._values)).rowcount
            _free(connection, self._table, list(connection.scalars(behind)))
            holds = self._tables.holds
            connection.execute(delete(holds).where(holds.c.outbox_id.in_(ours)))
            return changed

        return self._database.transaction(finish) if ours else 0


def _behind(tables: Tables, ids: Sequence[int]) -> Any:
    """The rows that wait for one of these."""
    row, hold = tables.outbox.c, tables.holds.c
    held = select(hold.until).where(hold.outbox_id.in_(ids))
    theirs = held.where(
        hold.bucket == row.bucket,
        hold.subject == row.subject,
        hold.ordering_key == row.ordering_key,
        hold.until == row.due_at,
    )
    pending = and_(row.status == "pending", row.due_at.in_(held), row.id.not_in(ids))
    return select(row.id).where(pending, theirs.exists())


def _free(connection: Connection, table: Any, ids: Sequence[int]) -> None:
    """Lets pending rows go at once."""
    for start in range(0, len(ids), BATCH):
        some = and_(table.c.id.in_(ids[start : start + BATCH]), table.c.status == "pending")
        connection.execute(update(table).where(some).values(due_at=AT_ONCE))


def free_waiting(database: Database[Tables]) -> int:
    """Lets rows go that wait for a failed event that is gone (somebody deleted it, say)."""
    tables = database.tables
    row, hold = tables.outbox.c, tables.holds.c
    failed = select(row.id).where(row.id == hold.outbox_id, row.status.in_(("failed", "exception")))
    held = select(hold.until).where(
        hold.bucket == row.bucket,
        hold.subject == row.subject,
        hold.ordering_key == row.ordering_key,
    )
    orphans = select(row.id).where(row.status == "pending", row.due_at == PARKED, ~held.exists())

    def free(connection: Connection) -> int:
        some = list(connection.scalars(orphans.limit(BATCH)))
        _free(connection, tables.outbox, some)
        return len(some)

    database.transaction(
        lambda connection: connection.execute(
            delete(tables.holds).where(hold.until == PARKED, ~failed.exists())
        )
    )
    freed = 0
    while some := database.transaction(free):
        freed += some
        pause()
    return freed


def pause() -> None:
    """Between two batches, so that others come in between."""
    time.sleep(random.uniform(0.25, 1.0) * PAUSE)
