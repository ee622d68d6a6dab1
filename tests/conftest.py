"""What every test may use: servers (one of each kind for the whole run), names, counts."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state
from hypothesis import settings

import celery_jetstream.tasks  # noqa: F401 - the library's own
from celery_jetstream import capabilities
from tests.databases import Database
from tests.servers import (
    OLD_NATS_SERVER,
    MariaServer,
    NatsServer,
    PostgresServer,
    RabbitServer,
    RedisServer,
    nats_version,
    need,
    wait_until,
)

__all__ = ("Names", "wait_until")

# No deadlines for examples: a busy machine is no defect. (Under CI it has a profile of its own.)
settings.register_profile("default", settings.get_profile("default"), deadline=None)

# The quick ones say first what is broken, and the longest are not what all others have to be waited
# for with; within a file the order is random.
FOLDERS = ("unit", "crash", "integration")
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
    parser.addoption(
        "--nats-server",
        metavar="PATH",
        help="the nats-server that the tests use; 'old' is Debian's, the oldest that we support",
    )
    chaos = parser.getgroup("chaos", "tests/crash/test_chaos.py")
    chaos.addoption("--seed", type=int, help="of the first round; default: any")
    chaos.addoption("--volleys", type=int, help="faults, or several at once, in each round")
    chaos.addoption("--chaos-report", metavar="FILE", help="what came of it, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--nats-server"):
        os.environ["NATS_SERVER_BINARY"] = OLD_NATS_SERVER if path == "old" else path


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    from tests.crash.chaos.report import say

    say(terminalreporter, config.getoption("--chaos-report"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (*_rank(item), -sizes[item.path], str(item.path)))
    many_rounds = config.getoption("--rounds") > 1
    for item in items:
        if many_rounds and "crash" in item.path.parts:
            item.add_marker(pytest.mark.timeout(0), append=False)  # comes before the module's
        elif not many_rounds and item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="only with --rounds above 1: make crash"))
        for marker in item.iter_markers("needs_nats"):
            if (version := nats_version()) and not capabilities.has(version, marker.args[0]):
                reason = f"nats-server {version} has no {marker.args[0]}"
                item.add_marker(pytest.mark.skip(reason=reason))


def _rank(item: pytest.Item) -> tuple[int, bool]:
    """Of its folder, and within it: chaos takes longest of all."""
    return _folder_rank(item), item.path.name != "test_chaos.py"


def _folder_rank(item: pytest.Item) -> int:
    folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


# What a module of tests shares (handlers) is every later app's as well: only its own tests are to
# have it. What Celery and the library share is there from the beginning.
Celery(set_as_current=False).finalize()
_shared_by: dict[Path, set[Any]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    before = set(_state._on_app_finalizers)
    report = yield
    if isinstance(collector, pytest.Module):
        _shared_by[collector.path] = _state._on_app_finalizers - before
        _state._on_app_finalizers.intersection_update(before)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Around a test: its module's handlers; and logging as it was, whatever Celery has set up."""
    before, root = set(_state._on_app_finalizers), logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    _state._on_app_finalizers |= _shared_by.get(item.path, set())
    try:
        return (yield)
    finally:
        _state._on_app_finalizers.intersection_update(before)
        root.setLevel(level)
        root.handlers[:] = handlers


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NATS_URL", "NATS_URLS", "JETSTREAM_BRIDGE_DISABLE_AUTOSTART"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The one that all tests share; it does not wait for the disk."""
    need("postgresql")
    with PostgresServer(fsync=False) as server:
        yield server


@pytest.fixture(scope="session")
def maria_server() -> Iterator[MariaServer]:
    """The one that all tests share; it does not wait for the disk."""
    need("mariadb")
    with MariaServer(fsync=False) as server:
        yield server


@pytest.fixture
def postgresql(postgres_server: PostgresServer) -> Database:
    """Empty for this test: the tables are in a schema of the test's own user."""
    name = _new_name()
    postgres_server.create_user(name)
    url, async_url = postgres_server.url, postgres_server.async_url
    return Database("postgresql", url("postgres", name), async_url("postgres", name))


@pytest.fixture
def mariadb(maria_server: MariaServer) -> Database:
    name = _new_name()
    maria_server.create_database(name)
    return Database("mariadb", maria_server.url(name))


@pytest.fixture
def sqlite(tmp_path: Path) -> Database:
    """A file that is not there yet; who makes the engine switches WAL on."""
    path = tmp_path / "database.sqlite"
    return Database("sqlite", f"sqlite+pysqlite:///{path}", f"sqlite+aiosqlite:///{path}")


@pytest.fixture(params=["postgresql", "mariadb", "sqlite"])
def database(request: pytest.FixtureRequest) -> Database:
    """Each kind in turn, empty. It is not dropped: it goes with its server."""
    database: Database = request.getfixturevalue(request.param)
    return database


def _new_name() -> str:
    return f"test_{uuid.uuid4().hex}"


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
