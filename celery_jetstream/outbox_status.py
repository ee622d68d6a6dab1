"""The health of an outbox, without counting all of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, func, literal_column, select

from .models import AT_ONCE, PARKED, STATUSES, Tables
from .sqltypes import db_now

__all__ = ("table_state",)

#: Rows are counted no further than this.
CAP = 10_000


def table_state(connection: Connection, tables: Tables) -> dict[str, Any]:
    """Counts, ages, holds and leases; each by an index, and up to :data:`CAP` rows of it.

    Ages are seconds by the database's clock, None where there is nothing:

    * ``oldest_due``: how long the oldest row that may go now has been waiting to: since it was
      written, or since its time came;
    * ``oldest_pending``: since the oldest pending row was written, whatever it waits for.
    """
    row, hold = tables.outbox.c, tables.holds.c
    now = connection.scalars(select(db_now())).one()
    pending = row.status == literal_column("'pending'")
    first = select(row.created_at).where(pending).order_by(row.id).limit(1)
    at_once = connection.scalar(first.where(row.due_at == AT_ONCE))
    parked = connection.scalar(first.where(row.due_at == PARKED))
    timed = and_(pending, row.due_at > AT_ONCE, row.due_at < PARKED)
    some = select(row.created_at, row.due_at).where(timed).order_by(row.due_at).limit(CAP)
    sample = some.subquery()
    written, due = connection.execute(
        select(func.min(sample.c.created_at), func.min(sample.c.due_at))
    ).one()
    due = due if due is not None and due <= now else None
    held = select(hold.bucket).where(hold.until > db_now())
    return {
        "counts": {
            status: _count(
                connection, select(row.id).where(row.status == literal_column(f"'{status}'"))
            )
            for status in STATUSES
        },
        "oldest_due": _age(now, at_once, due),
        "oldest_pending": _age(now, at_once, parked, written),
        "parked_keys": _count(connection, held),
        "leases": _leases(connection, tables),
    }


def _count(connection: Connection, rows: Any) -> int | str:
    """How many rows; as text with a plus where there are more than are counted."""
    found = connection.scalars(select(func.count()).select_from(rows.limit(CAP + 1).subquery()))
    count: int = found.one()
    return f"{CAP}+" if count > CAP else count


def _age(now: datetime, *moments: datetime | None) -> float | None:
    known = [moment for moment in moments if moment is not None]
    return round(max(0.0, (now - min(known)).total_seconds()), 3) if known else None


def _leases(connection: Connection, tables: Tables) -> dict[str, int]:
    """Owner to how many buckets it has."""
    lease = tables.buckets.c
    held = select(lease.owner, func.count()).where(lease.until > db_now()).group_by(lease.owner)
    found = connection.execute(held.order_by(lease.owner))
    return {row.owner: row[1] for row in found}
