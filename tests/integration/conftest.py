"""What the tests of the connection, and those of the flush, begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream, breaker, flusher, recorder
from celery_jetstream.config import Config
from celery_jetstream.connection import Connection
from tests.burials import Desk
from tests.conftest import Names
from tests.databases import Database
from tests.flushing import Flushing
from tests.servers import NatsServer, need
from tests.watching import watched

__all__ = ("watched",)


@pytest.fixture
def own_server() -> Iterator[NatsServer]:
    """A server to be hurt."""
    need("nats")
    with NatsServer() as server:
        yield server


@pytest.fixture
def connect_to() -> Iterator[Callable[..., Connection]]:
    """``connect_to(urls, **settings)``: a connection that ends with the test."""
    connections: list[Connection] = []

    def make(urls: Any, **settings: Any) -> Connection:
        settings = {"app_name": "api", "destination_app": "worker", **settings}
        connections.append(Connection(Config(nats_urls=urls, **settings)))
        return connections[-1]

    yield make
    for connection in connections:
        connection.close()


@pytest.fixture
def make_desk(names: Names) -> Iterator[Callable[..., Desk]]:
    """``make_desk(url, **settings)``: an app with dead letters on demand."""
    made: list[Desk] = []

    def make(url: str, **settings: Any) -> Desk:
        made.append(Desk(url, names, **settings))
        return made[-1]

    yield make
    for desk in made:
        desk.close()


@pytest.fixture
def desk(make_desk: Callable[..., Desk], nats_server: NatsServer) -> Desk:
    return make_desk(nats_server.url)


@pytest.fixture
def make_jetstream(names: Names) -> Iterator[Callable[..., JetStream]]:
    made: list[JetStream] = []

    def make(urls: Any, **settings: Any) -> JetStream:
        app = Celery("test", broker="memory://", set_as_current=False)
        app.conf.update(
            jetstream_nats_urls=urls,
            jetstream_stream_name=names.stream_name,
            jetstream_app_name=names.app_name,
            jetstream_destination_app=names.destination_app,
            **settings,
        )
        made.append(JetStream(app))
        return made[-1]

    yield make
    for jetstream in made:
        jetstream.close()


@pytest.fixture
def make_flushing(
    nats_server: NatsServer, database: Database, names: Names
) -> Iterator[Callable[..., Flushing]]:
    """``make_flushing(url, database, **settings)``: an outbox, ready; default: the test's own."""
    made: list[Flushing] = []

    def make(url: str = nats_server.url, database: Database = database, **settings: Any) -> Any:
        made.append(Flushing(url, database, names, **settings).prepare())
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush waits for NATS, and the breaker for its next try, a hundredth of the usual time."""
    monkeypatch.setattr(flusher, "CONNECT_TIMEOUT", 0.03)
    monkeypatch.setattr(flusher, "PUBLISH_TIMEOUT", 0.2)
    monkeypatch.setattr(breaker, "PAUSE", (0.005, 0.1))
    monkeypatch.setattr(recorder, "NO_STREAM_PAUSE", 0.1)
