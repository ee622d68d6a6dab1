"""Peers: the same empty handler, run by libraries from PyPI beside our modes.

As ``drain``, and on the same servers, each peer with a worker of its own in ``.venv-bench`` that
runs all the time. A peer's events have the payload of ours, in a message of the peer's own kind;
before its turn they are published by a client of its own, while its JetStream consumer is paused
as ours are; on RabbitMQ, which has no such thing, the worker is stopped instead. What was chosen
for each peer, and why, is said in its module.

At the end of a turn nothing may be left, waiting or unacknowledged: as many runs as messages are
then one run for each.

celery-salt has its clock started when its worker goes on, not at the first run: an event is two
tasks for it in one queue, so the first run comes when all events have been through the first.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kombu import Connection

from benchmarks import cpu, tally
from benchmarks.drain import BASE, DIRECT, NEVER, OPTIONS, PREFORK, WARM_UP, Drain, _stop, event
from benchmarks.figures import Sample
from benchmarks.process import ROOT
from benchmarks.rig import PEERS, missing_peers
from celery_jetstream.testing import wait_until
from tests.servers import RABBITMQ_SCRIPT, RabbitServer, missing
from tests.stack import CeleryProcess

__all__ = ("BASE", "DIRECT", "HANDLERS", "Peers", "running")

SALT = "celery-salt"
PYTHON = str(PEERS / "bin" / "python")


@dataclass(frozen=True)
class Peer:
    """Where a peer's handler is, and what runs it; its queue or stream has the peer's name.

    Attributes:
        module: of the handler; run with ``fill`` it is the client.
        worker: arguments for Python.
        children: how many processes it starts.
    """

    module: str
    worker: tuple[str, ...]
    children: int = 2


def _module(name: str) -> str:
    return f"benchmarks.peer_handler_{name}"


HANDLERS = {
    "faststream": Peer(_module("faststream"), ("-m", _module("faststream")), children=0),
    "taskiq-nats": Peer(
        _module("taskiq_nats"),
        (
            *("-m", "taskiq", "worker", f"{_module('taskiq_nats')}:broker"),
            *("--workers", "2", "--log-level", "WARNING", "--no-parse"),
        ),
    ),
    SALT: Peer(
        _module("celery_salt"),
        (
            *("-m", "celery", "-A", _module("celery_salt"), "worker"),
            *(*OPTIONS, *PREFORK, "-n", f"{SALT}@%h"),
        ),
    ),
}


class Peers(Drain):
    """A drain with more workers, where they can run."""

    def _start(self) -> None:
        super()._start()
        self.left_out: list[str] = []
        for name in HANDLERS:
            if reason := missing_peers() or (missing("rabbitmq") if name == SALT else None):
                self.left_out.append(f"{name}: {reason}")
            else:
                self._start_peer(name)

    def _start_peer(self, name: str) -> None:
        if name == SALT:
            self.rabbit = self._stack.enter_context(RabbitServer())
            self.queue = self._stack.enter_context(Connection(self.rabbit.url)).default_channel
        command = [PYTHON, *HANDLERS[name].worker]
        worker = CeleryProcess(self._log(name), command, self._environment(name))
        self._stack.callback(worker.end)  # and the children that it may leave behind
        self._stack.callback(_stop, worker)
        self._wait_ready(name, worker)
        self.workers[name] = worker
        self.peer(name, WARM_UP)

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def _environment(self, name: str) -> dict[str, str]:
        server = self.rabbit if name == SALT else self.nats_server
        return {"BENCH_SERVER": server.url, tally.DIRECTORY: str(self._directory / "tally")}

    def _wait_ready(self, name: str, worker: CeleryProcess) -> None:
        """Until it consumes, with all its processes."""

        def ready() -> bool:
            assert worker.poll() is None, worker.text()[-3000:]
            if len(cpu.children(worker.pid)) < HANDLERS[name].children:
                return False
            if name == SALT:
                return self._in_rabbit("consumers") == 1
            pulls = self._api(name, "CONSUMER.INFO", {}).get("num_waiting", 0)
            return bool(pulls >= max(1, HANDLERS[name].children))

        wait_until(ready, 120, f"the {name} worker")

    # -- the variants ----------------------------------------------------------------------------

    @property
    def variants(self) -> dict[str, Callable[..., Sample]]:
        peers = {name: partial(self.peer, name) for name in HANDLERS if name in self.workers}
        return {**super().variants, **peers}

    def peer(self, name: str, count: int = 0) -> Sample:
        """Events, preloaded, and a peer's worker."""
        self._fill_peer(name, count or self.count)
        return self._turn(name, count or self.count, None)

    def _fill_peer(self, name: str, count: int) -> None:
        payloads = [event(number)["payload"] for number in range(count)]
        with self._log(name).open("ab") as log:
            client = subprocess.Popen(
                [PYTHON, "-m", HANDLERS[name].module, "fill"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **self._environment(name)},
                text=True,
            )
        with client:
            assert client.stdout
            client.stdout.readline()  # it is connected: that of taskiq-nats ends a pause
            self._pause(name, NEVER)
            client.communicate(json.dumps(payloads), timeout=300)
        assert client.returncode == 0, self._log(name).read_text()[-3000:]

    def _meters(self) -> dict[str, Callable[[], list[int]]]:
        if SALT not in self.workers:
            return {}
        return {"rabbitmq": lambda: [self.rabbit.pid, *cpu.children(self.rabbit.pid)]}

    def _turn(self, queue: str, count: int, source: str | None, *, leave: bool = False) -> Sample:
        sample = super()._turn(queue, count, source, leave=leave)
        if queue == SALT:
            wait_until(lambda: not self._in_rabbit("messages"), 10, "everything to be acknowledged")
            self._count_from_the_start(sample, count)
        return sample

    def _count_from_the_start(self, sample: Sample, count: int) -> None:
        times = self.tally.times()
        assert len(times) == count, f"{len(times)} runs for {count} messages"
        took = times[-1] - self._resumed
        sample.rate = count / took
        sample.more["others_cores"] *= (times[-1] - times[0]) / took

    def _pause(self, name: str, until: str | None) -> None:
        if name != SALT:
            super()._pause(name, until)
        elif until:
            self.workers[name].send(signal.SIGSTOP)
        else:
            self._resumed = time.monotonic()
            self.workers[name].send(signal.SIGCONT)

    def _settled(self, queue: str) -> bool:
        if queue == SALT:
            return not self.queue.queue_declare(SALT, passive=True).message_count
        return super()._settled(queue)

    def _api(self, name: str, operation: str, request: Mapping[str, Any]) -> dict[str, Any]:
        if name not in HANDLERS:
            return super()._api(name, operation, request)
        return self.hub.connection.run(self.hub._api, f"{operation}.{name}.{name}", request)

    def _in_rabbit(self, what: str) -> int:
        """What RabbitMQ says of the queue; ``messages`` are also those not acknowledged."""
        environment = {**os.environ, **self.rabbit.environment()}
        answer = subprocess.run(
            [
                str(Path(RABBITMQ_SCRIPT).with_name("rabbitmqctl")),
                *("--node", environment["RABBITMQ_NODENAME"], "--formatter", "json"),
                *("list_queues", "name", what),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        queues = {queue["name"]: queue[what] for queue in json.loads(answer.stdout)}
        return int(queues.get(SALT, 0))


@contextmanager
def running(count: int) -> Iterator[Peers]:
    """:class:`Peers` with a directory of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        Peers(Path(directory), count) as peers,
    ):
        yield peers
