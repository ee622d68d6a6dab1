"""What Prometheus gets when it asks: what was counted, and what is looked up for it.

With ``PROMETHEUS_MULTIPROC_DIR`` what all processes with that directory have counted. What needs a
look at the server or the database is found out by the process that is asked, within
:data:`TIMEOUT` seconds and at most every :data:`CACHE` seconds; where it cannot be found out, that
is a metric.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from celery import bootsteps

from . import meters
from .catalogue import LOOKED_UP, METRICS
from .exceptions import ConfigurationError, NotConnectedError
from .threads import in_native_thread, wait

__all__ = ("ServeMetrics", "exposition", "serve")

logger = logging.getLogger(__name__)

#: Seconds for which what was looked up is told again.
CACHE = 10.0
#: Seconds that one look may take. Prometheus waits 10 s by default.
TIMEOUT = 2.0

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

#: Values of one metric, by its labels' values.
Values = dict[tuple[str, ...], float]
Found = dict[str, Values]


def exposition(jetstream: Any) -> tuple[str, bytes]:
    """What an endpoint ``/metrics`` answers: the content type, and the body.

    Blocks for 4 s at the most, where server and database hang. Thread-safe; under gevent call it
    as what blocks a thread.

    Args:
        jetstream: the app's :class:`~celery_jetstream.extension.JetStream`.

    Raises:
        ConfigurationError: ``jetstream_metrics`` is off, or prometheus_client is not installed.
    """
    registry = _registry(jetstream)
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    return CONTENT_TYPE_LATEST, generate_latest(registry)


def serve(jetstream: Any) -> Callable[[], None] | None:
    """Answers on ``jetstream_metrics_address``, in a thread; returns what ends that.

    None where there is no such setting. An address that cannot be had is logged, and no more: a
    worker is not to die of it.
    """
    address = jetstream.config.metrics_address
    if address is None:
        return None
    from prometheus_client import start_http_server

    host, port = address
    try:
        server, _ = start_http_server(port, host, registry=_Registry(jetstream))
    except OSError as error:
        logger.error(
            "no metrics at jetstream_metrics_address=%s:%d: %s. Give each process of this host an "
            "address of its own",
            host,
            port,
            error,
        )
        return None
    if hasattr(os, "register_at_fork"):  # or a child of a killed worker keeps the port
        os.register_at_fork(after_in_child=server.socket.close)
    logger.info("metrics are at http://%s:%d/metrics", host, server.server_port)

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop


class ServeMetrics(bootsteps.StartStopStep):
    """Serves a worker's metrics in its main process, for all its children."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **_: Any) -> None:
        super().__init__(worker)
        self._end: Callable[[], None] | None = None

    def include_if(self, worker: Any) -> bool:
        """Whether the settings have an address."""
        config = worker.app.jetstream.config
        if config.metrics and _forks(worker) and DIRECTORY not in os.environ:
            logger.warning(
                "jetstream_metrics is on, and %s is not set: what this worker's children count "
                "nobody sees. Set it, before the worker starts, to an empty directory of its own",
                DIRECTORY,
            )
        return config.metrics_address is not None

    def start(self, worker: Any) -> None:
        """Begins to answer."""
        self._end = serve(worker.app.jetstream)

    def stop(self, worker: Any) -> None:
        """Ends it."""
        end, self._end = self._end, None
        if end is not None:
            end()


def _forks(worker: Any) -> bool:
    return str(getattr(worker.pool_cls, "__module__", "")).endswith("prefork")


# -- registries ----------------------------------------------------------------------------------


def _registry(jetstream: Any) -> Any:
    if not jetstream.config.metrics:
        raise ConfigurationError(
            "jetstream_metrics is off, so that nothing is counted; set jetstream_metrics=True",
            setting="jetstream_metrics",
        )
    meters.start()
    return _Registry(jetstream)


class _Registry:
    """What ``prometheus_client`` asks of a registry, which it makes text of."""

    def __init__(self, jetstream: Any) -> None:
        self._jetstream = jetstream

    def restricted_registry(self, names: Any) -> _Registry:
        """All of it, whatever a query's ``name[]`` wants."""
        return self

    def collect(self) -> Iterator[Any]:
        """Every metric of the process, or of all that have its directory."""
        from prometheus_client import REGISTRY, CollectorRegistry, multiprocess
        from prometheus_client.core import GaugeMetricFamily

        if directory := os.environ.get(DIRECTORY):
            _forget_dead_processes(directory)
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
            yield from registry.collect()
        else:
            with meters.collecting:
                counted = list(REGISTRY.collect())
            yield from counted
        found = _looks(self._jetstream).found()
        for metric in METRICS:
            if metric.processes == LOOKED_UP and metric.name in found:
                family = GaugeMetricFamily(metric.full_name, metric.help, labels=metric.labels)
                for labels, value in found[metric.name].items():
                    family.add_metric(labels, value)
                yield family


def _forget_dead_processes(directory: str) -> None:
    """Of a child that was killed nobody has told: its gauges would be read for ever."""
    from prometheus_client import multiprocess

    files = glob.glob(os.path.join(glob.escape(directory), "gauge_live*.db"))
    pids = {int(found[1]) for file in files if (found := re.search(r"_(\d+)\.db$", file))}
    for pid in pids:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            with contextlib.suppress(FileNotFoundError):  # another was asked at the same time
                multiprocess.mark_process_dead(pid, directory)  # type: ignore[no-untyped-call]
        except OSError:
            pass  # it is another user's, and lives


