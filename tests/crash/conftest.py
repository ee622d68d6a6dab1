"""Servers of a test's own, to be killed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_jetstream.testing import NatsServer
from tests.servers import PostgresServer, RedisServer, need


@pytest.fixture
def own_nats() -> Iterator[NatsServer]:
    need("nats")
    with NatsServer() as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    need("redis")
    with RedisServer() as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    need("postgresql")
    with PostgresServer() as server:
        yield server
