"""A worker and a bridge as an operator sees them: their metrics, their logs, their spans."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from celery_jetstream.testing import free_port
from tests.conftest import Names
from tests.servers import NatsServer, RedisServer
from tests.stack import CeleryProcess, Stack

__all__ = ("Watched", "samples", "watched")

APP = "tests.apps.watched"
Sample = tuple[str, tuple[tuple[str, str], ...]]


def samples(text: str) -> dict[Sample, float]:
    """The values by name and labels, without the prefix."""
    return {
        (sample.name.removeprefix("celery_jetstream_"), tuple(sorted(sample.labels.items()))): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Watched:
    """One prefork worker of two children, and one bridge; both count into one directory."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self.stack = stack
        self.port = int(stack.settings["jetstream_metrics_address"])
        self.counts = directory / "counts"
        self.counts.mkdir()
        self._spans = directory / "spans"
        environment = {
            "PROMETHEUS_MULTIPROC_DIR": str(self.counts),
            "WATCHED_SPANS": str(self._spans),
        }
        worker = ("worker", "--without-gossip", "--without-mingle", "-c", "2", "-O", "fair")
        self.worker = stack.celery(
            *worker, app=APP, DESK_WITHOUT="tests.apps.desk.looped", **environment
        )
        self.bridge = stack.celery("jetstream", "bridge", app=APP, **environment)
        self.worker.wait_for("ready.")
        self.bridge.wait_for("bridge is ready")

    def metrics(self) -> dict[Sample, float]:
        """What the worker's endpoint answers."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return samples(answer.read().decode())

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics().get((name, tuple(sorted(labels.items()))))

    def lines(self, process: CeleryProcess) -> list[dict[str, Any]]:
        """A process's log; each line is JSON."""
        return [json.loads(line) for line in process.text().splitlines() if line.startswith("{")]

    def spans(self) -> list[dict[str, Any]]:
        lines = self._spans.read_text().splitlines() if self._spans.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def watched(
    tmp_path_factory: pytest.TempPathFactory, nats_server: NatsServer, redis_server: RedisServer
) -> Iterator[Watched]:
    """For all tests that only look: starting them costs seconds."""
    directory = tmp_path_factory.mktemp("watched")
    mark = f"watched-{os.getpid()}"
    stack = Stack(
        directory,
        nats_server.url,
        redis_server.url,
        Names(f"desk-{mark}", f"hub-{mark}", mark),
        jetstream_metrics_address=free_port(),
        jetstream_max_deliver=2,
        jetstream_ack_wait=3,
        jetstream_backoff=[0.2],
    )
    try:
        stack.hub.provision()
        yield Watched(stack, directory)
    finally:
        stack.close()
