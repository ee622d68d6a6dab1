"""The chain that is broken: writers, an outbox and who flushes it, JetStream, bridge, workers.

Every part is a real process, and every server is this run's own.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path

from sqlalchemy import Engine, NullPool, create_engine, text

from celery_jetstream.schema import create_inbox, create_outbox
from tests.conftest import Names
from tests.crash.chaos.own_servers import Servers, running_servers
from tests.crash.chaos.services import Service, left_of
from tests.stack import ROOT, WORKER, CeleryProcess, Stack

__all__ = ("Chain", "running_chain")

#: The shop's writers, and the seconds between two transactions of one.
WRITERS, PACE = 2, 0.15
#: Short, so that what was lost comes again soon; a standstill is often longer than ack_wait.
BANK = {
    "jetstream_ack_wait": 3,
    "jetstream_lease": 30,
    "jetstream_backoff": [0.2, 1],
    "jetstream_inbox_lease": 5,
    "jetstream_outage_errors": ["sqlalchemy.exc.OperationalError"],  # of the handler with no inbox
    "jetstream_outbox_nudge": False,
}
SHOP = {
    "jetstream_outbox_lease": 2,
    "jetstream_outbox_flush_interval": 1,
    "jetstream_outbox_batch_size": 20,
}
CELERY = {
    "task_ignore_result": True,
    "broker_connection_retry_on_startup": True,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_lost_wait": 1,
    "broker_transport_options": {"visibility_timeout": 20},
}
#: Seconds that whatever is told to stop may take. Celery's own prefork worker may need 32.
STOP = 45.0


class Chain(Stack):
    """All processes, and the tables.

    Args:
        directory: for logs.
        servers: running.
        direct: workers take their messages from JetStream themselves.
        bridges: how many, where they do not.
        push: the server sends the messages to the bridges.
    """

    def __init__(
        self,
        directory: Path,
        servers: Servers,
        *,
        direct: bool,
        bridges: int = 1,
        push: bool = False,
    ) -> None:
        suffix = uuid.uuid4().hex[:8]
        names = Names(f"bank-{suffix}", f"shop-{suffix}", f"stream-{suffix}")
        servers.postgres.create_database("bank")
        servers.postgres.create_database("shop")
        super().__init__(
            directory,
            servers.nats.url,
            servers.redis.url,
            names,
            direct=direct,
            jetstream_database_url=servers.postgres.url("bank"),
            jetstream_consumer_mode="push" if push else "pull",
            **{**CELERY, **BANK},
        )
        self.servers = servers
        self.bridges = 0 if direct else bridges
        self.mark = f"CHAOS_RUN={suffix}"
        self.points = directory / "points"
        self.points.mkdir()
        self.shop = {
            "jetstream_nats_urls": servers.nats.url,
            "jetstream_stream_name": names.stream_name,
            "jetstream_app_name": names.destination_app,
            "jetstream_destination_app": names.app_name,
            **CELERY,
            **SHOP,
            "broker_url": servers.redis.url,
            "task_default_queue": f"shop-{suffix}",
            "jetstream_database_url": servers.postgres.url("shop"),
        }
        self._make_tables()
        self.services: list[Service] = []

    @property
    def environment(self) -> dict[str, str]:
        name, _, value = self.mark.partition("=")
        return {
            name: value,
            "CHAOS_BANK": json.dumps(self.settings),
            "CHAOS_SHOP": json.dumps(self.shop),
            "CHAOS_POINTS": str(self.points),
            "PYTHONPATH": str(ROOT),
        }

    def _make_tables(self) -> None:
        with self.engines["shop"].begin() as connection:
            create_outbox(connection)
            connection.execute(
                text(
                    "CREATE TABLE orders (event_id TEXT PRIMARY KEY, kind TEXT NOT NULL, "
                    "at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp())"
                )
            )
        with self.engines["bank"].begin() as connection:
            create_inbox(connection)
            create_outbox(connection)
            connection.execute(
                text(
                    "CREATE TABLE effects (id SERIAL PRIMARY KEY, event_id TEXT NOT NULL, "
                    "sequence BIGINT NOT NULL, num_delivered INTEGER NOT NULL, "
                    "at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp())"
                )
            )
        self.hub.provision()

    @cached_property
    def engines(self) -> dict[str, Engine]:
        return {
            name: create_engine(
                self.servers.postgres.url(name),
                poolclass=NullPool,
                connect_args={"connect_timeout": 2},
            )
            for name in ("shop", "bank")
        }

    # -- processes -------------------------------------------------------------------------------

    def start_all(self) -> None:
        """Each is started again from now on when it ends, by :meth:`look`."""
        self.services = [
            *(Service("worker", self._worker, "ready.") for _ in range(2)),
            *(Service("bridge", self._bridge, "bridge is ready") for _ in range(self.bridges)),
            Service("flusher", self._flusher, "ready.", whole=self.direct),
            *(Service("writer", partial(self._writer, n), "writing") for n in range(WRITERS)),
        ]
        if not self.direct:
            self.services.append(Service("beat", self._beat, "beat: Starting"))

    def _named(self, what: str) -> str:
        return f"{what}{len(self._processes)}"

    def _worker(self) -> CeleryProcess:
        command = ("jetstream", *WORKER) if self.direct else WORKER
        name = self._named("w")
        return self.celery(*command, "-c", "2", "-n", f"{name}@%h", app="tests.apps.chaos_bank")

    def _bridge(self) -> CeleryProcess:
        return self.celery("jetstream", "bridge", app="tests.apps.chaos_bank")

    def _flusher(self) -> CeleryProcess:
        """In direct mode with its beat, as ``worker -B``."""
        name = self._named("f")
        beat = ("-B", "-s", str(self.directory / "schedule")) if self.direct else ()
        return self.celery(
            *(*WORKER, "-c", "2", "-n", f"{name}@%h", *beat), app="tests.apps.chaos_shop"
        )

    def _beat(self) -> CeleryProcess:
        schedule = str(self.directory / "schedule")
        return self.celery(
            "beat", "-l", "INFO", "-s", schedule, "--pidfile=", app="tests.apps.chaos_shop"
        )

    def _writer(self, number: int) -> CeleryProcess:
        """Another name each time: its numbers begin anew."""
        name = self._named(f"writer{number}x")
        command = [sys.executable, "-m", "tests.apps.chaos_shop", name, str(PACE)]
        process = CeleryProcess(self.directory / f"{name}.log", command, self.environment)
        self._processes.append(process)
        return process

    def of(self, name: str) -> list[Service]:
        return [service for service in self.services if service.name == name]

    def look(self) -> None:
        """What a process manager does."""
        for service in self.services:
            service.look()

    def hold(self, wanted: bool) -> None:
        """Has the writers wait, or go on."""
        file = self.points / "hold"
        file.touch() if wanted else file.unlink(missing_ok=True)

    def all_ready(self) -> bool:
        return all(service.is_ready for service in self.services)

    def stop(self, *names: str) -> list[str]:
        """SIGTERM to all of these at once; returns what did not end in time, and kills it."""
        stopped = [service for name in names for service in self.of(name)]
        for service in stopped:
            service.stop()
        deadline = time.monotonic() + STOP
        late = [service.name for service in stopped if not service.wait(deadline)]
        return [f"the {name} did not end in {STOP:g} s" for name in late]

    def close(self) -> None:
        super().close()
        for engine in self.engines.values():
            engine.dispose()

    def left_running(self) -> list[str]:
        """Processes of this run that are there."""
        return left_of(self.mark)


@contextmanager
def running_chain(
    directory: Path, *, direct: bool, bridges: int = 1, push: bool = False
) -> Iterator[Chain]:
    """A chain with its servers; all of it ends with the block."""
    with ExitStack() as stack:
        servers = stack.enter_context(running_servers())
        chain = Chain(directory, servers, direct=direct, bridges=bridges, push=push)
        stack.callback(chain.close)
        stack.callback(servers.heal)
        yield chain
