"""The shop's own table. The outbox's are the library's; both are in one database."""

from __future__ import annotations

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    total: Mapped[int]  # in cents
    state: Mapped[str]
    reminder: Mapped[str]  # an event_id
