"""What every test may use: servers (one of each kind for the whole run), names, counts."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers import OLD_NATS_SERVER, NatsServer, RabbitServer, RedisServer, need, wait_until

__all__ = ("Names", "wait_until")

# The quick ones say first what is broken; within a folder the order is random.
FOLDERS = ("unit", "contract", "integration", "crash")
TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Names:
    """Names that no other test uses, so that tests can share a server."""

    app_name: str
    destination_app: str
    stream_name: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rounds", type=int, default=1, help="how often each crash test does what it does"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_folder_rank)
    if config.getoption("--rounds") == 1:
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="only with --rounds above 1: make crash"))


def _folder_rank(item: pytest.Item) -> int:
    folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NATS_URL", "NATS_URLS", "JETSTREAM_BRIDGE_DISABLE_AUTOSTART"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    count: int = request.config.getoption("--rounds")
    return count


@pytest.fixture
def names() -> Names:
    suffix = uuid.uuid4().hex[:8]  # not from `random`, which is seeded anew for every test
    return Names(f"api-{suffix}", f"worker-{suffix}", f"stream-{suffix}")


@pytest.fixture(scope="session")
def nats_server() -> Iterator[NatsServer]:
    """A server that all tests share: leave it running (one that you kill is one of your own)."""
    need("nats")
    with NatsServer() as server:
        yield server


@pytest.fixture(scope="session")
def old_nats_server() -> Iterator[NatsServer]:
    """The oldest server that we support."""
    need("old-nats")
    with NatsServer(binary=OLD_NATS_SERVER) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    need("redis")
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def rabbit_server() -> Iterator[RabbitServer]:
    need("rabbitmq")
    with RabbitServer() as server:
        yield server


@pytest.fixture
def make_stack(
    tmp_path: Path, nats_server: NatsServer, redis_server: RedisServer, names: Names
) -> Iterator[Any]:
    """``make_stack(**settings)``: hub and desk around one stream; all ends with the test."""
    from tests.stack import Stack

    stacks: list[Stack] = []

    def make(nats_url: str = "", broker: str = "", **settings: Any) -> Stack:
        stack = Stack(
            tmp_path, nats_url or nats_server.url, broker or redis_server.url, names, **settings
        )
        stacks.append(stack)
        stack.hub.provision()
        return stack

    yield make
    for stack in stacks:
        stack.close()
