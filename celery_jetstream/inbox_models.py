"""The inbox's table, as SQLAlchemy maps it: which handler has done with which event.

:class:`InboxMessage` is the default model; :class:`InboxMixin` makes one of your own.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import BigInteger, CheckConstraint, Index, Integer, MetaData, String, text
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column

from .sqltypes import IN_MYSQL, LONG_TEXT, UtcDateTime, metadata

__all__ = ("KEY_LENGTH", "STATUSES", "InboxMessage", "InboxMixin", "inbox_model")

#: Characters of an event's id, and of a handler's key.
KEY_LENGTH = 255
STATUSES = ("received", "processing", "processed", "failed")


class InboxMixin:
    """The columns, checks and indexes of an inbox, for a mapped class of your own.

    ::

        class ShopInbox(InboxMixin, Base):
            __tablename__ = "shop_inbox"

    More columns are welcome where they have a default in the database. For a schema or other
    table arguments set ``__inbox_args__`` (a dict), for ``__table_args__`` is the mixin's.

    Attributes:
        event_id: the event's; ``stream:sequence`` of its message where it has none.
        handler: the handler's task name, or its ``inbox_key``.
        event_type: as in the envelope.
        status: ``received`` (not begun, or handed back), ``processing`` (a handler without a
            session of ours runs), ``processed``, or ``failed`` (its last run ended with an error).
        attempts: runs of the newest message that failed; an outage or a hand-back is none.
        deliveries: ``num_delivered`` of the delivery that was last run.
        stream: where the message is, or was.
        sequence: its number there; the highest, of several messages with one event.
        owner: the run that began last.
        leased_until: how long a run that is ``processing`` is believed to be alive.
        first_seen_at: when the row was written first.
        updated_at: when its status was last set.
        processed_at: when it became ``processed``.
        last_error: of the last run that failed, capped.
    """

    __inbox_args__: ClassVar[dict[str, Any]] = {}

    event_id: Mapped[str] = mapped_column(String(KEY_LENGTH), primary_key=True)
    handler: Mapped[str] = mapped_column(String(KEY_LENGTH), primary_key=True)
    event_type: Mapped[str] = mapped_column(String(255), nullable=False)
    status: Mapped[str] = mapped_column(String(16), nullable=False)
    attempts: Mapped[int] = mapped_column(Integer, nullable=False)
    deliveries: Mapped[int] = mapped_column(Integer, nullable=False)
    stream: Mapped[str] = mapped_column(String(255), nullable=False)
    sequence: Mapped[int] = mapped_column(BigInteger, nullable=False)
    owner: Mapped[str] = mapped_column(String(32), nullable=False)
    leased_until: Mapped[datetime | None] = mapped_column(UtcDateTime, nullable=True)
    first_seen_at: Mapped[datetime] = mapped_column(UtcDateTime, nullable=False)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, nullable=False)
    processed_at: Mapped[datetime | None] = mapped_column(UtcDateTime, nullable=True)
    last_error: Mapped[str | None] = mapped_column(LONG_TEXT, nullable=True)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:  # noqa: N805
        name = cls.__tablename__  # type: ignore[attr-defined]
        return (
            CheckConstraint(f"status IN {STATUSES}", name=f"ck_{name}_status"),
            CheckConstraint(
                "(status = 'processed') = (processed_at IS NOT NULL)", name=f"ck_{name}_processed"
            ),
            CheckConstraint(
                "(status = 'processing') = (leased_until IS NOT NULL)", name=f"ck_{name}_leased"
            ),
            CheckConstraint("attempts >= 0 AND deliveries >= 0", name=f"ck_{name}_counts"),
            Index(f"ix_{name}_updated", "updated_at"),
            Index(
                f"ix_{name}_open",
                "status",
                "updated_at",
                postgresql_where=text("status <> 'processed'"),
                sqlite_where=text("status <> 'processed'"),
            ),
            {**IN_MYSQL, **cls.__inbox_args__},
        )


class _Base(DeclarativeBase):
    metadata = metadata


class InboxMessage(InboxMixin, _Base):
    """A row of the inbox: what a handler has done with an event."""

    __tablename__ = "jetstream_inbox"


def inbox_model(
    name: str = "jetstream_inbox", schema: str | None = None, *, in_metadata: MetaData = metadata
) -> type[Any]:
    """The model for a table of another name or in a schema; one class for each.

    What ``jetstream_inbox_table`` and ``jetstream_inbox_schema`` use.
    """
    if in_metadata is metadata and (name, schema) == ("jetstream_inbox", None):
        return InboxMessage
    key = (id(in_metadata), name, schema)
    if key not in _models:
        base = type("Base", (DeclarativeBase,), {"metadata": in_metadata})
        body = {"__tablename__": name, "__inbox_args__": {"schema": schema}}
        _models[key] = type("InboxMessage", (InboxMixin, base), body)
    return _models[key]


_models: dict[tuple[int, str, str | None], type[Any]] = {}
