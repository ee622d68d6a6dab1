"""The tests' own database servers are what the other tests think they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, NullPool, create_engine, inspect, text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.databases import Database
from tests.servers import MariaServer, PostgresServer, alive, need, wait_until

SERVERS = {"postgresql": PostgresServer, "mariadb": MariaServer}


@contextmanager
def transaction(url: str) -> Iterator[Connection]:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        yield connection


def store(url: str, body: str) -> None:
    with transaction(url) as connection:
        connection.execute(text("CREATE TABLE kept (body VARCHAR(40))"))
        connection.execute(text("INSERT INTO kept VALUES (:body)"), {"body": body})


def stored(url: str) -> str:
    with transaction(url) as connection:
        return str(connection.execute(text("SELECT body FROM kept")).scalar_one())


def frozen(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("kind", SERVERS)
def test_a_private_one_survives_a_kill_and_leaves_nothing_after_a_stop(kind: str):
    need(kind)
    with SERVERS[kind]() as server:
        server.create_database("shop")
        url = server.url("shop")
        store(url, "kept")

        killed = server.pids
        server.kill()
        assert not any(map(alive, killed))
        server.start()
        assert server.url("shop") == url
        assert stored(url) == "kept"

        engine = create_engine(url)
        with engine.connect():  # and back to the pool: a client that stays is not waited for
            stopped, directory = server.pids, server.directory
        server.pause()
        wait_until(lambda: all(map(frozen, stopped)), 5, "all of it to be frozen")
        server.stop()
        engine.dispose()
        assert not any(map(alive, stopped))
        assert not directory.exists()


class TestFreshDatabase:
    def test_it_keeps_every_character(self, database: Database):
        body = "Grüße, 東京 🎉"
        store(database.url, body)
        assert stored(database.url) == body

    @pytest.mark.parametrize("turn", ["first", "second"])
    def test_it_is_empty_whatever_another_test_stored(self, database: Database, turn: str):
        with transaction(database.url) as connection:
            assert inspect(connection).get_table_names() == []
        store(database.url, turn)
        assert stored(database.url) == turn

    @pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
    def test_asyncio_reaches_the_same_one(self, kind: str, request: pytest.FixtureRequest):
        database: Database = request.getfixturevalue(kind)

        async def read() -> str:
            engine = create_async_engine(database.async_url, poolclass=NullPool)
            async with engine.connect() as connection:
                return str((await connection.execute(text("SELECT body FROM kept"))).scalar_one())

        store(database.url, "kept")
        assert asyncio.run(read()) == "kept"
