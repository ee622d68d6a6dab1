"""The hub's database, a SQLite file: the deliveries it took in, and the outbox beside them."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_jetstream.models import OutboxEvent
from celery_jetstream.schema import create_outbox


class Base(DeclarativeBase):
    pass


class Delivery(Base):
    """A webhook delivery that the hub has taken in; GitHub may send one twice."""

    __tablename__ = "deliveries"

    number: Mapped[int] = mapped_column(primary_key=True)
    event_type: Mapped[str]


def url(directory: Path) -> str:
    return f"sqlite:///{directory / 'hub.sqlite3'}"


def engine(directory: Path) -> Engine:
    return create_engine(url(directory), connect_args={"timeout": 20})


class Store:
    """The database as the demo looks at it, from outside and with SQL."""

    def __init__(self, directory: Path) -> None:
        self._engine = engine(directory)

    def make(self) -> None:
        """Makes the tables; before any other process opens the file."""
        with self._engine.begin() as connection:
            Base.metadata.create_all(connection)
            create_outbox(connection)

    def taken_in(self) -> int:
        """Business rows that were committed."""
        with Session(self._engine) as session:
            return session.scalar(select(func.count()).select_from(Delivery)) or 0

    def outbox(self) -> dict[str, int]:
        """The outbox's rows, counted by their status."""
        counted = select(OutboxEvent.status, func.count()).group_by(OutboxEvent.status)
        with Session(self._engine) as session:
            return dict(session.execute(counted).all())

    def close(self) -> None:
        self._engine.dispose()
