"""The activity board: what the handlers did, in a SQLite file that several processes share.

A run too many changes nothing that is shown, for an event has one row, by its ``event_id``.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery_jetstream import Event

SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS activity (
    event_id TEXT PRIMARY KEY, kind TEXT, repository TEXT, actor TEXT, what TEXT);
CREATE TABLE IF NOT EXISTS runs (
    event_id TEXT, event_type TEXT, num_delivered INTEGER, ended TEXT);
"""


class Board:
    def __init__(self, file: Path) -> None:
        self._file = file

    def make(self) -> None:
        """Makes the tables; before any other process opens the file."""
        with self._connect() as connection:
            connection.executescript(SCHEMA)

    # -- the handlers write ----------------------------------------------------------------------

    def show(self, event: Event, what: str) -> None:
        """Puts an event on the board."""
        payload = event.payload
        repository = (payload.get("repository") or {}).get("full_name", "")
        actor = (payload.get("sender") or {}).get("login", "")
        kind = event.event_type.split(".")[1]
        with self._connect() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO activity VALUES (?, ?, ?, ?, ?)",
                (event.event_id, kind, repository, actor, what),
            )

    def ran(self, event: Event, ended: str) -> None:
        """Notes a run of a handler and how it ended."""
        attempt = event.delivery.num_delivered if event.delivery else 0
        with self._connect() as connection:
            connection.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?)",
                (event.event_id, event.event_type, attempt, ended),
            )

    # -- the display reads -----------------------------------------------------------------------

    def handled(self) -> Counter[str]:
        """How often the handler of each event came to its end."""
        rows = self._rows("SELECT event_id FROM runs WHERE ended = 'handled'")
        return Counter(event_id for (event_id,) in rows)

    def retried(self) -> int:
        """Runs that were not an event's first."""
        return int(self._rows("SELECT COUNT(*) FROM runs WHERE num_delivered > 1")[0][0])

    def repositories(self, most: int) -> list[tuple[Any, ...]]:
        """``(repository, events, actors, latest)``, the busiest first."""
        return self._rows(
            """
            SELECT repository, COUNT(*), COUNT(DISTINCT actor),
                   (SELECT actor || ' ' || what FROM activity AS a
                     WHERE a.repository = activity.repository ORDER BY rowid DESC LIMIT 1)
              FROM activity WHERE repository != ''
             GROUP BY repository ORDER BY 2 DESC, 1 LIMIT ?
            """,
            most,
        )

    def actors(self, most: int) -> list[tuple[Any, ...]]:
        """``(actor, events)``, the busiest first."""
        return self._rows(
            "SELECT actor, COUNT(*) FROM activity WHERE actor != '' "
            "GROUP BY actor ORDER BY 2 DESC, 1 LIMIT ?",
            most,
        )

    def _rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        with self._connect() as connection:
            return connection.execute(query, arguments).fetchall()

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for each use: worker processes are forked."""
        with contextlib.closing(sqlite3.connect(self._file, timeout=20)) as connection, connection:
            yield connection
