"""The outbox's tables, as SQLAlchemy maps them; and the inbox's, by name.

Three tables: the outbox itself; ``…_buckets``, the leases by which flushers share it; and
``…_holds``, the keys that wait for a failed event. :class:`OutboxEvent` is the default model;
:class:`OutboxMixin` makes one of your own. For Alembic, give :data:`metadata` to
``target_metadata`` (or the metadata of your own model).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column

from .inbox_models import InboxMessage, InboxMixin, inbox_model
from .sqltypes import (
    BIG_ID,
    BYTES,
    IN_MYSQL,
    IN_SQLITE,
    LONG_TEXT,
    UtcDateTime,
    metadata,
    need_columns,
)

__all__ = (
    "AT_ONCE",
    "BUCKETS",
    "PARKED",
    "STATUSES",
    "InboxMessage",
    "InboxMixin",
    "OutboxEvent",
    "OutboxMixin",
    "Tables",
    "bucket_of",
    "inbox_model",
    "metadata",
    "outbox_model",
)

#: Into so many parts a table is divided among flushers. Fixed: a row has its bucket for life.
BUCKETS = 64
#: The ``due_at`` of a row that may go at once. One value for all of them, so that their order in
#: the index is that of their ids.
AT_ONCE = datetime(1970, 1, 1, tzinfo=timezone.utc)
#: The ``due_at`` of rows that wait for a failed event of their key to be retried or cancelled.
PARKED = datetime(9000, 1, 1, tzinfo=timezone.utc)

STATUSES = ("pending", "sent", "failed", "exception", "cancelled")


def bucket_of(subject: str, ordering_key: str, event_id: str) -> int:
    """The bucket of a row: that of its key, or any where it has none."""
    named = f"{subject}\0{ordering_key}" if ordering_key else event_id
    return zlib.crc32(named.encode()) % BUCKETS


# -- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """The three tables of one outbox."""

    outbox: Table
    buckets: Table
    holds: Table

    @classmethod
    def of(cls, outbox: Table) -> Tables:
        """The tables that belong to an outbox table, in its metadata and schema.

        Raises:
            ConfigurationError: a column is missing.
        """
        need_columns("jetstream_outbox_model", outbox, OutboxMixin)
        return cls(outbox, _buckets(outbox), _holds(outbox))

    def __iter__(self) -> Any:
        return iter((self.outbox, self.buckets, self.holds))


def _buckets(outbox: Table) -> Table:
    return _beside(
        outbox,
        "buckets",
        lambda: (
            Column("bucket", SmallInteger, primary_key=True, autoincrement=False),
            Column("owner", String(64), nullable=False),
            Column("until", UtcDateTime, nullable=False),
        ),
    )


def _holds(outbox: Table) -> Table:
    return _beside(
        outbox,
        "holds",
        lambda: (
            Column("bucket", SmallInteger, primary_key=True, autoincrement=False),
            Column("subject", String(255), primary_key=True),
            Column("ordering_key", String(255), primary_key=True),
            Column("until", UtcDateTime, nullable=False),
            Column("outbox_id", BigInteger, nullable=False),
        ),
    )


def _beside(outbox: Table, suffix: str, columns: Any) -> Table:
    name = f"{outbox.name}_{suffix}"
    key = f"{outbox.schema}.{name}" if outbox.schema else name
    found = outbox.metadata.tables.get(key)
    if found is None:
        options: dict[str, Any] = {"schema": outbox.schema, **IN_MYSQL}
        found = Table(name, outbox.metadata, *columns(), **options)
    return found


class OutboxMixin:
    """The columns, checks and indexes of an outbox, for a mapped class of your own.

    ::

        class ShopOutbox(OutboxMixin, Base):
            __tablename__ = "shop_outbox"
            tenant: Mapped[str] = mapped_column(server_default="main")

    More columns are welcome where they have a default in the database. For a schema or other
    table arguments set ``__outbox_args__`` (a dict), for ``__table_args__`` is the mixin's.

    Attributes:
        id: order of writing; a key's events are published in it.
        event_id: the envelope's, and ``Nats-Msg-Id``.
        event_type: as in the envelope.
        subject: where it is published.
        ordering_key: events with one key and subject are published in order; ``""`` for none.
        bucket: see :func:`bucket_of`.
        transaction_id: with ``jetstream_outbox_atomic``: what the rows that one transaction wrote,
            and that may go at once, have in common; else null.
        on_failure: ``park``: given up, its key waits for it; ``skip``: the key goes on.
        headers: the producer's, as a JSON object.
        body: the bytes that are published.
        status: ``pending``, ``sent``, ``failed`` (refused for good), ``exception`` (given up
            after unknown errors), or ``cancelled``.
        attempts: tries that failed for no outage.
        due_at: not before; :data:`AT_ONCE`, :data:`PARKED` or a time.
        created_at: when the row was written.
        failing_since: the first of ``attempts``.
        finished_at: when ``status`` ceased to be ``pending``.
        last_error: of the last of ``attempts``, capped.
    """

    __outbox_args__: ClassVar[dict[str, Any]] = {}

    id: Mapped[int] = mapped_column(BIG_ID, primary_key=True, autoincrement=True)
    event_id: Mapped[str] = mapped_column(String(255), nullable=False)
    event_type: Mapped[str] = mapped_column(String(255), nullable=False)
    subject: Mapped[str] = mapped_column(String(255), nullable=False)
    ordering_key: Mapped[str] = mapped_column(String(255), nullable=False)
    bucket: Mapped[int] = mapped_column(SmallInteger, nullable=False)
    transaction_id: Mapped[str | None] = mapped_column(String(32), nullable=True)
    on_failure: Mapped[str] = mapped_column(String(8), nullable=False)
    headers: Mapped[str] = mapped_column(LONG_TEXT, nullable=False)
    body: Mapped[bytes] = mapped_column(BYTES, nullable=False)
    status: Mapped[str] = mapped_column(String(16), nullable=False)
    attempts: Mapped[int] = mapped_column(Integer, nullable=False)
    due_at: Mapped[datetime] = mapped_column(UtcDateTime, nullable=False)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, nullable=False)
    failing_since: Mapped[datetime | None] = mapped_column(UtcDateTime, nullable=True)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime, nullable=True)
    last_error: Mapped[str | None] = mapped_column(LONG_TEXT, nullable=True)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:  # noqa: N805
        name = cls.__tablename__  # type: ignore[attr-defined]
        pending = text("status = 'pending'")
        together = text("transaction_id IS NOT NULL")
        return (
            CheckConstraint(f"status IN {STATUSES}", name=f"ck_{name}_status"),
            CheckConstraint("on_failure IN ('park', 'skip')", name=f"ck_{name}_on_failure"),
            CheckConstraint(
                "(status = 'pending') = (finished_at IS NULL)", name=f"ck_{name}_finished"
            ),
            CheckConstraint("(attempts = 0) = (failing_since IS NULL)", name=f"ck_{name}_failing"),
            CheckConstraint(f"bucket BETWEEN 0 AND {BUCKETS - 1}", name=f"ck_{name}_bucket"),
            Index(f"ux_{name}_event_id", "event_id", unique=True),
            Index(
                f"ix_{name}_due",
                "status",
                "due_at",
                "id",
                "bucket",
                postgresql_where=pending,
                sqlite_where=pending,
            ),
            Index(
                f"ix_{name}_finished",
                "status",
                "finished_at",
                postgresql_where=text("status <> 'pending'"),
            ),
            Index(
                f"ix_{name}_transaction",
                "transaction_id",
                postgresql_where=together,
                sqlite_where=together,
            ),
            {**IN_MYSQL, **IN_SQLITE, **cls.__outbox_args__},
        )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if isinstance(table := cls.__dict__.get("__table__"), Table):
            Tables.of(table)  # so that Alembic sees all three


class _Base(DeclarativeBase):
    metadata = metadata


class OutboxEvent(OutboxMixin, _Base):
    """A row of the outbox: an event that is, was or is to be published."""

    __tablename__ = "jetstream_outbox"


def outbox_model(
    name: str = "jetstream_outbox", schema: str | None = None, *, in_metadata: MetaData = metadata
) -> type[Any]:
    """The model for a table of another name or in a schema; one class for each.

    What ``jetstream_outbox_table`` and ``jetstream_outbox_schema`` use. Its tables are added to
    ``in_metadata``.
    """
    if in_metadata is metadata and (name, schema) == ("jetstream_outbox", None):
        return OutboxEvent
    key = (id(in_metadata), name, schema)
    if key not in _models:
        base = type("Base", (DeclarativeBase,), {"metadata": in_metadata})
        body = {"__tablename__": name, "__outbox_args__": {"schema": schema}}
        _models[key] = type("OutboxEvent", (OutboxMixin, base), body)
    return _models[key]


_models: dict[tuple[int, str, str | None], type[Any]] = {}
