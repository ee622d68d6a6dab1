"""``JetStream(app)``: binds settings, connection and everything on top of it to a Celery app."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from celery import Celery, bootsteps
from celery import signals as celery_signals

from . import (
    control,  # noqa: F401 - registers its command
    plans,
    privacy,
    provisioning,
    signals,
    specs,
)
from .breaker import Breaker
from .config import Config
from .connection import Connection
from .consumers import consumer_specs, stream_spec
from .dead_letters import DeadLetters
from .direct import Direct
from .events import Event
from .exceptions import ConfigurationError, EventError, NotConnectedError
from .handlers import Handlers
from .health import Health, Part
from .metrics import ServeMetrics
from .preflight import check_permissions
from .provisioning import Provisioner
from .publisher import Message, Publisher, PublishResult
from .request import HandBack, Keeper
from .runtime import Runtime
from .schedule import Schedule
from .settler import Settler

if TYPE_CHECKING:
    from .aside import Aside
    from .doctor import Report
    from .inbox import Inbox
    from .outbox import Outbox

__all__ = ("JetStream",)

logger = logging.getLogger(__name__)

#: Seconds that ``publish`` tries: an election takes 4 to 6 s.
PUBLISH_TIMEOUT = 15.0
#: Seconds beyond that, for a loop thread that is kept busy (a receiver that blocks it).
SEND_GRACE = 5.0
#: Seconds between two looks at the topology because a stream was missing.
ENSURE_INTERVAL = 2.0
#: Seconds that whoever found it missing waits for that.
ENSURE_PATIENCE = 1.0
#: Seconds after which it is said again that something is missing, with ``auto_provision`` off.
MISSING_INTERVAL = 60.0

Middleware = Callable[[Event, Callable[[Event], Any]], Any]


class JetStream:
    """JetStream for one Celery app, also found as ``app.jetstream``.

    Settings are ``app.conf.jetstream_*``; they are read and checked at the first use. Connects
    when it is first needed, in each process for itself. Thread-safe and fork-safe.

    Args:
        app: the Celery app.

    Raises:
        ConfigurationError: the app has a JetStream already.
    """

    def __init__(self, app: Celery) -> None:
        if isinstance(getattr(app, "jetstream", None), JetStream):
            raise ConfigurationError(
                f"the app {app.main!r} has a JetStream already (app.jetstream); for another "
                "server or app_name make another Celery app"
            )
        self.app = app
        self.middleware: tuple[Middleware, ...] = ()
        #: This process is a worker that takes its messages from JetStream itself.
        self.dedicated = False
        self._lock = threading.Lock()
        self._runtime: Runtime | None = None
        self._health: Health | None = None
        #: What runs in this process and tells how it is: ``bridge``, ``direct``, ``relay``.
        self.running: dict[str, Part] = {}
        self._ensured = self._said_missing = 0.0
        self._consumers: tuple[specs.ConsumerSpec, ...] = ()
        self._ensuring: asyncio.Task[None] | None = None
        app.jetstream = self
        app.steps["worker"].add(CheckSettings)
        app.steps["worker"].add(ServeMetrics)
        app.steps["consumer"].add(HandBack)
        app.steps["consumer"].add(Direct)
        self._schedule = Schedule(app)
        _instances.add(self)

    def __repr__(self) -> str:
        return f"<JetStream of {self.app.main}: {self.state}>"

    @cached_property
    def config(self) -> Config:
        """The checked settings.

        Raises:
            ConfigurationError: names every wrong setting, its value and a good one.
        """
        config = Config.from_app(self.app)
        if config.metrics:
            from . import meters

            meters.start()
        return config

    def check(self) -> Handlers:
        """Reads and checks the settings and the handlers; returns the handlers.

        Raises:
            ConfigurationError: the settings are wrong, or two handlers have one pattern.
        """
        self.config  # noqa: B018 - read here so that a wrong one is said here
        return Handlers(self.app.tasks.values())

    def use(self, middleware: Middleware) -> Middleware:
        """Puts a callable around every handler: ``middleware(event, call_next)``.

        It calls ``call_next(event)`` and returns its result, or does not call it and returns a
        settlement (``Ack()``, ``Nak(5)``, ``DeadLetter("reason")``). The first added is the
        outermost. Add at import time, before the workers start. Usable as a decorator.
        """
        self.middleware = (*self.middleware, middleware)
        return middleware

    # -- connection ------------------------------------------------------------------------------

    def connect(self) -> None:
        """Connects now, and makes sure of stream and consumers where ``auto_provision`` is on.

        Raises:
            ConfigurationError: the settings are wrong, or two handlers have one pattern.
            ConnectionRefusedByServer: credentials or TLS are wrong; at once.
            NotConnectedError: no server answered in ``jetstream_connect_retry_attempts``.
            TopologyError: the stream or consumer cannot be had as it must be.
        """
        self.check()
        self.connection.connect()
        if self.config.auto_provision:
            self.connection.run(self._ensure)

    def check_permissions(self) -> None:
        """Tries, changing nothing, whether our NATS user may take and settle messages.

        Raises:
            ConfigurationError: it may not; names the subjects.
            NotConnectedError: no server.
        """
        self.connection.run(self._check_permissions)

    async def _check_permissions(self) -> None:
        session, consumers = await self.connection.session(), await self.consumers()
        await check_permissions(session, self.config, consumers, claims=False)

    def close(self, timeout: float = 5.0) -> None:
        """Waits for settlements to be confirmed and closes, ``timeout`` seconds at the most."""
        if self._runtime is not None:
            self._runtime.close(timeout)

    def reconnect(self) -> None:
        """Drops the connection and waits for a new one.

        Raises:
            NotConnectedError: there is none within 10 s; the supervisor goes on trying.
        """
        self.connection.reconnect()

    @property
    def connected(self) -> bool:
        """Whether there is a live connection now."""
        return self.state == "connected"

    @property
    def state(self) -> str:
        """``disconnected``, ``connecting``, ``connected`` or ``reconnecting``."""
        return "disconnected" if self._runtime is None else self._runtime.connection.state

    def health_check(self, *, fresh: bool = False, timeout: float = 5.0) -> dict[str, Any]:
        """How this process, JetStream, outbox and inbox are; changes nothing.

        Plain values, for JSON (docs/reference/health.md): ``status`` is ``healthy``, ``degraded``
        or ``unhealthy``, ``states`` says why and what to do. What must be asked for is kept for
        ``jetstream_health_cache_ttl``; what this process knows, as whether it is connected, is
        always of now. Never raises for NATS's or a database's sake. Cheap enough for every second
        and any number of threads; not for the connection's own thread, which it would wait for.

        Args:
            fresh: ask now, whatever is known from before.
            timeout: seconds to wait for answers, all together.

        Raises:
            ConfigurationError: the settings are wrong.
        """
        return self.health.check(fresh=fresh, timeout=timeout)

    @property
    def health(self) -> Health:
        """This process's health."""
        if self._health is None:
            with self._lock:
                self._health = self._health or Health(self)
        return self._health

    def doctor(self, timeout: float = 10.0, monitor: str = "", role: str = "run") -> Report:
        """Looks for what works today and costs days later; changes nothing, raises for no server.

        See ``errors``, ``warnings`` and ``findings`` (docs/reference/doctor.md).

        Args:
            timeout: seconds for all of it.
            monitor: the nats-servers' monitoring ports, as ``http://nats:8222``, with commas.
            role: what the NATS user is to be allowed: ``run``, ``operator`` or ``admin``.

        Raises:
            ValueError: there is no such role.
        """
        from .doctor import examine

        return examine(self, timeout, monitor, role)

    # -- publishing ------------------------------------------------------------------------------

    def publish(
        self, event_type: str, payload: Any, *, timeout: float = PUBLISH_TIMEOUT, **event: Any
    ) -> PublishResult:
        """Publishes an event now and waits until JetStream has stored it.

        Sends again with the same ``event_id`` while there is an outage. Never raises for the
        broker's sake: look at the result, or call its ``raise_for_error()``.

        Args:
            event_type: dotted text, such as ``user.created``.
            payload: any JSON value; dates, decimals and UUIDs are encoded.
            timeout: seconds to try for.
            event: ``resource_type``, ``resource_id``, ``event_id``, ``trace_id``,
                ``produced_at``, ``schema_version``; ``destination`` (another app) or ``subject``;
                ``headers``.

        Raises:
            EventError: the event cannot be sent as it is.
            SubjectError: the subject or destination is not legal.
            TypeError: an unknown keyword.
        """
        message = self.publisher.message(event_type=event_type, payload=payload, **event)
        return self._send([message], timeout)[0]

    def publish_batch(
        self, batch: Iterable[Mapping[str, Any]], *, timeout: float = PUBLISH_TIMEOUT
    ) -> list[PublishResult]:
        """Publishes many events, pipelined; the results are aligned with the inputs.

        All are checked before the first is sent.

        Args:
            batch: the arguments of :meth:`publish` for each event, as dicts.
            timeout: seconds to try for, all together.

        Raises:
            EventError: an event cannot be sent; names its index. Nothing was sent.
        """
        messages: list[Message] = []
        for index, event in enumerate(batch):
            try:
                messages.append(self.publisher.message(**event))
            except (EventError, TypeError, ValueError) as error:
                error.args = (f"event {index} of the batch: {error}",)
                raise
        return self._send(messages, timeout)

    async def apublish(
        self, event_type: str, payload: Any, *, timeout: float = PUBLISH_TIMEOUT, **event: Any
    ) -> PublishResult:
        """As :meth:`publish`, awaited in any event loop."""
        message = self.publisher.message(event_type=event_type, payload=payload, **event)
        return (await self._asend([message], timeout))[0]

    async def _asend(self, messages: list[Message], timeout: float) -> list[PublishResult]:
        self._before(messages)
        start = time.monotonic()
        future = self.connection.submit(self.publisher.send, messages, timeout)
        results = await asyncio.wrap_future(future)
        self._after(messages, results, time.monotonic() - start)
        return results

    def _send(self, messages: list[Message], timeout: float) -> list[PublishResult]:
        self._before(messages)
        start = time.monotonic()
        results = self.connection.run(
            self.publisher.send, messages, timeout, timeout=timeout + SEND_GRACE
        )
        self._after(messages, results, time.monotonic() - start)
        return results

    def _before(self, messages: list[Message]) -> None:
        for message in messages:
            signals.before_event_publish.send(
                sender=self,
                event=message.event,
                subject=message.subject,
                headers=dict(message.headers),
            )

    def _after(self, messages: list[Message], results: list[PublishResult], seconds: float) -> None:
        for message, result in zip(messages, results, strict=True):
            signal = signals.after_event_publish
            if not result.success:
                signal = signals.event_publish_failed
                logger.error(
                    "event %s was not published: %s",
                    result.event_id,
                    result.error,
                    extra=message.log_fields | {"outcome": result.verdict.value},
                )
            signal.send(
                sender=self,
                event=message.event,
                result=result,
                headers=message.headers,
                seconds=seconds,
            )

    # -- outbox ----------------------------------------------------------------------------------

    @property
    def outbox(self) -> Outbox:
        """This process's outbox.

        Raises:
            ConfigurationError: it has no database.
        """
        return self._process.outbox

    @property
    def inbox(self) -> Inbox:
        """This process's inbox.

        Raises:
            ConfigurationError: it has no database.
        """
        return self._process.inbox

    # -- dead letters ----------------------------------------------------------------------------

    @property
    def dead_letters(self) -> DeadLetters:
        """The messages that this app has given up: to look at, send again, or delete."""
        return DeadLetters(
            self.config,
            self.connection,
            self.publisher,
            forget=self._forget_processed,
            check=self._read_by_handler,
        )

    def _forget_processed(self, event_id: str) -> None:
        """Has an event handled once more; the database may be the outbox's only."""
        with contextlib.suppress(ConfigurationError):
            self.inbox.reset(event_id)

    def _read_by_handler(self, event: Event) -> None:
        """Raises where no handler of ours could read an event; says nothing where there is none."""
        handlers = self.check()
        task = handlers.find(event.event_type)
        if task is not None:
            task.event(event.envelope)
        elif handlers:
            raise EventError(f"no handler for the event type {event.event_type!r}")

    # -- topology --------------------------------------------------------------------------------

    def provision(
        self,
        *,
        dry_run: bool = False,
        pair: bool = False,
        nats_urls: Any = None,
        nats_options: Mapping[str, Any] | None = None,
    ) -> plans.Plan:
        """Makes sure of the stream and the consumer, or (``dry_run``) says what that would do.

        Args:
            dry_run: change nothing.
            pair: the consumers of the apps at the other end too, where they are missing.
            nats_urls: where to connect for this, in place of the setting.
            nats_options: how, in place of the setting; with either, on a connection of its own.

        Raises:
            ConfigurationError: the settings are wrong, or these are.
            TopologyError: it cannot be had.
            NotConnectedError: no server, or (``PermissionDeniedError``) the user may not.
        """
        own = {"nats_urls": nats_urls, "nats_options": nats_options}
        own = {name: value for name, value in own.items() if value is not None}
        if not own:
            found = self.consumers if self.config.auto_provision else None
            return provisioning.provision(
                self.config, self.connection, dry_run=dry_run, pair=pair, found=found
            )
        config = dataclasses.replace(self.config, **own)
        connection = Connection(config)
        try:
            return provisioning.provision(config, connection, dry_run=dry_run, pair=pair)
        finally:
            connection.close()

    async def ensure_topology(self, missing: bool = True) -> None:
        """Makes sure again because something was missing; begins at most every 2 s. Loop thread.

        Returns when that is done, or after a second; then it goes on by itself. In an election
        JetStream's API answers nobody, and what was missing is often there before it does.

        With ``auto_provision`` off it only says what is ``missing``. Trouble is logged, not raised:
        whoever found the stream missing tries on.
        """
        if not self.config.auto_provision:
            if missing:
                self._say_missing()
            return
        now, loop, task = time.monotonic(), asyncio.get_running_loop(), self._ensuring
        foreign = task is None or task.get_loop() is not loop  # a closed connection's, a parent's
        if task is None or foreign or (task.done() and now - self._ensured >= ENSURE_INTERVAL):
            self._ensured = now
            self._ensuring = task = loop.create_task(self._ensure_again())
        if not task.done():
            await asyncio.wait([task], timeout=ENSURE_PATIENCE)

    def _say_missing(self) -> None:
        now = time.monotonic()
        if self._said_missing and now - self._said_missing < MISSING_INTERVAL:
            return
        self._said_missing = now
        known = self._consumers or consumer_specs(self.config)[:1]
        consumers = [one.durable for one in known if not one.optional]
        logger.error(
            "stream %s or its consumer (%s) is not there, or a leader is being elected (that takes "
            "seconds). jetstream_auto_provision is off: whoever may is to run 'celery -A … "
            "jetstream provision'",
            self.config.stream_name,
            ", ".join(consumers),
        )

    async def _ensure_again(self) -> None:
        try:
            await self._ensure()
        except Exception as error:
            logger.error("stream or consumer is missing and could not be made: %s", error)

    async def stream_info(self) -> dict[str, Any]:
        """The server's account of the stream; empty where it cannot be had. Loop thread.

        With ``auto_provision`` off nothing is asked: it is what the settings say.
        """
        if not self.config.auto_provision:
            return {"config": stream_spec(self.config).wanted({})}
        try:
            return await self._api(f"STREAM.INFO.{self.config.stream_name}", {})
        except NotConnectedError:
            return {}

    async def consumers(self) -> tuple[specs.ConsumerSpec, ...]:
        """The consumers that bring this app's events. Loop thread.

        Found once, and kept: one of several that is deleted is made again as it was, and not with
        the subjects of the others. With ``auto_provision`` off nothing is asked: some of them may
        not be there (``optional``).

        Raises:
            NotConnectedError: there are several sources, and the server is not there to be asked
                whether they can share a consumer.
        """
        if not self._consumers:
            ours = self._provisioner
            ask = ours.consumers if self.config.auto_provision else ours.possible_consumers
            self._consumers = await ask()
        return self._consumers

    async def consumers_there(self) -> tuple[specs.ConsumerSpec, ...]:
        """As :meth:`consumers`; asks which there are, whatever ``auto_provision`` says."""
        return await self._provisioner.consumers()

    async def _ensure(self) -> plans.Plan:
        return await self._provisioner.ensure(await self.consumers())

    async def _api(self, subject: str, request: Mapping[str, Any]) -> dict[str, Any]:
        return await self._provisioner.api(subject, request)

    @cached_property
    def _provisioner(self) -> Provisioner:
        return Provisioner(self.config, lambda: self.connection.session())

    # -- one runtime per process -------------------------------------------------------------------

    @property
    def connection(self) -> Connection:
        """This process's connection."""
        return self._process.connection

    @property
    def publisher(self) -> Publisher:
        """This process's publisher."""
        return self._process.publisher

    @property
    def settler(self) -> Settler:
        """This process's settler."""
        return self._process.settler

    @property
    def breaker(self) -> Breaker | None:
        """The outbox's; None where this process has not used its outbox yet."""
        return self._process.breaker

    @property
    def aside(self) -> Aside:
        """This process's thread for what may wait for a database."""
        return self._process.aside

    @property
    def keeper(self) -> Keeper:
        """This process's keeper of the messages that a worker holds."""
        return self._process.keeper

    @property
    def _process(self) -> Runtime:
        runtime = self._runtime
        if runtime is None:
            config = self.config
            with self._lock:
                if self._runtime is None:
                    send_flush = partial(self._schedule.send_flush, config)
                    self._runtime = Runtime(config, self.ensure_topology, send_flush)
                runtime = self._runtime
        return runtime

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._runtime = self._health = None
        self.running = {}

    def _begin_anew(self) -> None:
        """Reads the settings and connects as if for the first time (the testing kit)."""
        self._forget()
        for name in [n for n in vars(self) if isinstance(vars(JetStream).get(n), cached_property)]:
            del vars(self)[name]
        self._ensured, self._ensuring, self._consumers = 0.0, None, ()


