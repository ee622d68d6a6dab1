"""Publishing by many threads, loops and children at once: all is stored once, and nobody hangs."""

from __future__ import annotations

import asyncio
import faulthandler
import itertools
import json
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream, signals
from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.databases import Database
from tests.publishing import Source
from tests.servers import RedisServer
from tests.stack import ROOT, WORKER, CeleryProcess

pytestmark = pytest.mark.timeout(120)

THREADS = 32
EACH = 20


@pytest.fixture
def make_source(names: Names, nats_server: NatsServer) -> Iterator[Callable[..., Source]]:
    made: list[Source] = []

    def make(database: Database | None = None, **settings: Any) -> Source:
        made.append(Source(nats_server.url, names, database, **settings))
        return made[-1]

    yield make
    for source in made:
        source.jetstream.close()


def at_once(work: Callable[[int], object], count: int = THREADS) -> None:
    """Calls ``work(number)`` in so many threads, all at the same moment."""
    gate, errors = threading.Barrier(count), []

    def run(number: int) -> None:
        gate.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not errors, errors[:3]


# -- threads: each way to publish ------------------------------------------------------------------


def event(event_id: str) -> dict[str, Any]:
    return {"event_type": "user.created", "payload": {"id": 1}, "event_id": event_id}


def one_by_one(jetstream: JetStream, ids: list[str]) -> None:
    for event_id in ids:
        assert jetstream.publish(**event(event_id)).sequence


def in_batches(jetstream: JetStream, ids: list[str]) -> None:
    assert all(jetstream.publish_batch(map(event, ids)))


def in_loops(jetstream: JetStream, ids: list[str]) -> None:
    async def publish() -> list[Any]:
        return await asyncio.gather(*(jetstream.apublish(**event(event_id)) for event_id in ids))

    assert all(asyncio.run(publish()))


def by_the_outbox(jetstream: JetStream, ids: list[str]) -> None:
    for event_id in ids:
        assert jetstream.outbox.publish(**event(event_id)).queued


def in_one_transaction(jetstream: JetStream, ids: list[str]) -> None:
    with jetstream.outbox.database.engine.begin() as connection:
        jetstream.outbox.add_many(connection, list(map(event, ids)))


WAYS = (one_by_one, in_batches, in_loops, by_the_outbox, in_one_transaction)


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_threads_publish_in_every_way_at_once(
    kind: str, request: pytest.FixtureRequest, make_source: Callable[..., Source]
) -> None:
    """The first use too is at once: of the connection, the outbox, its tables."""
    source = make_source(request.getfixturevalue(kind))
    source.jetstream.close()
    app = Celery("used", broker="memory://", set_as_current=False)
    app.conf.update(source.settings)
    jetstream = JetStream(app)
    ids = [[f"t{thread}-{number}" for number in range(EACH)] for thread in range(THREADS)]
    try:
        at_once(lambda thread: WAYS[thread % len(WAYS)](jetstream, ids[thread]))
        source.wait_flushed(20)
        assert sorted(source.stored()) == sorted(itertools.chain(*ids))
    finally:
        jetstream.close()


# -- forks -----------------------------------------------------------------------------------------

_inherited: list[JetStream] = []


@pytest.fixture(autouse=True)
def _nothing_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child kombu closes what other tests' apps had open, and asks brokers that are gone."""
    monkeypatch.setattr(multiprocessing.util, "_afterfork_registry", weakref.WeakValueDictionary())


@pytest.fixture(autouse=True)
def stacks(tmp_path: Path) -> Iterator[Path]:
    """Where a child that hangs says where it does, at SIGUSR1."""
    path = tmp_path / "stacks"
    with path.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        _stacks[:] = [path]
        yield path
        faulthandler.unregister(signal.SIGUSR1)


_stacks: list[Path] = []


def ends_well(child: Any) -> None:
    child.join(30)
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGUSR1)
        wait_until(lambda: "most recent call" in _stacks[0].read_text(), 5, "its stack")
        pytest.fail(f"a child hangs:\n{_stacks[0].read_text()}")
    assert child.exitcode == 0


