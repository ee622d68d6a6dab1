"""Drain: how fast a worker empties a full queue: plain, behind the bridge, and in direct mode.

One plain worker, one worker of handlers with its bridge, and one direct worker run all the time;
the variants take turns on the same servers. A turn begins at once for all: the plain queue appears
whole (Redis ``COPY`` of one that was filled with ``task.delay``), and the messages, stored before,
appear when JetStream's consumer is resumed. The rate is that of the handlers' own clock, from the
first run to the last; CPU is counted until everything is acknowledged.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from benchmarks import cpu, tally
from benchmarks.figures import Sample
from celery_jetstream import JetStream
from celery_jetstream.testing import NatsServer, wait_until
from tests.servers import RedisServer
from tests.stack import CeleryProcess

BASE, BRIDGED, DIRECT = "plain", "bridged", "direct"
OPTIONS = ("-l", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat",
           "-O", "fair")  # fmt: skip
#: Arguments for each kind of pool.
PREFORK, THREADS = ("-P", "prefork", "-c", "2"), ("-P", "threads", "-c", "4")
FULL, STORE = "bench-full", "bench-store"
WARM_UP = 300
NEVER = "2100-01-01T00:00:00Z"


class Drain:
    """The servers, the processes and the variants.

    Args:
        directory: for logs and tallies.
        count: messages per turn.
        pool: arguments for all workers.
        settings: more Celery settings for all apps.
    """

    plain_app, bridged_app = "app_plain", "app_bridged"

    def __init__(
        self,
        directory: Path,
        count: int,
        *,
        pool: tuple[str, ...] = PREFORK,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.count = count
        self._directory = directory
        self._pool = pool
        self._settings = dict(settings or {})
        self._stack = ExitStack()

    def __enter__(self) -> Drain:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        (self._directory / "tally").mkdir()
        self.tally = tally.Reader(self._directory / "tally")
        self.redis_server = self._stack.enter_context(RedisServer())
        self.nats_server = self._stack.enter_context(NatsServer())
        self.redis = redis.Redis.from_url(self.redis_server.url)
        self._stack.callback(self.redis.close)
        self.hubs = {name: self._hub(name) for name in (BRIDGED, DIRECT)}
        self.hub = self.hubs[BRIDGED]
        worker, handling = ("worker", *OPTIONS, *self._pool), self.bridged_app
        self.workers = {
            BASE: self._celery(self.plain_app, BASE, *worker),
            BRIDGED: self._celery(handling, BRIDGED, *worker),
            DIRECT: self._celery(handling, DIRECT, "jetstream", *worker),
        }
        self.bridge = self._celery(handling, BRIDGED, "jetstream", "bridge")
        self.bridge.wait_for("bridge is ready", 60)
        for queue in (BASE, BRIDGED):
            self._wait_consuming(queue)
        self._fill()
        for variant in self.variants.values():
            variant(WARM_UP)

    def _hub(self, name: str) -> JetStream:
        """A publisher to the workers of that name; each has a stream of its own."""
        app = Celery("hub", broker="memory://", set_as_current=False)
        app.conf.update(**self._jetstream("hub", "desk", name))
        hub = JetStream(app)
        self._stack.callback(hub.close)
        return hub

    @property
    def variants(self) -> dict[str, Callable[..., Sample]]:
        """The variants by name; each may be given a count."""
        return {BASE: self.plain, BRIDGED: self.bridged, DIRECT: self.direct}

    def _jetstream(self, app: str, other: str, name: str) -> dict[str, Any]:
        return {
            "jetstream_stream_name": name,
            "jetstream_nats_urls": self.nats_server.url,
            "jetstream_app_name": f"{app}-{name}",
            "jetstream_destination_app": f"{other}-{name}",
        }

    def _celery(self, app: str, queue: str, *arguments: str, mark: str = "") -> CeleryProcess:
        conf = {
            "broker_url": self.redis_server.url,
            "task_default_queue": queue,
            "task_ignore_result": True,
            "broker_connection_retry_on_startup": True,
            **({} if queue == BASE else self._jetstream("desk", "hub", queue)),
            **self._settings,
        }
        environment = {
            "BENCH_CONF": json.dumps(conf),
            tally.DIRECTORY: str(self._directory / "tally"),
        }
        name = ["-n", f"{queue}@%h"] if "worker" in arguments else []
        process = CeleryProcess(
            self._directory / f"{queue}-{'-'.join(arguments[:2])}{mark}.log",
            [sys.executable, "-m", "celery", "-A", f"benchmarks.{app}", *arguments, *name],
            environment,
        )
        self._stack.callback(_stop, process)
        return process

    def _wait_consuming(self, queue: str) -> None:
        """Until the worker has bound its queue and both children are there."""
        worker = self.workers[queue]

        def ready() -> bool:
            assert worker.process.poll() is None, worker.text()[-3000:]
            return self.redis.exists(f"_kombu.binding.{queue}") and (
                self._pool != PREFORK or len(cpu.children(worker.pid)) >= 2
            )

        wait_until(ready, 60, f"the {queue} worker")

    def _fill(self) -> None:
        """Fills the queues that the plain turns are copied from."""
        app = Celery("filler", broker=self.redis_server.url, set_as_current=False)
        name = f"benchmarks.{self.plain_app}.handle"
        handle = app.task(_nothing, name=name, ignore_result=True)
        for queue, count in ((FULL, self.count), (f"{FULL}-{WARM_UP}", WARM_UP)):
            app.conf.task_default_queue = queue
            for number in range(count):
                envelope = self.hub.publisher.message(**event(number)).event.envelope
                handle.apply_async((envelope,), queue=queue)
        app.close()

    # -- the variants ----------------------------------------------------------------------------

    def plain(self, count: int = 0) -> Sample:
        """``task.delay``, preloaded, and a worker."""
        source = f"{FULL}-{count}" if count else FULL
        return self._turn(BASE, count or self.count, source)

    def bridged(self, count: int = 0, event_type: str = "bench.created") -> Sample:
        """Events, preloaded in JetStream, the bridge and a worker."""
        return self._events(BRIDGED, count or self.count, event_type)

    def direct(self, count: int = 0, event_type: str = "bench.created") -> Sample:
        """The same, and a worker that takes them itself."""
        return self._events(DIRECT, count or self.count, event_type)

    def _events(self, name: str, count: int, event_type: str) -> Sample:
        self._pause(name, NEVER)
        events = [{**event(number), "event_type": event_type} for number in range(count)]
        results = self.hubs[name].publish_batch(events, timeout=120)
        assert all(results), next(result.error for result in results if not result)
        return self._turn(name, count, None)

    def _meters(self) -> dict[str, Callable[[], list[int]]]:
        """Further processes whose CPU is counted."""
        return {}

    def _turn(self, queue: str, count: int, source: str | None, *, leave: bool = False) -> Sample:
        """Begins at once, and ends when all (or, with ``leave``, so many) are handled."""
        worker = self.workers[queue]
        self.tally.mark()
        children = cpu.children(worker.pid)
        meter = cpu.Meter(
            {
                "bridge": lambda: [self.bridge.pid] if queue == BRIDGED else [],
                "main": lambda: [worker.pid],
                "children": lambda: children,
                "redis": lambda: [self.redis_server.pid],
                "nats": lambda: [self.nats_server.pid],
                **self._meters(),
            }
        )
        if source is None:
            self._pause(queue, None)
        else:
            self.redis.copy(source, queue)
        wait_until(lambda: self.tally.count >= count, 600, f"{count} handled")
        if leave:
            self._api(queue, "STREAM.PURGE", {})
            time.sleep(1)  # for what is on its way
        wait_until(lambda: self._settled(queue), 60, "everything to be settled")
        used = meter.read()
        times = self.tally.times()
        if leave:
            times = times[:count]
        assert len(times) == count, f"{len(times)} runs for {count} messages"
        ours = {name: 1e6 * value / count for name, value in used.items() if name != "others"}
        return Sample(
            queue,
            (count - 1) / (times[-1] - times[0]),
            {**ours, "sum": sum(ours.values())},
            {"others_cores": used["others"] / (times[-1] - times[0])},
        )

    def _pause(self, name: str, until: str | None) -> None:
        request = {"pause_until": until} if until else {}
        answer = self._api(name, "CONSUMER.PAUSE", request)
        assert "error" not in answer, answer

    def _settled(self, queue: str) -> bool:
        if self.redis.llen(queue) or self.redis.hlen("unacked"):
            return False
        if queue == BASE:
            return True
        answer = self._api(queue, "CONSUMER.INFO", {})
        return not (answer["num_pending"] or answer["num_ack_pending"])

    def _api(self, name: str, operation: str, request: Mapping[str, Any]) -> dict[str, Any]:
        hub = self.hubs[name]
        of_stream = operation.startswith("STREAM.")
        subject = f"{operation}.{name}" + ("" if of_stream else f".desk-{name}-workers")
        return hub.connection.run(hub._api, subject, request)


def event(number: int) -> dict[str, Any]:
    return {
        "event_type": "bench.created",
        "payload": {"id": number, "name": "a user of ordinary length", "email": "u@example.com"},
    }


def _nothing(event: dict[str, Any]) -> None:
    """Only sent from here, never run."""


def _stop(process: CeleryProcess) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.stop(20)


@contextmanager
def running(count: int, **options: Any) -> Iterator[Drain]:
    """A :class:`Drain` with a directory of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        Drain(Path(directory), count, **options) as drain,
    ):
        yield drain
