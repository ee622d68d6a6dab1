"""The servers of the outbox benchmarks, and what they themselves say of a run."""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
from celery import Celery
from nats.js.api import AckPolicy, ConsumerConfig
from sqlalchemy import Connection, NullPool, create_engine, text

from benchmarks import events
from benchmarks.process import ROOT, Process
from celery_jetstream import JetStream
from celery_jetstream.testing import NatsServer, wait_until
from tests.servers import MariaServer, PostgresServer

OURS = "benchmarks.client_outbox"
PEERS = ROOT / ".venv-bench"
#: Of these the report has the versions: the peers, what they stand on, and what draws the figures.
IN_REPORT = (
    *("nats-outbox", "faststream-outbox", "faststream", "taskiq", "taskiq-nats", "celery-salt"),
    *("celery", "nats-py", "matplotlib"),
)
STREAM = "bench"
PEER_STREAM = {"name": STREAM, "subjects": ["bench.>"], "storage": "file"}
#: Seconds between two looks at whether a peer is done.
LOOK = 0.02

_STATEMENTS = text(
    "SELECT coalesce(sum(calls), 0), coalesce(sum(wal_bytes), 0) FROM pg_stat_statements s "
    "JOIN pg_database d ON d.oid = s.dbid JOIN pg_user u ON u.usesysid = s.userid "
    "WHERE d.datname = :name AND u.usename = 'postgres'"
)
_DEAD = text(
    "SELECT coalesce(sum(n_tup_upd + n_tup_del), 0), coalesce(sum(n_tup_hot_upd), 0) "
    "FROM pg_stat_user_tables"
)


class CountingPostgres(PostgresServer):
    """PostgreSQL as it comes, fsync and all, but that it counts statements for everybody."""

    def server_command(self) -> Sequence[str]:
        return [
            *super().server_command(),
            *("-c", "shared_preload_libraries=pg_stat_statements"),
        ]


@dataclass(frozen=True)
class Counted:
    """What PostgreSQL counted.

    Attributes:
        statements: that a client sent, BEGIN and COMMIT among them; a prepared one counts each
            time that it is executed, and one with many parameter sets once for each.
        wal: bytes of write-ahead log.
        dead: row versions that vacuum must remove; since the database was made.
        hot: of these, those that left no index entry behind.
    """

    statements: int
    wal: int
    dead: int
    hot: int


@dataclass(frozen=True)
class Stored:
    """What the stream holds, in order: each event's number and key, and when it was stored."""

    events: list[tuple[int, str]]
    times: list[float]

    def check(self, count: int) -> None:
        assert len(self.events) == count, f"{len(self.events)} stored of {count}"
        assert len(set(self.events)) == count, "stored twice"

    @property
    def inversions(self) -> int:
        return events.inversions(self.events)


