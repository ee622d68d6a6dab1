"""Direct mode: a worker takes messages from JetStream into its own pool, with no broker between.

:class:`Direct` is a bootstep of the worker's consumer. The connection's loop thread pulls; the
thread that runs Celery's event loop (or, where there is none, one of ours) hands each message to
Celery's own strategy of its task, as if it had come from the broker. From there on it is a
:class:`~celery_jetstream.request.JetStreamRequest` like any other: same settlement, keepalive,
inbox, time limits, revokes and remote control.

What is used here and is not public of Celery: docs/explanation/architecture.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import selectors
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

from celery import bootsteps
from celery.worker import state as worker_state
from nats.aio.msg import Msg

from . import signals
from .acks import keep_in_progress
from .deadletter import Original
from .delivery import Delivery
from .dispatcher import TaskMessages, header_of
from .exceptions import NotConnectedError, OutageError
from .handlers import DIRECT, HEADER
from .inflight import Flight
from .pace import MOST_AHEAD, Pace
from .pauses import Pauses
from .pull import Pull
from .request import HandBack, Source
from .settlement import DeadLetter, End, Nak
from .specs import ConsumerSpec
from .sweeper import Sweeper
from .threads import Wake, native_lock

__all__ = ("Direct",)

logger = logging.getLogger(__name__)

#: Bytes of messages that wait here for a database to answer again; then no more are taken.
MOST_WAITING = 64 * 2**20
#: Seconds that a pull request stays open: what it asks for was right for the pace of then.
EXPIRES = 5.0
#: Seconds between two looks at what waits.
LOOK_INTERVAL = 0.25
#: Seconds for which Celery's thread hands over before it looks at something else.
TURN = 0.02
#: Seconds between two looks at whether pulling goes on, and until it is begun anew: doubled each
#: time up to the last.
WATCH_INTERVAL, BEGIN_PAUSE, LONGEST_PAUSE = 1.0, 1.0, 30.0
#: Seconds that the end of pulling may take.
STOP_TIMEOUT = 2.5


class Direct(bootsteps.StartStopStep):
    """Has the worker pull from JetStream, where the settings or the command say so.

    Stops before :class:`~celery_jetstream.request.HandBack`, so that nothing that is handed back
    comes to this worker again.
    """

    requires = (HandBack,)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._intake: Intake | None = None

    def include_if(self, consumer: Any) -> bool:
        """Whether this worker is one of direct mode, and has anything to run."""
        jetstream = consumer.app.jetstream
        if not (jetstream.dedicated or jetstream.config.direct):
            return False
        if not jetstream.check():
            logger.warning(
                "jetstream_direct is on, and this worker knows no @jetstream_handler: it takes no "
                "messages, for each would become a dead letter. Import the modules that define them"
            )
            return False
        return True

    def start(self, consumer: Any) -> None:
        """Begins to pull; does not wait for a server."""
        self._intake = Intake(consumer.app.jetstream, consumer)
        self._intake.start()

    def stop(self, consumer: Any) -> None:
        """Ends pulling, and hands back what the pool has not got."""
        intake, self._intake = self._intake, None
        if intake is not None:
            intake.stop()


class Intake:
    """What a worker has taken from JetStream and its pool has not begun."""

    def __init__(self, jetstream: Any, consumer: Any) -> None:
        self._jetstream = jetstream
        self._config = jetstream.config
        self._handlers = jetstream.check()
        self._consumer = consumer
        self._lock = native_lock()
        self._arrived: deque[Flight] = deque()
        self._ahead = self._target = 0
        self._pace = Pace()
        self._waiting: dict[int, tuple[float, Flight]] = {}
        self._waiting_bytes = 0
        self._said_full = False
        self._look = False
        self._asking = False
        self._pauses = Pauses()
        self.messages = TaskMessages(jetstream.app, "celery_jetstream.direct")
        self._wake = Wake()
        self._stopping = False
        self._feeder: threading.Thread | None = None
        self._running: Future[None] | None = None
        self._feeds: list[Feed] = []
        self._watch: Any = None
        self._restarts = 0
        self._restarted: float | None = None
        self._begin_at: float | None = None
        self._error: str | None = None

    def start(self) -> None:
        """Begins to pull; does not wait for a server."""
        hub = self._consumer.hub
        if hub is not None:
            hub.add_reader(self._wake.fileno(), self._hand_over)
        else:
            self._feeder = threading.Thread(
                target=self._feed, name="celery-jetstream-direct", daemon=True
            )
            self._feeder.start()
        self._running = self._jetstream.connection.submit(self._run)
        self._watch = self._consumer.timer.call_repeatedly(WATCH_INTERVAL, self._look_after_run)
        self._jetstream.running["direct"] = self
        app = self._consumer.app
        if app.conf.get("worker_disable_prefetch") and app.amqp.queues.consume_from:
            logger.warning(
                "worker_disable_prefetch is on: Celery takes a task of its broker only where no "
                "event waits, so events come first; leave it out, or use a dedicated worker "
                "(celery jetstream worker)"
            )
        subjects = ", ".join(self._config.consume_subjects)
        logger.info("direct: handlers get %s with no broker between", subjects)

    def stop(self) -> None:
        """Pulls no more, and hands back what Celery has not got yet."""
        self._stopping = True
        self._jetstream.running.pop("direct", None)
        getattr(self._watch, "entry", self._watch).cancel()  # gevent's timer gives a greenlet
        with contextlib.suppress(NotConnectedError):
            self._jetstream.connection.run(self._stop_pulling, timeout=STOP_TIMEOUT)
        if self._consumer.hub is not None:
            self._consumer.hub.remove_reader(self._wake.fileno())
        elif self._feeder is not None:
            self._wake.set()
            self._feeder.join(STOP_TIMEOUT)
        if self._running is not None:
            self._running.cancel()
        with self._lock:
            left = [*self._arrived, *(flight for _, flight in self._waiting.values())]
            self._arrived.clear()
            self._waiting.clear()
        for flight in left:
            self._jetstream.settler.settle(flight.delivery, Nak(0.0), handler=flight.handler)
        if self._feeder is None or not self._feeder.is_alive():
            self._wake.close()

    def tell(self) -> dict[str, Any]:
        """How it is, as plain values (docs/reference/health.md). Any thread; does not wait."""
        running = self._running
        troubles = [trouble for feed in self._feeds if (trouble := feed.pull.trouble)]
        if not self._feeds:
            troubles = ["does not pull yet"]
        if running is not None and running.done():
            troubles = ["pulling has ended, and is begun anew"]
        with self._lock:
            waiting, size = len(self._waiting), self._waiting_bytes
            ahead, paused = self._ahead, self._pauses.names
        ago = self._restarted
        return {
            "pulling": not troubles,
            "trouble": "; ".join(troubles) or None,
            "ahead": ahead,
            "waiting": waiting,
            "waiting_bytes": size,
            "full": size >= MOST_WAITING,
            "paused_handlers": paused,
            "restarts": self._restarts,
            "restarted_ago": None if ago is None else round(time.monotonic() - ago, 1),
            "error": self._error,
        }

    def _look_after_run(self) -> None:
        """Celery's timer: pulling ends only by a defect of ours, and then is begun anew."""
        running, now = self._running, time.monotonic()
        if self._stopping or running is None or not running.done():
            return
        if self._begin_at is None:
            error = None if running.cancelled() else running.exception()
            self._error = repr(error) if error else "it just ended"
            pause = min(LONGEST_PAUSE, BEGIN_PAUSE * 2 ** min(self._restarts, 8))
            self._begin_at = now + pause
            logger.error(
                "pulling has ended, which is a defect of ours; it begins anew in %g s: %s",
                pause,
                self._error,
                exc_info=error,
            )
        elif now >= self._begin_at:
            self._begin_at, self._restarted = None, now
            self._restarts += 1
            self._running = self._jetstream.connection.submit(self._run)

    # -- loop thread: in, and kept in progress ---------------------------------------------------

    async def _run(self) -> None:
        """Pulls and looks after what has come, until it is cancelled."""
        await self._jetstream.ensure_topology(missing=False)
        consumers = await self._consumers()
        self._feeds = [Feed(self, consumer) for consumer in consumers]
        coroutines = [feed.pull.run() for feed in self._feeds]
        connection, settler = self._jetstream.connection, self._jetstream.settler
        asks = self._config.auto_provision
        coroutines += [Sweeper(connection, settler, one, asks=asks).run() for one in consumers]
        coroutines += [self._keep(), self._look_again()]
        runs = [asyncio.ensure_future(one) for one in coroutines]
        try:
            ended, _ = await asyncio.wait(runs, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping:  # the others have a moment for what is on its way
                await asyncio.wait(runs)
            for run in ended:
                run.result()
        finally:
            for run in runs:
                run.cancel()

    async def _consumers(self) -> tuple[ConsumerSpec, ...]:
        """Waits for a server where that must be asked."""
        while True:
            try:
                found: tuple[ConsumerSpec, ...] = await self._jetstream.consumers()
                return found
            except NotConnectedError:
                await asyncio.sleep(1)  # said by the connection

    async def _stop_pulling(self) -> None:
        await asyncio.gather(*(feed.pull.stop() for feed in self._feeds))

    def pull(self, feed: Feed, consumer: ConsumerSpec) -> Pull:
        """How a consumer's messages are pulled."""
        return Pull(
            self._jetstream.connection,
            consumer.stream,
            consumer.durable,
            room=feed.room,
            on_message=feed.arrive,
            on_missing=self._jetstream.ensure_topology,
            batch=min(consumer.batch_size, MOST_AHEAD),
            expires=EXPIRES,
            optional=consumer.optional,
        )

    def room(self, asked: int, pending: int) -> int:
        """How many more may be taken of a consumer's messages: those that begin soon.

        Beside a broker's tasks no more of ours than Celery takes of those.

        Args:
            asked: how many of them are asked for and have not come.
            pending: how many the stream has.
        """
        consumer = self._consumer
        if self._stopping or self._full():
            return 0
        idle = slots(consumer) - len(worker_state.active_requests)
        pace = self._pace.ahead()
        if consumer.initial_prefetch_count and consumer.app.amqp.queues.consume_from:
            pace = min(pace, consumer.initial_prefetch_count)
        self._target = max(1, idle, pace)
        if 2 * (self._ahead + asked) > self._target:
            return 0  # asked for in blocks: each request costs
        # no more than is there: what is asked for beyond that comes later, when all may be slow
        return max(max(1, idle) - self._ahead, min(pace - self._ahead, pending))

    def _full(self) -> bool:
        """Whether so much waits for a database that no more may be taken."""
        full = self._waiting_bytes >= MOST_WAITING
        if full and not self._said_full:
            logger.warning(
                "%d messages wait in this worker for an outage to end, %d MiB: it takes no others "
                "until then",
                len(self._waiting),
                MOST_WAITING // 2**20,
            )
        self._said_full = full
        return full

    def arrive(self, delivery: Delivery, message: Msg) -> None:
        """Takes a message in, for Celery's thread to hand over."""
        signals.message_received.send(sender=self, delivery=delivery)
        with self._lock:
            waiting = self._waiting.get(delivery.sequence)
            if waiting is not None and waiting[1].delivery.timestamp == delivery.timestamp:
                waiting[1].delivery = delivery
                return
            self._ahead += 1
            self._arrived.append(Flight(delivery, message.subject, message.data))
        self._wake.set()

    async def _keep(self) -> None:
        """Every ``ack_wait / 3``; what Celery has is kept by the Keeper."""
        while True:
            await asyncio.sleep(self._config.ack_wait / 3)
            with self._lock:
                flights = [*self._arrived, *(flight for _, flight in self._waiting.values())]
            try:
                session = await self._jetstream.connection.session(timeout=1)
                await keep_in_progress(session, [flight.delivery.reply for flight in flights])
            except NotConnectedError:
                pass  # said by the connection
            except Exception:
                logger.exception("keeping messages in progress failed; trying on")

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_INTERVAL)
            if self._waiting:
                self._look = True
                self._wake.set()

    # -- Celery's thread: prepared, and handed over ----------------------------------------------

    def _feed(self) -> None:
        """Where Celery has no event loop."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake.fileno(), selectors.EVENT_READ)
            while not self._stopping:
                try:
                    if selector.select(1.0):
                        self._hand_over()
                except Exception:
                    logger.exception("handing messages over failed; trying on")

    def _hand_over(self) -> None:
        """Hands what has arrived to Celery, for a moment at the most: there is other work."""
        self._wake.clear()
        end = time.monotonic() + TURN
        while not self._stopping:
            with self._lock:
                flight = self._next()
            if flight is None:
                return
            self._hand_over_one(flight)
            if time.monotonic() > end:
                self._wake.set()
                return

    def _next(self) -> Flight | None:
        """With the lock held: what arrived, or waited long enough."""
        if self._look:
            now = time.monotonic()
            for sequence, (due, flight) in self._waiting.items():
                if due <= now and self._pauses.admits(flight.task.name, sequence):
                    self._ahead += 1
                    self._waiting_bytes -= len(flight.body)
                    del self._waiting[sequence]
                    return flight
            self._look = False
        return self._arrived.popleft() if self._arrived else None

    def _hand_over_one(self, flight: Flight) -> None:
        message: DirectMessage | None = None
        try:
            if self._refuses(flight) or self._pauses_for(flight):
                self._leave()
                return
            flight.copies += 1
            message = DirectMessage(self, flight)
            strategy = self._consumer.strategies[flight.task.name]
            strategy(message, None, message.begun, _nothing, self._consumer.on_task_message)
        except Exception as error:
            self._give_back(flight, message)
            hub, broker_errors = self._consumer.hub, self._consumer.connection_errors
            if hub is not None and isinstance(error, broker_errors):
                self._wake.set()
                raise  # the broker's connection (task events), for Celery to mend
            logger.exception(
                "message %s could not be handed over; it comes again",
                flight.delivery.task_id,
                extra=flight.log_fields,
            )

    def _refuses(self, flight: Flight) -> bool:
        """Whether it never begins; it is a dead letter then."""
        refused = self._prepare(flight)
        if refused is not None:
            original = Original(flight.subject, flight.body, flight.delivery.headers)
            self._jetstream.settler.settle(flight.delivery, refused, original, flight.handler)
        return refused is not None

    def _prepare(self, flight: Flight) -> DeadLetter | None:
        refused = flight.identify(self._handlers.find)  # anew each time: a handler may change it
        if refused is not None:
            return refused
        num_delivered = flight.delivery.num_delivered
        if flight.task.policy(self._config).spent(num_delivered):
            text = f"delivered {num_delivered} times, and none of its attempts settled it"
            return DeadLetter("max_deliveries_exceeded", "", text, flight.task.name)
        return None

    def _pauses_for(self, flight: Flight) -> bool:
        with self._lock:
            paused = not self._pauses.admits(flight.task.name, flight.delivery.sequence)
            if paused:
                self._wait(flight, 0.0)
        return paused

    def _give_back(self, flight: Flight, message: DirectMessage | None) -> None:
        """Celery could not take it, or not to the end."""
        if message is not None and message.taken:
            for request in self._jetstream.keeper.held():
                if request.message is message:
                    request.hand_back(End.UNKNOWN_TASK)
        else:
            delay = self._config.backoff[-1]
            self._jetstream.settler.settle(flight.delivery, Nak(delay), handler=flight.handler)
        if message is None:
            self._leave()
        else:
            message.begun()

    # -- from wherever the pool says so ----------------------------------------------------------

    def began(self) -> None:
        """The pool has begun one, or will never."""
        self._pace.began()
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._ahead -= 1
        if self._asking or self._stopping:
            return
        if any(feed.is_short(self._target - self._ahead) for feed in self._feeds):
            self._asking = True
            self._jetstream.connection.call_soon(self._ask)

    def _ask(self) -> None:
        """Loop thread."""
        self._asking = False
        for feed in self._feeds:
            feed.pull.more()

    def ended(self, flight: Flight, error: BaseException | None) -> None:
        """An attempt is over; one that an outage ended waits here for the next.

        The message is not asked for again: each delivery counts, and an outage must not.
        """
        if isinstance(error, OutageError):
            self._begin_waiting(flight, error)
        elif self._pauses:
            with self._lock:
                handler = self._pauses.ended(flight.delivery.sequence)
            if handler is not None:
                fields = {"handler": handler}
                logger.warning("%s goes on: its database answers again", handler, extra=fields)
                self._look = True
                self._wake.set()

    def _begin_waiting(self, flight: Flight, error: OutageError) -> None:
        delay = flight.task.policy(self._config).delay(flight.copies) * random.uniform(0.5, 1.0)
        with self._lock:
            stopping = self._stopping
            if not stopping:
                self._wait(flight, delay)
            news = error.pauses and self._pauses.outage(flight.task.name, flight.delivery.sequence)
        if stopping:
            self._jetstream.settler.settle(flight.delivery, Nak(delay), handler=flight.handler)
        elif news:
            logger.warning(
                "%s pauses: its database is away; its messages wait in this worker",
                flight.task.name,
                extra={"handler": flight.task.name},
            )

    def _wait(self, flight: Flight, delay: float) -> None:
        """With the lock held."""
        self._waiting_bytes += len(flight.body)
        self._waiting[flight.delivery.sequence] = time.monotonic() + delay, flight


class Feed:
    """One consumer's messages on their way into a worker. Loop thread, but where it says so."""

    def __init__(self, intake: Intake, consumer: ConsumerSpec) -> None:
        self._intake = intake
        self._pending = self._arrivals = 0
        self.pull = intake.pull(self, consumer)

    def room(self) -> int:
        """How many more may be taken. Any thread."""
        return self._intake.room(self.pull.asked, self._pending)

    def is_short(self, wanted: int) -> bool:
        """Whether to ask for more, where so many are wanted. Any thread."""
        return 2 * self.pull.asked <= wanted and self.pull.worth_asking

    def arrive(self, message: Msg) -> None:
        """One has come."""
        delivery = Delivery.from_reply(message.reply, message.headers)
        self._arrivals += 1
        if self._pending > 2 * MOST_AHEAD and self._arrivals % 64:
            self._pending -= 1  # exactly only where it matters: reading it costs
        else:
            self._pending = delivery.num_pending
        self._intake.arrive(delivery, message)


class DirectMessage(Source):
    """What Celery takes for a message of its broker; only a pool of processes serializes it."""

    content_type = content_encoding = None

    def __init__(self, intake: Intake, flight: Flight) -> None:
        self.headers, self.properties, self.body, _ = intake.messages.make(flight)
        self.headers[HEADER] = {**header_of(flight), DIRECT: True}
        self.payload = self.body
        self.delivery = flight.delivery
        self.delivery_info = {
            "routing_key": flight.subject,
            "redelivered": flight.delivery.num_delivered > 1,
        }
        self._intake = intake
        self._flight = flight
        self._left = False

    def begun(self, *_: Any) -> None:
        """Celery acknowledges the message: it begins, or is revoked."""
        if not self._left:
            self._left = True
            self._intake.began()

    def ended(self, error: BaseException | None) -> None:
        """Its task has come to an end, or its process has."""
        self._intake.ended(self._flight, error)


def slots(consumer: Any) -> int:
    """How many tasks the pool runs at once."""
    pool = consumer.pool
    found: int = consumer.controller.concurrency if pool.is_green else pool.num_processes
    return found


def _nothing(*_: Any) -> None:
    """Celery rejects a message: it has been settled by then."""
