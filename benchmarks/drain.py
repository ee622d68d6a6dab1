"""Drain: how fast a worker empties a full queue, plain and behind the bridge.

One plain worker, one worker of handlers and one bridge run all the time; the two variants take
turns on the same Redis. A turn begins at once for both: the plain queue appears whole (Redis
``COPY`` of one that was filled with ``task.delay``), and the messages, stored before, appear when
JetStream's consumer is resumed. The rate is that of the handlers' own clock, from the first run
to the last; CPU is counted until everything is acknowledged.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
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

BASE = "plain"
WORKER = ("worker", "-l", "WARNING", "-c", "2", "--without-gossip", "--without-mingle",
          "--without-heartbeat", "-O", "fair")  # fmt: skip
FULL, STORE = "bench-full", "bench-store"
WARM_UP = 300
NEVER = "2100-01-01T00:00:00Z"


class Drain:
    """The servers, the processes and the two variants.

    Args:
        directory: for logs and tallies.
        count: messages per turn.
        worker: more arguments for both workers.
        settings: more Celery settings for both apps.
    """

    plain_app, bridged_app = "app_plain", "app_bridged"

    def __init__(
        self,
        directory: Path,
        count: int,
        *,
        worker: tuple[str, ...] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.count = count
        self._directory = directory
        self._worker_arguments = worker
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
        hub = Celery("hub", broker="memory://", set_as_current=False)
        hub.conf.update(**self._jetstream("hub", "desk"))
        self.hub = JetStream(hub)
        self._stack.callback(self.hub.close)
        plain, bridged = self.plain_app, self.bridged_app
        self.plain_worker = self._celery(plain, "plain", *WORKER, *self._worker_arguments)
        self.worker = self._celery(bridged, "bridged", *WORKER, *self._worker_arguments)
        self.bridge = self._celery(bridged, "bridged", "jetstream", "bridge")
        self.bridge.wait_for("bridge is ready", 60)
        for worker, queue in ((self.plain_worker, "plain"), (self.worker, "bridged")):
            self._wait_consuming(worker, queue)
        self._fill()
        for variant in self.variants.values():
            variant(WARM_UP)

    @property
    def variants(self) -> dict[str, Callable[..., Sample]]:
        """The variants by name; each may be given a count."""
        return {BASE: self.plain, "bridged": self.bridged}

    def _jetstream(self, app: str, other: str) -> dict[str, Any]:
        return {
            "jetstream_nats_urls": self.nats_server.url,
            "jetstream_app_name": app,
            "jetstream_destination_app": other,
        }

    def _celery(self, app: str, queue: str, *arguments: str) -> CeleryProcess:
        conf = {
            "broker_url": self.redis_server.url,
            "task_default_queue": queue,
            "task_ignore_result": True,
            "broker_connection_retry_on_startup": True,
            **({} if queue == "plain" else self._jetstream("desk", "hub")),
            **self._settings,
        }
        environment = {
            "BENCH_CONF": json.dumps(conf),
            tally.DIRECTORY: str(self._directory / "tally"),
        }
        name = [] if arguments[0] != "worker" else ["-n", f"{queue}@%h"]
        process = CeleryProcess(
            self._directory / f"{queue}-{arguments[0]}.log",
            [sys.executable, "-m", "celery", "-A", f"benchmarks.{app}", *arguments, *name],
            environment,
        )
        self._stack.callback(_stop, process)
        return process

    def _wait_consuming(self, worker: CeleryProcess, queue: str) -> None:
        """Until the worker has bound its queue and both children are there."""

        def ready() -> bool:
            assert worker.process.poll() is None, worker.text()[-3000:]
            return self.redis.exists(f"_kombu.binding.{queue}") and (
                "-c" not in WORKER or len(cpu.children(worker.pid)) >= 2
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
                envelope = self.hub.publisher.message(**_event(number)).event.envelope
                handle.apply_async((envelope,), queue=queue)
        app.close()

    # -- the variants ----------------------------------------------------------------------------

    def plain(self, count: int = 0) -> Sample:
        """``task.delay``, preloaded, and a worker."""
        source = f"{FULL}-{count}" if count else FULL
        return self._turn("plain", count or self.count, self.plain_worker, source)

    def bridged(self, count: int = 0, event_type: str = "bench.created") -> Sample:
        """Events, preloaded in JetStream, the bridge and a worker."""
        count = count or self.count
        self._pause(NEVER)
        events = [{**_event(number), "event_type": event_type} for number in range(count)]
        results = self.hub.publish_batch(events, timeout=120)
        assert all(results), next(result.error for result in results if not result)
        return self._turn("bridged", count, self.worker, None)

    def _meters(self) -> dict[str, Callable[[], list[int]]]:
        """Further processes whose CPU is counted."""
        return {}

    def _turn(self, queue: str, count: int, worker: CeleryProcess, source: str | None) -> Sample:
        self.tally.mark()
        children = cpu.children(worker.pid)
        meter = cpu.Meter(
            {
                "bridge": lambda: [self.bridge.pid],
                "main": lambda: [worker.pid],
                "children": lambda: children,
                "redis": lambda: [self.redis_server.pid],
                "nats": lambda: [self.nats_server.pid],
                **self._meters(),
            }
        )
        if source is None:
            self._pause(None)
        else:
            self.redis.copy(source, queue)
        wait_until(lambda: self.tally.count >= count, 600, f"{count} handled")
        wait_until(lambda: self._settled(queue), 60, "everything to be settled")
        used = meter.read()
        times = self.tally.times()
        assert len(times) == count, f"{len(times)} runs for {count} messages"
        ours = {name: 1e6 * value / count for name, value in used.items() if name != "others"}
        return Sample(
            queue,
            (count - 1) / (times[-1] - times[0]),
            {**ours, "sum": sum(ours.values())},
            {"others_cores": used["others"] / (times[-1] - times[0])},
        )

    def _pause(self, until: str | None) -> None:
        subject = "CONSUMER.PAUSE.jetstream-bridge-stream.desk-workers"
        answer = self._api(subject, {"pause_until": until} if until else {})
        assert "error" not in answer, answer

    def _settled(self, queue: str) -> bool:
        if self.redis.llen(queue) or self.redis.hlen("unacked"):
            return False
        if queue == "plain":
            return True
        answer = self._api("CONSUMER.INFO.jetstream-bridge-stream.desk-workers", {})
        return not (answer["num_pending"] or answer["num_ack_pending"])

    def _api(self, subject: str, request: Mapping[str, Any]) -> dict[str, Any]:
        return self.hub.connection.run(self.hub._api, subject, request)


def _event(number: int) -> dict[str, Any]:
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