class Rig:
    """PostgreSQL with fsync, NATS with its streams in files, MariaDB and SQLite on demand."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._names = (f"bench_{number}" for number in itertools.count(1))
        self._maria: MariaServer | None = None

    def __enter__(self) -> Rig:
        try:
            self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            self.nats = self._stack.enter_context(NatsServer())
            self.postgres = self._stack.enter_context(CountingPostgres())
            self.postgres._execute("CREATE EXTENSION pg_stat_statements")
            self.postgres._execute("CREATE USER watcher SUPERUSER")
            app = Celery("watcher", broker="memory://", set_as_current=False)
            app.conf.update(
                jetstream_nats_urls=self.nats.url,
                jetstream_app_name="watcher",
                jetstream_destination_app="desk",
            )
            self._jetstream = JetStream(app)
            self._stack.callback(self._jetstream.close)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- databases -------------------------------------------------------------------------------

    def database(self, kind: str = "postgresql") -> Database:
        """A new, empty one."""
        name = next(self._names)
        if kind == "sqlite":
            return Database(kind, name, f"sqlite:///{self.directory / name}.sqlite")
        if kind == "mariadb":
            if self._maria is None:
                self._maria = self._stack.enter_context(MariaServer())
            self._maria.create_database(name)
            return Database(kind, name, self._maria.url(name))
        self.postgres.create_database(name)
        asynchronous = self.postgres.async_url(name)
        return Database(kind, name, self.postgres.url(name), asynchronous)

    def pids(self, kind: str) -> list[int]:
        """The database server's processes."""
        if kind == "postgresql":
            return self.postgres.pids
        return self._maria.pids if kind == "mariadb" and self._maria else []

    def drop(self, database: Database) -> None:
        if database.kind == "postgresql":
            self.postgres._execute(f"DROP DATABASE {database.name} WITH (FORCE)")
        elif database.kind == "mariadb":
            assert self._maria
            self._maria._execute(f"DROP DATABASE {database.name}")

    def settle(self, database: Database, *, checkpoint: bool = False) -> None:
        """After the filling: the planner knows the table, and counting begins.

        ``checkpoint``: and so much was filled in that its writing would be in the way.
        """
        if database.kind != "postgresql":
            return
        with self.watch(database.name) as connection:
            connection.execute(text("VACUUM ANALYZE"))
            if checkpoint:
                connection.execute(text("CHECKPOINT"))
        with self.watch("postgres") as connection:
            connection.execute(text("SELECT pg_stat_statements_reset()"))

    def counted(self, database: Database) -> Counted:
        """Since :meth:`settle`; the client must have gone."""
        with self.watch("postgres") as connection:
            wait_until(lambda: not self._clients(connection, database), 10, "the client to go")
            statements, wal = connection.execute(_STATEMENTS, {"name": database.name}).one()
        with self.watch(database.name) as connection:
            dead, hot = connection.execute(_DEAD).one()
        return Counted(int(statements), int(wal), int(dead), int(hot))

    def _clients(self, connection: Connection, database: Database) -> int:
        found = connection.execute(
            text("SELECT count(*) FROM pg_stat_activity WHERE datname = :name"),
            {"name": database.name},
        )
        return int(found.scalar_one())

    def watch(self, name: str) -> Connection:
        """A connection that is not among what is counted."""
        url = self.postgres.url(name, "watcher")
        return create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect()

    # -- the stream ------------------------------------------------------------------------------

    def delete_stream(self) -> None:
        self._api(f"STREAM.DELETE.{STREAM}")

    def create_stream(self) -> None:
        """The peers'; ours is provisioned."""
        answer = self._api(f"STREAM.CREATE.{STREAM}", PEER_STREAM)
        assert "error" not in answer, answer

    def purge(self) -> None:
        answer = self._api(f"STREAM.PURGE.{STREAM}")
        assert "error" not in answer, answer

    @property
    def stored(self) -> int:
        return int(self._api(f"STREAM.INFO.{STREAM}")["state"]["messages"])

    def read(self) -> Stored:
        """All that the stream holds (it keeps it)."""
        return asyncio.run(_read(self.nats.url, self.stored))

    def _api(self, subject: str, request: Any = None) -> dict[str, Any]:
        return self._jetstream.connection.run(self._jetstream._api, subject, request or {})

    # -- processes -------------------------------------------------------------------------------

    def ours(self, database: Database, **settings: Any) -> Process:
        settings = {"conf": {}, **settings}
        log = self.directory / f"{database.name}.log"
        return Process(
            sys.executable, OURS, log, database=database.url, nats=self.nats.url, **settings
        )

    def peer(self, module: str, database: Database, options: dict[str, Any]) -> Process:
        return Process(
            PEERS / "bin" / "python",
            module,
            self.directory / f"{database.name}.log",
            database=database.async_url,
            nats=self.nats.url,
            options=options,
        )

    def wait_drained(self, database: Database, count: int, pending: str, seconds: float) -> float:
        """Waits until a peer is done, disturbing it little; when that was seen."""
        end = time.monotonic() + seconds
        with self.watch(database.name) as connection:
            left = text(f"SELECT EXISTS (SELECT FROM {pending})")
            while self.stored < count or connection.execute(left).scalar_one():
                assert time.monotonic() < end, f"{self.stored} of {count} after {seconds} s"
                time.sleep(LOOK)
        return time.perf_counter()


@dataclass(frozen=True)
class Database:
    """One database of one turn."""

    kind: str
    name: str
    url: str
    async_url: str = ""


def missing_peers() -> str | None:
    """Why the peers cannot run here; None when they can."""
    return None if (PEERS / ".ready").exists() else f"no {PEERS.name}: `make bench` makes it"


def peer_versions() -> dict[str, str]:
    """The versions in the peers' environment, where it is."""
    if missing_peers():
        return {}
    pinned = (ROOT / "benchmarks" / "requirements.lock").read_text()
    found = re.findall(r"^([a-z][a-z0-9-]*)==(\S+)", pinned, re.MULTILINE)
    return {f"{name} (peers)": version for name, version in found if name in IN_REPORT}


async def _read(url: str, count: int) -> Stored:
    client = await nats.connect(url)
    try:
        stream = client.jetstream()
        first = (await stream.stream_info(STREAM)).state.first_seq
        subject = (await stream.get_msg(STREAM, first)).subject
        config = ConsumerConfig(  # as a work queue wants it
            ack_policy=AckPolicy.EXPLICIT,
            filter_subject=subject,
            inactive_threshold=60,
            max_ack_pending=-1,
            mem_storage=True,
        )
        consumer = await stream.add_consumer(STREAM, config)
        reader = await stream.pull_subscribe_bind(consumer.name, stream=STREAM)
        found, times = [], []
        while len(found) < count:
            for message in await reader.fetch(min(1000, count - len(found)), timeout=5):
                found.append(events.read(message.data))
                times.append(message.metadata.timestamp.timestamp())
        return Stored(found, times)
    finally:
        await client.close()