def publish_in_a_child(ids: list[str], by_outbox: bool) -> None:
    (jetstream,) = _inherited
    one_by_one(jetstream, ids)
    if by_outbox:
        by_the_outbox(jetstream, [f"{event_id}-row" for event_id in ids])
        jetstream.close()  # multiprocessing ends its children by os._exit


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_children_publish_while_the_parents_threads_do(
    make_source: Callable[..., Source], postgresql: Database
) -> None:
    """Forked in mid-publish, with an outbox in use: nothing of the parent's is used or closed."""
    source = make_source(postgresql, jetstream_outbox_lease=2)
    jetstream = source.jetstream
    by_the_outbox(jetstream, ["first"])
    stop, ids = threading.Event(), ["first"]

    def publish(_: int) -> None:
        while not stop.is_set():
            mine = [uuid.uuid4().hex for _ in range(4)]
            one_by_one(jetstream, mine[:2])
            by_the_outbox(jetstream, mine[2:])
            ids.extend(mine)

    threads = threading.Thread(target=at_once, args=(publish, 8), daemon=True)
    threads.start()
    wait_until(lambda: len(ids) > 50, 20, "the parent to publish")
    context = multiprocessing.get_context("fork")
    _inherited[:] = [jetstream]
    children = []
    for number in range(8):
        own = [f"child-{number}-{n}" for n in range(5)]
        ids.extend([*own, *(f"{event_id}-row" for event_id in own)])
        children.append(context.Process(target=publish_in_a_child, args=(own, True), daemon=True))
        children[-1].start()
    for child in children:
        ends_well(child)
    before = len(ids)
    wait_until(lambda: len(ids) > before + 20, 20, "the parent to publish still")
    stop.set()
    threads.join(30)
    assert not threads.is_alive()
    source.wait_flushed(30)
    assert sorted(source.stored()) == sorted(ids)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_another_thread_sends_a_signal(
    make_source: Callable[..., Source],
) -> None:
    """Celery's signals have a lock, held for a moment by who sends one that somebody receives."""
    source = make_source()
    _inherited[:] = [source.jetstream]

    def receiver(**_: Any) -> None: ...

    signals.before_event_publish.connect(receiver)
    child = multiprocessing.get_context("fork").Process(
        target=publish_in_a_child, args=(["child"], False), daemon=True
    )
    try:
        with signals.before_event_publish.lock:
            child.start()
        ends_well(child)
    finally:
        signals.before_event_publish.disconnect(receiver)
    assert source.stored() == ["child"]


def test_a_pools_children_publish_while_threads_of_the_main_process_do(
    tmp_path: Path, redis_server: RedisServer, make_source: Callable[..., Source], names: Names
) -> None:
    """Each child lives for two tasks, so that the worker forks again and again in mid-publish."""
    source = make_source(
        broker_url=redis_server.url,
        task_default_queue=f"announcer-{names.app_name}",
        task_ignore_result=True,
    )
    count = tmp_path / "count"
    environment = {
        "ANNOUNCER_CONF": json.dumps(source.settings),
        "ANNOUNCER_COUNT": str(count),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "celery", "-A", "tests.apps.announcer", *WORKER]
    worker = CeleryProcess(
        tmp_path / "worker.log",
        [*command, "-P", "prefork", "-c", "3", "--max-tasks-per-child", "2"],
        environment,
    )
    try:
        worker.wait_for("ready.")
        sender = Celery("sender", set_as_current=False)
        sender.conf.update(source.settings)
        for number in range(12):
            sender.send_task("announce", (number,))
        sender.close()
        wanted = {f"task-{number}" for number in range(12)}
        wait_until(lambda: wanted <= set(source.stored()), 60, "what the tasks publish")
        assert worker.stop() == 0
    finally:
        worker.end()
    ids = json.loads(count.read_text())
    assert len(ids) > 50
    assert "Traceback" not in worker.text(), worker.text()[-3000:]
    assert sorted(source.stored()) == sorted([*wanted, *ids])
