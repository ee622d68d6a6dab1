"""``JetStream(app)``: binds settings, connection and everything on top of it to a Celery app."""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from celery import Celery, bootsteps
from celery import signals as celery_signals

from . import plans, provisioning, signals, specs, status
from .config import Config
from .connection import Connection
from .consumers import consumer_specs, stream_spec
from .direct import Direct
from .events import Event
from .exceptions import ConfigurationError, EventError, NotConnectedError
from .handlers import Handlers
from .preflight import check_permissions
from .provisioning import Provisioner
from .publisher import Message, Publisher, PublishResult
from .request import HandBack, Keeper
from .runtime import Runtime
from .settler import Settler

if TYPE_CHECKING:
    from .aside import Aside
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

FLUSH, PRUNE = "celery_jetstream.flush_outbox", "celery_jetstream.prune_outbox"
PRUNE_INBOX = "celery_jetstream.prune_inbox"
#: Seconds between two prunings.
PRUNE_INTERVAL = 600.0

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
        self._ensured = self._said_missing = 0.0
        self._consumers: tuple[specs.ConsumerSpec, ...] = ()
        self._ensuring: asyncio.Task[None] | None = None
        app.jetstream = self
        app.steps["worker"].add(CheckSettings)
        app.steps["consumer"].add(HandBack)
        app.steps["consumer"].add(Direct)
        self._scheduled: dict[str, Any] = {}
        app.on_after_finalize.connect(self._schedule, weak=False)
        celery_signals.import_modules.connect(self._schedule, sender=app)
        if app.finalized:
            self._schedule()
        _instances.add(self)

    def __repr__(self) -> str:
        return f"<JetStream of {self.app.main}: {self.state}>"

    @cached_property
    def config(self) -> Config:
        """The checked settings.

        Raises:
            ConfigurationError: names every wrong setting, its value and a good one.
        """
        return Config.from_app(self.app)

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

    def status(self, timeout: float = 5.0) -> dict[str, Any]:
        """How the connection, the server, the stream and the consumers are; changes nothing.

        Never raises for NATS's sake: see ``healthy`` and ``problems`` (docs/reference/status.md).

        Args:
            timeout: seconds for all of it.

        Raises:
            ConfigurationError: the settings are wrong.
        """
        return self.connection.run(self._status, timeout)

    async def _status(self, timeout: float) -> dict[str, Any]:
        ends = time.monotonic() + timeout
        try:
            consumers = await asyncio.wait_for(self._provisioner.consumers(), timeout / 2)
        except (NotConnectedError, asyncio.TimeoutError):
            consumers = consumer_specs(self.config)
        durables = [consumer.durable for consumer in consumers]
        return await status.look(self.connection, self.config, durables, ends - time.monotonic())

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
        self._before([message])
        future = self.connection.submit(self.publisher.send, [message], timeout)
        results = await asyncio.wrap_future(future)
        self._after([message], results)
        return results[0]

    def _send(self, messages: list[Message], timeout: float) -> list[PublishResult]:
        self._before(messages)
        results = self.connection.run(
            self.publisher.send, messages, timeout, timeout=timeout + SEND_GRACE
        )
        self._after(messages, results)
        return results

    def _before(self, messages: list[Message]) -> None:
        for message in messages:
            signals.before_event_publish.send(
                sender=self,
                event=message.event,
                subject=message.subject,
                headers=dict(message.headers),
            )

    def _after(self, messages: list[Message], results: list[PublishResult]) -> None:
        for message, result in zip(messages, results, strict=True):
            if result.success:
                signals.after_event_publish.send(sender=self, event=message.event, result=result)
            else:
                logger.error("event %s was not published: %s", result.event_id, result.error)
                signals.event_publish_failed.send(sender=self, event=message.event, result=result)

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

    def _send_flush(self) -> None:
        self.app.send_task(FLUSH, retry=False, ignore_result=True, **self._flush_options())

    def _flush_options(self) -> dict[str, Any]:
        """Where flushes go. Without ``expires``: a worker whose clock is ahead would drop them."""
        return _options(self.config.outbox_flush_interval, self.config.outbox_queue)

    def _schedule(self, **_: Any) -> None:
        """Puts the flush and the pruning into beat's schedule; an entry of the user's stays.

        Again when beat or a worker starts, for settings that were made later.
        """
        conf, before = self.app.conf, self._scheduled
        self._scheduled = ours = self._entries()
        if ours or before:
            found = conf.beat_schedule.items()
            users = {name: entry for name, entry in found if entry is not before.get(name)}
            conf.beat_schedule = {**ours, **users}

    def _entries(self) -> dict[str, Any]:
        """What beat is to send."""
        conf = self.app.conf
        if not (conf.get("jetstream_database_url") or conf.get("jetstream_session_factory")):
            return {}
        try:
            config = Config.from_app(self.app)
        except ConfigurationError:
            return {}  # said where the settings are used
        entries: list[tuple[str, str, float, str | None]] = []
        if config.outbox_beat:
            name, queue = config.outbox_beat_name, config.outbox_queue
            entries.append((name, FLUSH, config.outbox_flush_interval, queue))
            entries.append((f"{name}.prune", PRUNE, PRUNE_INTERVAL, queue))
        if config.inbox_beat and self._uses_inbox(config):
            entries.append((PRUNE_INBOX, PRUNE_INBOX, PRUNE_INTERVAL, config.inbox_queue))
        return {
            name: {"task": task, "schedule": every, "options": _options(every, queue)}
            for name, task, every, queue in entries
        }

    def _uses_inbox(self, config: Config) -> bool:
        tasks = self.app.tasks.values() if self.app.finalized else ()
        return config.use_inbox or any(getattr(task, "inbox", None) is True for task in tasks)

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
                    self._runtime = Runtime(config, self.ensure_topology, self._send_flush)
                runtime = self._runtime
        return runtime

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._runtime = None


def _options(every: float, queue: str | None) -> dict[str, Any]:
    """How a task of beat's is sent; ``expiration`` is RabbitMQ's."""
    return {"expiration": every} if queue is None else {"expiration": every, "queue": queue}


class CheckSettings(bootsteps.Step):
    """A worker with wrong settings, or two handlers for one pattern, does not start."""

    def __init__(self, worker: Any, **_: Any) -> None:
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
