"""Which rows of the outbox a command is about, and what it shows of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, case, or_, select
from sqlalchemy import Row as DatabaseRow

from . import subjects
from .models import AT_ONCE, PARKED, STATUSES, Tables
from .sqltypes import db_now

__all__ = ("EVERY_ROW", "STATES", "Filter", "OutboxRow", "shown_columns", "state_of")

#: What a row can be shown as: its status, or what a pending one is doing.
STATES = (*STATUSES, "publishing", "retrying", "parked", "scheduled")


@dataclass(frozen=True)
class Filter:
    """Which rows; all that is given must be true of a row, and nothing given is all rows.

    Attributes:
        status: one of :data:`STATES`; ``pending`` is all that are pending, whatever they wait for.
        event_type: a type, or a pattern as handlers have it: ``user.*``, ``order.>``.
        ordering_key: the key; ``""`` for the rows that have none.
        subject: the subject.
        event_id: the event's id.
        older_than: seconds since ``created_at``, by the database's clock, at least.
        newer_than: the same, at most.
    """

    status: str | None = None
    event_type: str | None = None
    ordering_key: str | None = None
    subject: str | None = None
    event_id: str | None = None
    older_than: float | None = None
    newer_than: float | None = None

    def __post_init__(self) -> None:
        if self.status is not None and self.status not in STATES:
            raise ValueError(f"status is {self.status!r}; give one of {', '.join(STATES)}")
        if self.event_type is not None:
            subjects.validate_pattern(self.event_type)

    @property
    def is_empty(self) -> bool:
        """Whether it lets every row through."""
        return all(getattr(self, field.name) is None for field in fields(self))

    def conditions(self, tables: Tables) -> list[ColumnElement[bool]]:
        """What SQL can tell; :meth:`admits` tells the rest."""
        row = tables.outbox.c
        equal = ("ordering_key", "subject", "event_id")
        found = [row[name] == value for name in equal if (value := getattr(self, name)) is not None]
        if self.status in STATUSES:
            found.append(row.status == self.status)
        elif self.status is not None:
            found += [row.status == "pending", state_of(tables) == self.status]
        if self.event_type is not None:
            literal = self.event_type.partition("*")[0].partition(">")[0]
            whole = literal == self.event_type
            found.append(
                row.event_type == literal
                if whole
                else row.event_type.startswith(literal, autoescape=True)
            )
        if self.older_than is not None:
            found.append(row.created_at <= db_now(-self.older_than))
        if self.newer_than is not None:
            found.append(row.created_at >= db_now(-self.newer_than))
        return found

    def admits(self, event_type: str) -> bool:
        """Whether an event type falls under the pattern."""
        return self.event_type is None or subjects.matches(self.event_type, event_type)


EVERY_ROW = Filter()


def state_of(tables: Tables) -> ColumnElement[str]:
    """A row's state, of :data:`STATES`, at this moment."""
    row, hold, lease = tables.outbox.c, tables.holds.c, tables.buckets.c
    held = select(hold.until).where(
        hold.bucket == row.bucket,
        hold.subject == row.subject,
        hold.ordering_key == row.ordering_key,
        hold.outbox_id != row.id,
        hold.until > db_now(),
        or_(row.due_at <= db_now(), row.due_at == hold.until),
    )
    leased = select(lease.until).where(lease.bucket == row.bucket, lease.until > db_now())
    return case(
        (row.status != "pending", row.status),
        (or_(row.due_at == PARKED, held.exists()), "parked"),
        (and_(row.due_at > db_now(), row.attempts > 0), "retrying"),
        (row.due_at > db_now(), "scheduled"),
        (leased.exists(), "publishing"),
        else_="pending",
    )


@dataclass(frozen=True)
class OutboxRow:
    """A row of the outbox, to be shown.

    Attributes:
        state: one of :data:`STATES`.
        due_at: not before; None where it may go at once, or waits for its key.
        age: seconds since ``created_at``, by the database's clock.
        headers: None unless it was asked for by its id; values can be credentials.
        body: the bytes that are published; None unless it was asked for by its id.

    The others are as in :class:`~celery_jetstream.models.OutboxMixin`.
    """

    id: int
    event_id: str
    event_type: str
    subject: str
    ordering_key: str
    bucket: int
    on_failure: str
    state: str
    attempts: int
    due_at: datetime | None
    created_at: datetime
    failing_since: datetime | None
    finished_at: datetime | None
    last_error: str | None
    age: float
    headers: dict[str, Any] | None = None
    body: bytes | None = None

    @classmethod
    def of(cls, row: DatabaseRow[Any]) -> OutboxRow:
        """From what :func:`shown_columns` selects."""
        values = dict(row._mapping)
        now = values.pop("now")
        values["age"] = round((now - values["created_at"]).total_seconds(), 3)
        if values["due_at"] in (AT_ONCE, PARKED):
            values["due_at"] = None
        if "headers" in values:
            values["headers"] = _object(values["headers"])
            values["body"] = bytes(values["body"])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the headers only the names."""
        values = {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in vars(self).items()
            if name not in ("headers", "body")
        }
        if self.body is not None:
            values["headers"] = sorted(self.headers or {})
            values["body"] = _value(self.body)
        return values


def shown_columns(tables: Tables, *, content: bool = False) -> Sequence[Any]:
    """What :meth:`OutboxRow.of` needs; ``content``: with headers and body."""
    columns = tables.outbox.c
    names = [field.name for field in fields(OutboxRow)]
    left_out = {"state", "age"} if content else {"state", "age", "headers", "body"}
    return [
        *(columns[name] for name in names if name not in left_out),
        state_of(tables).label("state"),
        db_now().label("now"),
    ]


def _object(stored: str) -> dict[str, Any]:
    try:
        found = json.loads(stored)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"damaged": stored}


def _value(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")
