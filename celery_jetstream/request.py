"""What the worker's main process knows of a message: claim, keepalive, and the abnormal ends.

A copy that the worker receives becomes a :class:`JetStreamRequest`. From then on the worker
keeps its message in progress and claims it (:class:`Keeper`). Normal ends are settled by the
process that ran the task, which has the real exception; a killed child, the hard time limit, a
revoke and a shutdown are seen only here.

This process limits a prefork worker: next to nothing is done here for a message that ends
normally.

What is used here and is not public of Celery: docs/explanation/architecture.md.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future
from datetime import datetime, timezone
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from celery import bootsteps, signals
from celery.exceptions import TaskRevokedError, TimeLimitExceeded, WorkerLostError
from celery.worker import state as worker_state
from celery.worker.request import Request

from . import ends, handlers
from .acks import keep_in_progress
from .connection import Connection
from .delivery import Delivery
from .exceptions import NotConnectedError
from .settlement import End, Policy, decide
from .settler import Settler
from .threads import native_lock

__all__ = ("HandBack", "JetStreamRequest", "Keeper", "Source")

logger = logging.getLogger(__name__)

#: When a child is lost, what it returned within so many seconds (and so many of all children's at
#: the most) is acked once more. Celery gives a child up ``worker_lost_wait`` (10 s) after its end.
CHILD_ACKS_WITHIN = 30.0
CHILD_ACKS_KEPT = 4096
#: Seconds after its arrival in which a message is claimed.
CLAIM_INTERVAL = 1.0
#: A result reaches the main process as its repr.
SETTLED_TEXT = repr(handlers.SETTLED)
#: A message is handed back or begins, never both.
_beginning = threading.Lock()


class Source:
    """A message that no broker has sent, and that wants to hear how its task ended."""

    delivery: Delivery
    #: There is a request for it.
    taken = False

    def ended(self, error: BaseException | None) -> None:
        """In the main process: the task ended; None also where its process died with it."""
        raise NotImplementedError


class JetStreamRequest(Request):
    """Celery's request, for a copy that carries a delivery; without one it is Celery's own."""

    time_start: float | None
    delivery: Delivery | None = None
    refusal: End | None = None
    settled = False
    #: Kept in progress no longer (held too long); its end settles it all the same.
    let_go = False
    claimed = False
    _result_reference: Any = None
    _result: Any = None

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        header = self._header
        if isinstance(message, Source):
            self.delivery, message.taken = message.delivery, True
        else:
            self.delivery = handlers.read_header(header)
        if self.delivery is None:
            return
        self.received = time.time()
        self.refusal = self._refusal(self.delivery, header.get(handlers.LEASE))
        if self.refusal is None:
            # create_request_cls() makes a subclass with an on_success of its own
            self.on_success = self._on_success
            self._app.jetstream.keeper.hold(self)
        else:
            self.expires = datetime.now(timezone.utc)  # has Celery ask revoked() before all else

    def _refusal(self, delivery: Delivery, lease_ends: float | None) -> End | None:
        if lease_ends is not None and self.received > lease_ends:
            _say_expired(self, self.received - lease_ends)
            return End.EXPIRED
        other = worker_state.requests.get(self.id)
        if isinstance(other, JetStreamRequest) and other.delivery is not None:
            # the same delivery twice: the one we have settles it; a newer one waits for that
            newer = delivery.num_delivered > other.delivery.num_delivered
            return End.DUPLICATE if newer else End.EXPIRED
        return None

    @property
    def _header(self) -> Any:
        return self._request_dict.get(handlers.HEADER)

    @property
    def _apply_result(self) -> Any:
        """Celery's weak reference to what the pool made of the task."""
        return self._result_reference

    @_apply_result.setter
    def _apply_result(self, reference: Any) -> None:
        # held until it is accepted: a pool that stops forgets what it has written to a child and
        # the child has not acknowledged, which has begun all the same
        self._result_reference = reference
        self._result = None if reference is None else reference()

    @property
    def begun(self) -> bool:
        """Whether the pool has it, as far as this process can tell."""
        if self.time_start is not None:
            return True
        return getattr(self._result, "_write_to", None) is not None

    @property
    def held(self) -> bool:
        """Whether this worker still has the message: it waits, or runs."""
        if self.settled or self.let_go:
            return False
        return not self.acknowledged or worker_state.requests.get(self.id) is self

    def hand_back(self, end: End = End.NOT_BEGUN) -> None:
        """Gives the message back, unless it has begun; the broker's copy is acknowledged first.

        Decided under a lock: acknowledging waits for the broker, and a pool of threads or
        greenlets goes on accepting meanwhile.
        """
        with _beginning:
            handed_back = not self.begun and not self.settled
            self.settled = self.settled or handed_back
        self.acknowledge()  # also what a child has and this process will not hear of any more
        if handed_back and self.delivery is not None:
            ends.settle(self.task, self.delivery, end)

    def settle(self, end: End | BaseException) -> None:
        """Settles an end that only this process saw; the first one counts."""
        if self.delivery is None or self.settled:
            return
        self.settled = True
        ends.settle_aside(self.task, self.delivery, end, self._header)
        if not self.acknowledged:  # its child died before it said that it had it
            self.acknowledge()
        if isinstance(self.message, Source) and self.refusal is None:
            self.message.ended(None)

    # -- what Celery tells a request -------------------------------------------------------------

    def acknowledge(self) -> None:
        super().acknowledge()
        if self.delivery is not None:
            self._app.jetstream.keeper.begun(self)

    def revoked(self) -> bool:
        """Asked by Celery before it runs a copy; refuses expired ones and duplicates.

        Celery's own would put an expired task's id on the worker's list of revoked tasks, and
        the next copy of the message, which has the same id, would be taken for revoked.
        """
        if self.refusal is None:
            return bool(super().revoked())
        if not self.acknowledged:
            self.acknowledge()
            self.settle(self.refusal)
        return True

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        with _beginning:
            handed_back = self.settled
            if not handed_back:
                self.time_start = time.time()
            self._result = None
        if handed_back:  # while it waited in a pool that runs all it has got
            self.acknowledge()  # else its place in the worker's prefetch is taken for ever
            raise TaskRevokedError(self.id)
        super().on_accepted(pid, time_accepted)

    def _on_success(self, outcome: Any, **options: Any) -> None:
        """The task ended in a process that lived to say so, and has settled it."""
        del self.on_success  # the class's again; also, no cycle keeps this request alive
        try:
            self.on_success(outcome, **options)
        finally:
            failed, result, *_ = outcome
            if not failed and result != SETTLED_TEXT:
                self._app.jetstream.keeper.returned(self)
            if isinstance(self.message, Source):
                self.message.ended(_error(result) if failed else None)

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> None:
        try:
            super().on_failure(exc_info, send_failed_event, return_ok)
        finally:
            if not return_ok:  # else the process that ran it has settled it
                error = _error(exc_info)
                # a SIGTERM to the whole group (systemd's default) ends the children as well
                stopping = worker_state.should_stop is not None and isinstance(
                    error, (SystemExit, WorkerLostError)
                )
                self.settle(End.CUT_OFF if self._cut_off or stopping else error)
                self._app.jetstream.keeper.child_lost(self.worker_pid)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        try:
            super().on_timeout(soft, timeout)
        finally:
            if not soft:
                self.settle(End.CUT_OFF if self._cut_off else TimeLimitExceeded(timeout))

    @property
    def _cut_off(self) -> bool:
        """Whether the worker is ending at once, and ended the task with it."""
        return bool(worker_state.should_terminate or self._already_cancelled)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        try:
            super()._announce_revoked(reason, terminated, signum, expired)
        finally:
            self.settle(End.REVOKED)

    def _announce_cancelled(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._announce_cancelled(*args, **kwargs)
        finally:
            self.settle(End.CUT_OFF)


def _error(exc_info: Any) -> BaseException:
    error: BaseException = exc_info.exception
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


_said_expired = False


def _say_expired(request: JetStreamRequest, late: float) -> None:
    """Says once per process that copies arrive expired, and what that may mean."""
    global _said_expired
    level = logging.DEBUG if _said_expired else logging.WARNING
    _said_expired = True
    logger.log(
        level,
        "copy %s arrived %d s after its lease and is left to the bridge, which dispatches the "
        "message again. Copies older than jetstream_lease are normal after a time without "
        "workers; else this worker's clock is ahead of the bridge's",
        request.id,
        late,
        extra=_fields(request),
    )


def _fields(request: JetStreamRequest) -> dict[str, Any]:
    """What a line about a copy has in its ``extra``."""
    header, delivery = request._header, request.delivery
    known = {name: header.get(name) for name in (handlers.EVENT_ID, handlers.EVENT_TYPE)}
    return known | {"handler": request.name} | (delivery.log_fields if delivery else {})


class Keeper:
    """Keeps all messages that this worker holds in progress, and claims them.

    In the loop thread: each within a second of its arrival, so that what a killed worker had
    fetched comes again by itself, and from then on every ``ack_wait / 3`` seconds. Bounded: a
    message whose task runs for longer than its hard time limit, or ``jetstream_max_hold`` where
    it has none, is let go.
    """

    def __init__(self, connection: Connection, settler: Settler, *, claimant: str) -> None:
        self._connection = connection
        self._settler = settler
        self._config = connection.config
        self._claimant = claimant
        self._lock = native_lock()
        self._new: deque[weakref.ref[JetStreamRequest]] = deque()
        self._known: list[weakref.ref[JetStreamRequest]] = []
        # Celery 5.7 forgets what has not begun before its bootsteps stop: kept for HandBack
        self._not_begun: set[JetStreamRequest] = set()
        self._returned: deque[tuple[float, int | None, Delivery | None]] = deque(
            maxlen=CHILD_ACKS_KEPT
        )
        self._running: Future[None] | None = None
        self._kept = 0.0

    def hold(self, request: JetStreamRequest) -> None:
        """Called in the main thread for each copy received; does next to nothing."""
        self._not_begun.add(request)
        self._new.append(weakref.ref(request))
        if self._running is None or self._running.done():
            self._running = self._connection.submit(self._run)

    def begun(self, request: JetStreamRequest) -> None:
        """Its copy is acknowledged: from here on it lives as long as Celery needs it."""
        self._not_begun.discard(request)

    def returned(self, request: JetStreamRequest) -> None:
        """A child says that its task returned; the ack may not have been sent yet."""
        self._returned.append((time.monotonic(), request.worker_pid, request.delivery))

    def child_lost(self, pid: int | None) -> None:
        """A child died, and with it the acks that it had gathered: they are sent here again."""
        since = time.monotonic() - CHILD_ACKS_WITHIN
        for when, child, delivery in list(self._returned):  # another thread may append to it
            if child == pid and when > since and delivery is not None:
                self._settler.ack_again(delivery)

    def held(self) -> list[JetStreamRequest]:
        """The requests of all messages that this worker holds now. Any thread."""
        with self._lock:
            while self._new:
                self._known.append(self._new.popleft())
            found = [(r, request) for r in self._known if (request := r()) and request.held]
            self._known = [reference for reference, _ in found]
        return [request for _, request in found]

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(min(CLAIM_INTERVAL, self._config.ack_wait / 3))
            try:
                await self._tick()
            except NotConnectedError:
                pass  # said by the connection; the next tick comes in time or ack_wait passes
            except Exception:
                logger.exception("keeping messages in progress failed; trying on")

    async def _tick(self) -> None:
        now = time.monotonic()
        all_due = now - self._kept > self._config.ack_wait / 3 - CLAIM_INTERVAL / 2
        due = [r for r in self.held() if (all_due or not r.claimed) and not self._too_long(r)]
        if due:
            session = await self._connection.session(timeout=1)
            replies = [request.delivery.reply for request in due if request.delivery is not None]
            await keep_in_progress(session, replies, self._claimant)
        for request in due:
            request.claimed = True
        if all_due:
            self._kept = now

    def _too_long(self, request: JetStreamRequest) -> bool:
        limit = request.time_limits[0] or request.task.time_limit
        began = request.time_start is not None  # a time limit says nothing about waiting
        bound = limit + self._config.ack_wait if limit and began else self._config.max_hold
        held = time.time() - (request.time_start or request.received)
        if held <= bound:
            return False
        request.let_go = True
        logger.error(
            "message %s has been held for %d s and is kept no longer: JetStream will deliver it "
            "again. Give the handler a time_limit, or raise jetstream_max_hold",
            request.id,
            held,
            extra=_fields(request),
        )
        return True


class HandBack(bootsteps.StartStopStep):
    """Hands back what has not begun when the worker stops, or loses its broker.

    The broker's copy is acknowledged first, so that the broker does not restore it.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def stop(self, consumer: Any) -> None:
        for request in consumer.app.jetstream.keeper.held():
            request.hand_back()


@signals.task_unknown.connect(weak=False)
@signals.task_rejected.connect(weak=False)
def hand_back_unreadable(sender: Any = None, message: Any = None, **_: Any) -> None:
    """A copy whose task this worker does not know, or cannot read (rolling deploy)."""
    delivery = handlers.read_header((message.headers or {}).get(handlers.HEADER))
    jetstream = getattr(sender.app, "jetstream", None)
    if delivery is None or jetstream is None:
        return
    fields = delivery.log_fields | {"outcome": "nak"}
    logger.error(
        "copy %s is handed back: this worker cannot run it", delivery.task_id, extra=fields
    )
    policy = Policy(backoff=jetstream.config.backoff)
    settlement = decide(End.UNKNOWN_TASK, policy, delivery.num_delivered)
    jetstream.settler.settle(delivery, settlement)
