"""The bridge: every JetStream message becomes one task message in the Celery broker.

Three threads, one job each. The connection's *loop thread* takes messages in, keeps what no
worker has claimed in progress, and listens to the workers' claims and settlements. The
*dispatcher thread* talks to the Celery broker, which may block
(:mod:`~celery_jetstream.dispatcher`). The *main thread* waits for the end. What is where is
:class:`~celery_jetstream.inflight.InFlight`'s business; the bridge holds no message that
JetStream does not hold as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from queue import Empty, SimpleQueue
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from . import signals
from .acks import PAUSE_HEADER, is_claim, keep_in_progress
from .deadletter import Original, fetch_original
from .delivery import Delivery
from .dispatcher import Dispatcher
from .exceptions import (
    CeleryJetStreamError,
    ConfigurationError,
    NotConnectedError,
    PermissionDeniedError,
)
from .inflight import Flight, InFlight
from .pauses import Pauses
from .preflight import check_permissions
from .pull import Pull
from .push import Push
from .session import Session
from .settlement import Nak
from .specs import IDLE_HEARTBEAT, ConsumerSpec, retention_warnings
from .sweeper import Sweeper

__all__ = ("Bridge",)

logger = logging.getLogger(__name__)

#: Messages that one batch of the Celery producer may have (Redis pipelines them).
DISPATCH_BATCH = 100
BROKER_PAUSE = (0.5, 5.0)
#: Seconds without an answer after which the broker counts as away (it may hang and say nothing).
BROKER_SILENCE = 10.0
#: Seconds for which an answer of the broker's proves that it is there.
BROKER_PROOF = 2.0
#: Messages that one look asks the stream for.
LOOK_BATCH = 256
#: The most messages that one bridge holds, whatever the consumer's ``max_ack_pending``.
WINDOW = 1000
#: Seconds that the end may take: handing back, the last confirmations, the connection.
STOP_TIMEOUT = 5.0
#: Seconds until another try to hear the workers, where our user may not.
DENIED_PAUSE = 5.0


class Bridge:
    """Runs until told to stop. One per process.

    Args:
        jetstream: the app's :class:`~celery_jetstream.extension.JetStream`.
        max_messages: stop after so many messages were dispatched; None for no end.
        once: stop when the stream has no more for us.
        dispatcher: what sends the copies; default: to the Celery broker.

    Raises:
        ConfigurationError: there is no handler, or two for one pattern.
    """

    def __init__(
        self,
        jetstream: Any,
        *,
        max_messages: int | None = None,
        once: bool = False,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        self.app = jetstream.app
        self.jetstream = jetstream
        self.config = config = jetstream.config
        self.handlers = jetstream.check()
        if not self.handlers:
            raise ConfigurationError(
                "no @jetstream_handler is known to this app: import the modules that define "
                "them (include=, imports or autodiscover_tasks), or the bridge would turn every "
                "message into a dead letter"
            )
        self.dispatched = 0
        self._dispatcher = dispatcher or Dispatcher(self.app, config, self.handlers)
        self._max_messages = max_messages
        self._once = once
        self._flights = InFlight(
            capacity=min(config.max_ack_pending, WINDOW), lease=config.lease, grace=config.ack_wait
        )
        self._worth_asking = max(1, min(config.batch_size, config.max_ack_pending) // 4)
        self._pauses = Pauses()
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._told: SimpleQueue[None] = SimpleQueue()
        self._stop = threading.Event()
        self._consumers: tuple[ConsumerSpec, ...] = ()
        self._intakes: list[Pull | Push] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._broker_down = False
        self._broker_error: str | None = None
        self._deaf = (float("-inf"), "")  # when it was denied to hear claims, and what was said
        self._broker_heard = time.monotonic()
        self._prove_broker = False
        self._phase = "starting"
        self._turned = {"main": 0.0, "dispatcher": 0.0}
        self._asked_broker: float | None = None
        self._stalled: set[str] = set()
        self._taken = 0
        self._beyond: list[Delivery] = []
        jetstream.running["bridge"] = self

    # -- any thread ------------------------------------------------------------------------------

    def tell(self) -> dict[str, Any]:
        """How it is, as plain values (docs/reference/health.md); does not wait."""
        now, asked = time.monotonic(), self._asked_broker
        troubles = [trouble for intake in self._intakes if (trouble := intake.trouble)]
        deaf_at, deaf = self._deaf
        deaf = deaf if now - deaf_at < 2 * DENIED_PAUSE else ""
        turned = {name: round(now - at, 1) for name, at in self._turned.items()}
        if asked is not None:
            turned["dispatcher"] = 0.0  # it waits for the broker
        with self._lock:
            queues, in_flight = self._flights.queues(now), len(self._flights)
            paused = self._pauses.names
        return {
            "phase": self._phase,
            "pulling": bool(self._intakes) and not troubles,
            "trouble": "; ".join(filter(None, (*troubles, deaf))) or None,
            "broker": {
                "up": not self._broker_down,
                "error": self._broker_error,
                "silent": 0.0 if asked is None else round(now - max(self._broker_heard, asked), 1),
            },
            "dispatched": self.dispatched,
            "in_flight": in_flight,
            "capacity": self._flights.capacity,
            "queues": queues,
            "crowded": sorted(self._stalled),
            "paused_handlers": paused,
            "turned": turned,
        }

    def prove(self, patience: float) -> None:
        """Has the broker asked whether it is there, where that is not known of just now.

        Waits for its answer, ``patience`` seconds at the most; :meth:`tell` says what it was.
        """
        ends = time.monotonic() + patience
        if self._phase != "running" or time.monotonic() - self._broker_heard < BROKER_PROOF:
            return
        before, self._prove_broker = self._broker_heard, True
        self._work.set()
        while self._broker_heard == before and not self._broker_down and time.monotonic() < ends:
            time.sleep(0.02)

    @property
    def in_flight(self) -> int:
        """Messages that this bridge holds: not dispatched, or no worker has claimed them."""
        return len(self._flights)

    @property
    def broker_connected(self) -> bool:
        """Whether the Celery broker takes copies, as far as is known."""
        return not self._broker_down

    # -- main thread -----------------------------------------------------------------------------

    def run(self) -> None:
        """Bridges until :meth:`stop`; then hands back what is not dispatched and returns.

        Raises:
            NotConnectedError: no NATS server at start.
            TopologyError: the stream or consumer cannot be had.
        """
        connection = self.jetstream.connection
        self.jetstream.connect()
        self._consumers = connection.run(self.jetstream.consumers)
        connection.on_session(self._listen)
        connection.run(self._start)
        dispatcher = threading.Thread(target=self._dispatch, name="jetstream-bridge", daemon=True)
        dispatcher.start()
        self._check_retention()
        logger.info("bridge is ready: %s", ", ".join(self.config.consume_subjects))
        signals.bridge_ready.send(sender=self.jetstream, bridge=self)
        self._phase, self._turned["main"] = "running", time.monotonic()
        failure = self._wait(dispatcher)
        self._end(dispatcher)
        if failure:
            raise CeleryJetStreamError(
                f"{failure}: this is a defect of ours; start the bridge again"
            )

    def _check_retention(self) -> None:
        """Warns where the inbox forgets events that the stream can still bring."""
        if not self.handlers.with_inbox:
            return
        config = self.jetstream.connection.run(self.jetstream.stream_info).get("config", {})
        age, window = config.get("max_age", 0) / 1e9, config.get("duplicate_window", 0) / 1e9
        for warning in retention_warnings(self.config.inbox_retention, age, window):
            logger.warning("%s", warning)

    @property
    def busy(self) -> bool:
        """Whether it has messages, waiting or unclaimed. Any thread."""
        with self._lock:
            return len(self._flights) > 0

    def stop(self) -> None:
        """Ends :meth:`run`; may be called by a signal handler and from any thread."""
        self._told.put(None)  # reentrant, unlike an Event

    def _wait(self, dispatcher: threading.Thread) -> str | None:
        """Waits to be told to stop; returns what has ended that must not."""
        bounded = self._once or self._max_messages is not None
        while not (bounded and self._finished()):
            self._turned["main"] = time.monotonic()
            if not dispatcher.is_alive():
                return "the dispatcher thread has ended"
            if any(task.done() for task in self._tasks):
                return "pulling or keeping messages in progress has ended"
            if (since := self._asked_broker) and time.monotonic() - since > BROKER_SILENCE:
                self._broker_is(False, TimeoutError(f"no answer in {BROKER_SILENCE:g} s"))
            with contextlib.suppress(Empty):
                self._told.get(timeout=0.1 if bounded else 1.0)
                return None
        return None

    def _finished(self) -> bool:
        """With ``once`` or ``max_messages``: whether all is dispatched and with the workers."""
        if self._max_messages is not None and self.dispatched >= self._max_messages:
            return not self.busy
        return self._once and not self.busy and all(intake.idle for intake in self._intakes)

    def _end(self, dispatcher: threading.Thread) -> None:
        self._phase = "stopping"
        signals.bridge_shutting_down.send(sender=self.jetstream, bridge=self)
        self._stop.set()
        self._work.set()
        deadline = time.monotonic() + STOP_TIMEOUT
        with contextlib.suppress(NotConnectedError):
            self.jetstream.connection.run(self._stop_pulling, timeout=STOP_TIMEOUT / 2)
        dispatcher.join(max(0.1, (deadline - time.monotonic()) / 2))
        with contextlib.suppress(NotConnectedError):
            self.jetstream.connection.run(self._hand_back, timeout=STOP_TIMEOUT / 2)
        self.jetstream.close(timeout=max(0.5, deadline - time.monotonic()))
        self.jetstream.running.pop("bridge", None)
        logger.info("bridge has stopped")

    # -- loop thread: in, keepalive, claims --------------------------------------------------------

    async def _start(self) -> None:
        session = await self.jetstream.connection.session()
        await check_permissions(session, self.config, self._consumers, claims=True)
        await self._listen(session)
        self._intakes = [self._intake(consumer) for consumer in self._consumers]
        settler = self.jetstream.settler
        sweepers = [
            Sweeper(self.jetstream.connection, settler, c, asks=self.config.auto_provision)
            for c in self._consumers
        ]
        coroutines = [self._keep(), *(one.run() for one in (*self._intakes, *sweepers))]
        self._tasks = [asyncio.get_running_loop().create_task(one) for one in coroutines]
        await session.round_trip(STOP_TIMEOUT)
        for intake in self._intakes:
            if intake.denied:
                raise intake.denied

    def _intake(self, consumer: ConsumerSpec) -> Pull | Push:
        connection, on_missing = self.jetstream.connection, self.jetstream.ensure_topology
        if consumer.deliver_subject:
            return Push(
                connection,
                consumer.deliver_subject,
                consumer.deliver_group,
                heartbeat=IDLE_HEARTBEAT,
                on_message=self._arrive,
                on_missing=on_missing,
            )
        return Pull(
            connection,
            consumer.stream,
            consumer.durable,
            room=self._room,
            on_message=self._arrive,
            on_missing=on_missing,
            # a source that has nothing to send holds a request all the same
            batch=min(consumer.batch_size, max(1, WINDOW // len(self._consumers))),
            optional=consumer.optional,
        )

    def _room(self) -> int:
        if self._stop.is_set() or self._broker_down:
            return 0
        room = self._flights.room
        if self._max_messages is not None:
            room = min(room, self._max_messages - self._taken)
        return room

    def _arrive(self, message: Msg) -> None:
        delivery = Delivery.from_reply(message.reply, message.headers)
        signals.message_received.send(sender=self, delivery=delivery)
        self._taken += 1
        if self._max_messages is not None and self._taken > self._max_messages:
            self._beyond.append(delivery)  # sent unasked (push mode), or before we stopped
            return
        with self._lock:
            self._flights.arrive(delivery, message.subject, message.data)
        self._work.set()

    async def _listen(self, session: Session) -> None:
        """Hears what workers (and other bridges) say about these consumers' messages."""
        for consumer in self._consumers:
            await self._listen_to(f"$JS.ACK.{consumer.stream}.{consumer.durable}.>", session)

    async def _listen_to(self, subject: str, session: Session) -> None:
        """Again and again where our user may not (any more)."""
        loop, heard = asyncio.get_running_loop(), list[Subscription]()
        denials = 0

        def again(error: PermissionDeniedError) -> None:
            nonlocal denials
            self._deaf = time.monotonic(), str(error)
            if not denials:
                logger.error("cannot hear which messages workers have: %s; trying on", error)
            denials += 1
            loop.call_later(DENIED_PAUSE, lambda: loop.create_task(listen()))

        async def listen() -> None:
            nonlocal denials
            before = denials
            with contextlib.suppress(NotConnectedError):  # of a session that is over
                await session.unsubscribe(heard.pop())
                heard.append(await session.subscribe(subject, self._hear))
                if await session.round_trip(STOP_TIMEOUT) and denials == before:
                    denials = 0
                    logger.info("hears again which messages workers have")

        session.on_denial(subject, again)
        heard.append(await session.subscribe(subject, self._hear))

    def _hear(self, message: Msg) -> None:
        with contextlib.suppress(ValueError):
            delivery = Delivery.from_reply(message.subject)
            in_progress = message.data.startswith(b"+WPI")
            if in_progress and not is_claim(message):
                return
            with self._lock:
                if not in_progress:
                    self._flights.ended(delivery.sequence)
                    self._heed_pause(delivery.sequence, (message.headers or {}).get(PAUSE_HEADER))
                if message.data.startswith(b"-NAK"):
                    self._flights.handed_back(delivery.sequence, delivery.num_delivered)
                else:
                    self._flights.leave(delivery.sequence)
            self._made_room()

    def _heed_pause(self, sequence: int, handler: str | None) -> None:
        """With the lock held: a handler's database is away, or answers again."""
        if handler is not None:
            if self._pauses.outage(handler, sequence):
                logger.warning(
                    "%s pauses: its database is away; its messages wait in the bridge",
                    handler,
                    extra={"handler": handler},
                )
        elif self._pauses and (handler := self._pauses.ended(sequence)):
            fields = {"handler": handler}
            logger.warning("%s goes on: its database answers again", handler, extra=fields)
            self._flights.resume()
            self._work.set()

    def _made_room(self) -> None:
        """Wakes the others only when it is worth it: this is done for each message."""
        if self._flights.ready:
            self._work.set()
        for intake in self._intakes:
            if intake.worth_asking:
                intake.more(soon=self._flights.room < self._worth_asking)

    async def _keep(self) -> None:
        """Every ``ack_wait / 3``: all that no worker has claimed stays in progress."""
        while True:
            await asyncio.sleep(self.config.ack_wait / 3)
            with self._lock:
                replies = self._flights.replies
            try:
                session = await self.jetstream.connection.session(timeout=1)
                await keep_in_progress(session, replies)
            except NotConnectedError:
                pass  # said by the connection
            except Exception:
                logger.exception("keeping messages in progress failed; trying on")

    async def _stop_pulling(self) -> None:
        """The interest goes first, on the same connection, so that nothing comes back to us."""
        await asyncio.gather(*(intake.stop() for intake in self._intakes))

    async def _hand_back(self) -> None:
        """What is not dispatched comes again at once; the rest has one last ``ack_wait``."""
        with self._lock:
            waiting = [flight.delivery for flight in self._flights.leave_waiting()]
            replies = self._flights.replies
        for delivery in (*waiting, *self._beyond):
            self.jetstream.settler.settle(delivery, Nak(0.0))
        session = await self.jetstream.connection.session(timeout=1)
        await keep_in_progress(session, replies)

    # -- dispatcher thread: prepare -> admit -> send ----------------------------------------------

    def _dispatch(self) -> None:
        """Dispatches what arrives and looks after the copies, until told to stop."""
        pause = BROKER_PAUSE[0]
        check = time.monotonic()
        while not self._stop.is_set():
            self._turned["dispatcher"] = time.monotonic()
            self._work.wait(timeout=min(1.0, self.config.ack_wait / 3))
            self._work.clear()
            self._resume_paused()
            self._asked_broker = time.monotonic()
            try:
                if self._prove_broker or self._broker_down:
                    self._dispatcher.ping()
                    self._heard_broker()
                while self._dispatch_some() and not self._stop.is_set():
                    pass
                if time.monotonic() - check > self.config.ack_wait * 2 / 3:
                    check = time.monotonic()
                    self._look_after_copies()
                self._broker_is(True)
                pause = BROKER_PAUSE[0]
                continue
            except self._dispatcher.broker_errors as error:
                self._broker_is(False, error)
            except Exception:
                logger.exception("dispatching failed; trying on")
            finally:
                self._asked_broker = None
            self._stop.wait(pause)
            self._work.set()
            pause = min(BROKER_PAUSE[1], pause * 2)
        self._dispatcher.close()

    def _resume_paused(self) -> None:
        with self._lock:
            if any(self._pauses.may_try(handler) for handler in self._pauses.names):
                self._flights.resume()

    def _dispatch_some(self) -> bool:
        """Dispatches one batch; returns whether there was anything to do."""
        self._asked_broker = time.monotonic()
        with self._lock:
            flights = self._flights.take(DISPATCH_BATCH)
        ready = [flight for flight in flights if self._can_prepare(flight)]
        with self._lock:
            if self._pauses:
                ready = self._without_paused(ready)
            outgoing = self._flights.dispatch(ready, time.monotonic())
        if outgoing:
            try:
                self._dispatcher.send(outgoing)
            except self._dispatcher.connection_errors:
                # some may have been sent; all are sent again, for nothing must be lost
                with self._lock:
                    self._flights.put_back(outgoing)
                raise
            except Exception:  # one of them cannot be sent: it must not stop the others
                self._send_each(outgoing)
            self._heard_broker()
            self.dispatched += sum(1 for flight in outgoing if flight.copies == 1)
        return bool(flights)

    def _without_paused(self, flights: list[Flight]) -> list[Flight]:
        """With the lock held: those that may go now; the others wait here, kept in progress."""
        admits = self._pauses.admits
        admitted = [f for f in flights if admits(f.task.name, f.delivery.sequence)]
        self._flights.pause(flight for flight in flights if flight not in admitted)
        return admitted

    def _send_each(self, flights: list[Flight]) -> None:
        for number, flight in enumerate(flights):
            try:
                self._dispatcher.send([flight])
            except self._dispatcher.connection_errors:
                with self._lock:
                    self._flights.put_back(flights[number:])
                raise
            except Exception:
                logger.exception(
                    "%s cannot be sent; the message comes again",
                    flight.task.name,
                    extra=flight.log_fields,
                )
                self._give_back(flight)

    def _can_prepare(self, flight: Flight) -> bool:
        try:
            return self._prepare(flight)
        except Exception:
            logger.exception(
                "message %s cannot be prepared", flight.delivery.task_id, extra=flight.log_fields
            )
            self._give_back(flight)
            return False

    def _give_back(self, flight: Flight) -> None:
        with self._lock:
            self._flights.leave(flight.delivery.sequence)
        again = Nak(self.config.backoff[-1])
        self.jetstream.settler.settle(flight.delivery, again, handler=flight.handler)

    def _prepare(self, flight: Flight) -> bool:
        """Whether the message can be sent; settles here what cannot."""
        settlement = self._dispatcher.prepare(flight)
        if settlement is None:
            return True
        with self._lock:
            self._flights.leave(flight.delivery.sequence)
        original = Original(flight.subject, flight.body, flight.delivery.headers)
        self.jetstream.settler.settle(flight.delivery, settlement, original, flight.handler)
        self.dispatched += 1
        self._ask_for_more()
        return False

    def _ask_for_more(self) -> None:
        for intake in self._intakes:
            self.jetstream.connection.call_soon(intake.more)

    def _look_after_copies(self) -> None:
        """Has copies that are overdue, or that their queue lost, dispatched again."""
        now = time.monotonic()
        with self._lock:
            lost = self._flights.overdue(now)
            queues = self._flights.queues_to_check()
        for queue in queues:
            waiting = self._dispatcher.depth(queue)
            with self._lock:
                found = self._flights.found(queue, waiting, time.monotonic())
            lost += [flight for flight in found if flight not in lost]  # it may be overdue as well
        if lost:
            self._dispatch_again(lost)
        self._say_crowded()

    def _dispatch_again(self, lost: list[Flight]) -> None:
        try:
            lost = lost[:LOOK_BATCH]  # the others at the next look
            found = self.jetstream.connection.run(self._still_there, lost, timeout=30)
        except NotConnectedError:
            return  # at the next look
        with self._lock:
            for flight in lost:
                if flight not in found:
                    self._flights.leave(flight.delivery.sequence)
            self._flights.again(found, time.monotonic())
        if found:
            logger.warning(
                "%d unclaimed copies are dispatched again (lost, or older than jetstream_lease)",
                len(found),
            )
        self._work.set()

    async def _still_there(self, flights: list[Flight]) -> set[Flight]:
        """Those that the stream still has; the rest was settled and we did not hear of it."""
        session = await self.jetstream.connection.session()
        originals = await asyncio.gather(*(fetch_original(session, f.delivery) for f in flights))
        return {f for f, original in zip(flights, originals, strict=True) if original is not None}

    # -- saying things once ----------------------------------------------------------------------

    def _heard_broker(self) -> None:
        self._broker_heard, self._prove_broker = time.monotonic(), False

    def _broker_is(self, up: bool, error: BaseException | None = None) -> None:
        self._broker_error = None if up else str(error) or repr(error)
        if not up and not self._broker_down:
            logger.error("the Celery broker is away; messages wait in the bridge: %s", error)
        if up and self._broker_down:
            logger.warning("the Celery broker is back")
        if self._broker_down == up:
            self._broker_down = not up
            self._ask_for_more()

    def _say_crowded(self) -> None:
        with self._lock:
            stalled = self._flights.stalled()
        for queue in stalled - self._stalled:
            logger.warning(
                "queue %s has %d copies that no worker takes, its share: further messages for it "
                "wait in the bridge. Does a worker consume it?",
                queue,
                self._flights.share,
            )
        self._stalled = stalled