class CheckSettings(bootsteps.Step):
    """A worker with wrong settings, or two handlers for one pattern, does not start."""

    def __init__(self, worker: Any, **_: Any) -> None:
        privacy.hide_payloads()
        jetstream = worker.app.jetstream
        with_inbox = jetstream.check().with_inbox
        if with_inbox and any(task.wants_session for task in with_inbox):
            jetstream.inbox.sessions  # noqa: B018 - made here so that what is wrong is said here
        elif with_inbox:
            jetstream.inbox  # noqa: B018


# -- processes: start, fork, end ------------------------------------------------------------------

_instances: weakref.WeakSet[JetStream] = weakref.WeakSet()


def _forget_in_child() -> None:
    for name in signals.__all__:  # a thread that is not here may have been sending one
        getattr(signals, name).lock = threading.Lock()
    for jetstream in list(_instances):
        jetstream._forget()


def _close_all(**_: Any) -> None:
    for jetstream in list(_instances):
        jetstream.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_close_all)
celery_signals.worker_process_shutdown.connect(_close_all, weak=False)
celery_signals.worker_shutdown.connect(_close_all, weak=False)


@celery_signals.worker_ready.connect(weak=False)
def _connect_at_start(sender: Any = None, **_: Any) -> None:
    """Connects in the background, so that the first message finds a connection."""
    jetstream = getattr(sender.app, "jetstream", None)
    if isinstance(jetstream, JetStream) and not jetstream.config.lazy_connect:
        jetstream.connection.start()