# -- what is looked up ---------------------------------------------------------------------------


class _Looks:
    """What one app's processes are asked for, and cannot count. Thread-safe."""

    def __init__(self, jetstream: Any) -> None:
        self._jetstream = jetstream
        self._lock = threading.Lock()
        self._cached: Found = {}
        self._until = 0.0
        self._looking: Future[Found] | None = None

    def found(self) -> Found:
        """The values by metric; of what cannot be found out now, only that.

        Who comes while another looks gets what was found before, and waits for nobody.
        """
        if time.monotonic() >= self._until and self._lock.acquire(blocking=False):
            try:
                found: Found = {"collector_up": {}}
                self._look(found, "nats", self._ask_nats)
                if self._jetstream.config.has_database:
                    self._look(found, "outbox", self._ask_outbox)
                self._cached, self._until = found, time.monotonic() + CACHE
            finally:
                self._lock.release()
        return self._cached | self._here()

    def _look(self, cached: Found, collector: str, look: Callable[[Found], bool]) -> None:
        found, is_one, up = Found(), True, True
        try:
            is_one = look(found)
        except Exception as error:
            up = False
            logger.debug("metrics of %s could not be found out: %s", collector, error)
        if is_one:
            cached["collector_up"][(collector,)] = float(up)
            cached.update(found)

    def _here(self) -> Found:
        """What this process knows of itself."""
        jetstream = self._jetstream
        found: Found = {"ready": {(): float(jetstream.health.now()["ready"])}}
        if bridge := jetstream.running.get("bridge"):
            found["messages_in_flight"] = {(): bridge.in_flight}
            found["broker_connected"] = {(): float(bridge.broker_connected)}
        else:
            found["messages_in_flight"] = {(): len(jetstream.keeper.held())}
        return found

    # -- NATS --------------------------------------------------------------------------------------

    def _ask_nats(self, found: Found) -> bool:
        self._jetstream.connection.run(self._ask_jetstream, found, timeout=TIMEOUT)
        return True

    async def _ask_jetstream(self, found: Found) -> None:
        """Each is told as soon as it is known: what is denied takes nothing else away."""
        config, failed = self._jetstream.config, list[NotConnectedError]()
        await self._jetstream.connection.session(TIMEOUT / 2)
        pending, unsettled = Values(), Values()
        for consumer in await self._jetstream.consumers():
            operation = f"CONSUMER.INFO.{consumer.stream}.{consumer.durable}"
            if info := await self._ask(operation, failed, optional=consumer.optional):
                pending[(consumer.durable,)] = info["num_pending"]
                unsettled[(consumer.durable,)] = info["num_ack_pending"]
        found["consumer_pending_messages"] = pending
        found["consumer_ack_pending_messages"] = unsettled
        if config.use_dlq:
            subject = config.dead_letter_subject
            operation = f"STREAM.INFO.{config.stream_name}"
            if info := await self._ask(operation, failed, subjects_filter=subject):
                stored = (info["state"].get("subjects") or {}).get(subject, 0)
                found["dead_letters_stored"] = {(): stored}
        if failed:
            raise failed[0]

    async def _ask(
        self,
        operation: str,
        failed: list[NotConnectedError],
        *,
        optional: bool = False,
        **request: Any,
    ) -> Mapping[str, Any]:
        """The answer; empty where there is none, which ``failed`` tells but of the optional."""
        try:
            answer: Mapping[str, Any] = await self._jetstream._api(operation, request)
        except NotConnectedError as error:
            failed.append(error)
            return {}
        if refusal := answer.get("error"):
            if not (optional and refusal.get("code") == 404):
                failed.append(NotConnectedError(f"JetStream answered {refusal}"))
            return {}
        return answer

    # -- the outbox --------------------------------------------------------------------------------

    def _ask_outbox(self, found: Found) -> bool:
        """False where there is no outbox: the database may be the inbox's alone."""
        if self._looking is None or self._looking.done():
            self._looking = in_native_thread(self._read_outbox)
        state = wait(self._looking, TIMEOUT)
        found.update(state)
        return bool(state)

    def _read_outbox(self) -> Found:
        from .outbox_status import table_state

        database = self._jetstream.outbox.database
        try:
            with database.statements() as connection:
                state = table_state(connection, database.tables)
        except ConfigurationError:
            return {}
        counts = {status: _number(count) for status, count in state["counts"].items()}
        given_up: Values = {(status,): counts[status] for status in ("failed", "exception")}
        return {
            "outbox_pending_events": {(): counts["pending"]},
            "outbox_oldest_due_seconds": {(): state["oldest_due"] or 0.0},
            "outbox_given_up_events": given_up,
        }


def _number(count: int | str) -> float:
    """``"10000+"`` is where counting ends."""
    return float(str(count).rstrip("+"))


_all_looks: weakref.WeakKeyDictionary[Any, _Looks] = weakref.WeakKeyDictionary()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_all_looks.clear)  # a look that runs ends in the parent


def _looks(jetstream: Any) -> _Looks:
    return _all_looks.setdefault(jetstream, _Looks(weakref.proxy(jetstream)))
