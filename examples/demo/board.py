"""The activity board: what the handlers did, in a SQLite file that several processes share.

Totals are simply counted up, and an event is put on the board without asking whether it is there:
what makes them exact is the inbox, whose row commits together with both.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, NullPool, create_engine, func, select, text
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

from celery_jetstream import Event
from celery_jetstream.schema import create_inbox


class Base(DeclarativeBase):
    pass


class Activity(Base):
    """What a handler did with an event; a handler that did it twice would have two."""

    __tablename__ = "activity"

    id: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[str]
    repository: Mapped[str]
    actor: Mapped[str]
    what: Mapped[str]


class Total(Base):
    """How many events there were of a repository, or an actor."""

    __tablename__ = "totals"

    name: Mapped[str] = mapped_column(primary_key=True)
    events: Mapped[int]


class Run(Base):
    """A run of a handler, and how it ended."""

    __tablename__ = "runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    message: Mapped[int]
    num_delivered: Mapped[int]
    ended: Mapped[str]


def url(directory: Path) -> str:
    return f"sqlite:///{directory / 'board.sqlite3'}"


def show(session: Session, event: Event, what: str) -> None:
    """Puts an event on the board, in the session's transaction."""
    repository, actor = whose(event.payload)
    session.add(Activity(event_id=event.event_id, repository=repository, actor=actor, what=what))
    for name in filter(None, (repository, actor)):
        counted = insert(Total).values(name=name, events=1)
        session.execute(
            counted.on_conflict_do_update(
                index_elements=["name"], set_={"events": Total.events + 1}
            )
        )
    session.flush()


def whose(payload: dict[str, Any]) -> tuple[str, str]:
    """The repository and the actor of a webhook."""
    repository = (payload.get("repository") or {}).get("full_name", "")
    actor = (payload.get("sender") or {}).get("login", "")
    return repository, actor


class Board:
    """The file as one process sees it, apart from its handlers' sessions."""

    def __init__(self, directory: Path) -> None:
        self._url = url(directory)

    def make(self) -> None:
        """Makes the tables; before any other process opens the file."""
        with self._engine().begin() as connection:
            connection.execute(text("PRAGMA journal_mode = WAL"))
            Base.metadata.create_all(connection)
            create_inbox(connection)

    def ran(self, event: Event, ended: str) -> None:
        """Notes a run of a handler and how it ended."""
        assert event.delivery is not None
        message, attempt = event.delivery.sequence, event.delivery.num_delivered
        with Session(self._engine()) as session, session.begin():
            session.add(Run(message=message, num_delivered=attempt, ended=ended))

    # -- the display reads -----------------------------------------------------------------------

    def handled(self) -> Counter[str]:
        """How often each event was put on the board."""
        return Counter(event_id for (event_id,) in self._rows(select(Activity.event_id)))

    def totals(self) -> dict[str, int]:
        """Events by repository, and by actor."""
        return dict(self._rows(select(Total.name, Total.events)))

    def skipped(self) -> int:
        """Messages whose event was handled before, with another message."""
        found = select(Run.message).distinct().where(Run.ended == "handled before")
        handled = select(Run.message).where(Run.ended == "handled")
        return len(self._rows(found.where(Run.message.not_in(handled))))

    def retried(self) -> int:
        """Runs that were not an event's first."""
        again = select(func.count()).select_from(Run).where(Run.num_delivered > 1)
        return int(self._rows(again)[0][0])

    def repositories(self, most: int) -> list[tuple[Any, ...]]:
        """``(repository, events, actors, latest)``, the busiest first."""
        each = aliased(Activity)
        of_each = select(each.repository, func.max(each.id).label("latest"))
        of_each = of_each.add_columns(func.count(each.actor.distinct()).label("actors"))
        of_each = of_each.group_by(each.repository).subquery()
        said = Activity.actor + " " + Activity.what
        found = (
            select(Total.name, Total.events, of_each.c.actors, said)
            .join(of_each, of_each.c.repository == Total.name)
            .join(Activity, Activity.id == of_each.c.latest)
            .order_by(Total.events.desc(), Total.name)
            .limit(most)
        )
        return self._rows(found)

    def actors(self, most: int) -> list[tuple[Any, ...]]:
        """``(actor, events)``, the busiest first."""
        known = select(Activity.actor)
        found = select(Total.name, Total.events).where(Total.name.in_(known))
        return self._rows(found.order_by(Total.events.desc(), Total.name).limit(most))

    def _rows(self, query: Any) -> list[tuple[Any, ...]]:
        with self._engine().connect() as connection:
            return [tuple(row) for row in connection.execute(query)]

    def _engine(self) -> Engine:
        """One for each use, that keeps no connection: worker processes are forked."""
        return create_engine(self._url, poolclass=NullPool, connect_args={"timeout": 20})
