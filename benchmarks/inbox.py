"""The inbox: one INSERT of a handler, with the inbox's row in its transaction and without.

As ``drain``, with PostgreSQL (fsync on). The tick of a run with an inbox is before its commit, that
of the others after it: over thousands of runs that is nothing. After each turn the effects are
counted: one for each message.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import NullPool, create_engine, text

from benchmarks.drain import Drain
from benchmarks.figures import Sample
from tests.servers import PostgresServer

BASE, PLAIN, INBOX, DIRECT_INBOX = "no inbox", "plain Celery", "inbox", "inbox, direct"


class Inbox(Drain):
    """A drain into a database."""

    plain_app = bridged_app = "app_inserting"

    def _start(self) -> None:
        self.postgres = self._stack.enter_context(PostgresServer())
        os.environ["BENCH_DATABASE"] = self.postgres.url("postgres")
        self._stack.callback(os.environ.pop, "BENCH_DATABASE")
        os.environ["BENCH_CONF"] = "{}"  # for importing the app's table
        from benchmarks.app_inserting import metadata
        from celery_jetstream.schema import create_inbox

        engine = create_engine(self.postgres.url("postgres"), poolclass=NullPool)
        with engine.begin() as connection:
            metadata.create_all(connection)
            create_inbox(connection)
        self._watch = engine
        super()._start()

    @property
    def variants(self) -> dict[str, Callable[..., Sample]]:
        return {
            PLAIN: self.plain,
            BASE: self.bare,
            INBOX: self.boxed,
            DIRECT_INBOX: self.boxed_direct,
        }

    def bare(self, count: int = 0) -> Sample:
        return self.bridged(count, "bare.created")

    def boxed(self, count: int = 0) -> Sample:
        return self.bridged(count, "boxed.created")

    def boxed_direct(self, count: int = 0) -> Sample:
        return self.direct(count, "boxed.created")

    def _meters(self) -> dict[str, Callable[[], list[int]]]:
        return {"postgres": lambda: self.postgres.pids}

    def counted(self, name: str) -> Callable[..., Sample]:
        """A variant, under its name; the effects are one for each message."""

        def turn(count: int = 0) -> Sample:
            with self._watch.begin() as connection:
                connection.execute(text("TRUNCATE effects; TRUNCATE jetstream_inbox"))
            sample = self.variants[name](count)
            with self._watch.connect() as connection:
                effects = connection.scalar(text("SELECT count(*) FROM effects"))
                rows = connection.scalar(text("SELECT count(*) FROM jetstream_inbox"))
            assert effects == (count or self.count), f"{effects} effects"
            boxed = name in (INBOX, DIRECT_INBOX)
            assert rows == (effects if boxed else 0), f"{rows} rows of the inbox"
            sample.variant = name
            return sample

        return turn


@contextmanager
def running(count: int) -> Iterator[dict[str, Callable[..., Sample]]]:
    """The variants, with servers of their own."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        Inbox(Path(directory), count) as inbox,
    ):
        yield {name: inbox.counted(name) for name in inbox.variants}
