"""The servers of a chaos run, all its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from celery_jetstream.testing import NatsServer
from tests.servers import PostgresServer, RedisServer

__all__ = ("Servers", "running_servers")


class Servers:
    """Those of one run; by the names that the report has for them."""

    def __init__(self, nats: NatsServer, redis: RedisServer, postgres: PostgresServer) -> None:
        self.nats, self.redis, self.postgres = nats, redis, postgres
        self.by_name = {"nats-server": nats, "Redis": redis, "PostgreSQL": postgres}

    def heal(self) -> None:
        """All of them run, and answer."""
        for server in self.by_name.values():
            if server.running and server._paused:
                server.resume()
            server.start()


@contextmanager
def running_servers() -> Iterator[Servers]:
    with (
        NatsServer() as nats,
        RedisServer() as redis_server,
        PostgresServer(fsync=False) as postgres,  # no machine crashes here
    ):
        yield Servers(nats, redis_server, postgres)
