"""Stuck messages: what a consumer has given up is found, and made a dead letter.

A consumer with a finite ``max_deliver`` (ours have none, an administrator's may) stops to deliver
a message after so many times and says no more than an advisory. The message stays in the work queue
for ever, and nobody sees it. The sweeper listens to the advisories, and for what happened while
nobody listened it looks at what the stream still has where the consumer has passed. What is stuck
goes the way of every message that is given up (:class:`~celery_jetstream.settler.Settler`).

Any number of sweepers may look after one consumer: their dead letters have the same
``Nats-Msg-Id``. All of this runs in the connection's loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from .connection import Connection
from .deadletter import NO_MESSAGE_FOUND, fetch_original
from .delivery import Delivery
from .exceptions import NotConnectedError, PermissionDeniedError
from .session import Session
from .settlement import DeadLetter
from .settler import Settler
from .specs import ConsumerSpec, filters

__all__ = ("Sweeper",)

logger = logging.getLogger(__name__)

#: Seconds between two looks at a consumer that gives messages up, and at one that does not.
LOOK_INTERVAL, SELDOM = 60.0, 600.0
#: Seconds until another try where a look failed.
RETRY_INTERVAL = 5.0
#: Seconds that two tries to bury one message are apart at the most.
LONGEST_PAUSE = 3600.0
#: Messages that one sweeper watches at a time, and buries at a time; the others later.
MOST_WATCHED, MOST_BURIED = 256, 32


class Sweeper:
    """Makes dead letters of one consumer's stuck messages, for ever.

    A message is stuck when the consumer has given it up *and* nobody has said a word about it
    (settled it, or said that it is in progress) for ``ack_wait``: a handler that an outage cut
    off from the server may still come to its end.

    Args:
        connection: the process's.
        settler: the process's.
        consumer: whose; a worker that has a message says so within its ``ack_wait`` (or the
            server's, where that is longer).
        asks: whether to ask the server what the consumer is like before anything is known to be
            given up; else an advisory must say so first (``auto_provision`` is off).
    """

    def __init__(
        self,
        connection: Connection,
        settler: Settler,
        consumer: ConsumerSpec,
        *,
        asks: bool = True,
    ) -> None:
        self._connection = connection
        self._settler = settler
        self._stream = consumer.stream
        self._consumer = consumer.durable
        self._ack_wait = self._patience = consumer.ack_wait
        self._asks = asks
        self._wake = asyncio.Event()
        self._session: Session | None = None
        self._created = ""
        self._swept_to = 0
        self._watched: dict[int, _Watched] = {}
        self._exhausted: set[int] = set()
        self._is_work_queue: bool | None = None
        self._listening = self._told = self._told_denied = False

    async def run(self) -> None:
        """Looks, and sweeps; ends only when it is cancelled."""
        while True:
            self._wake.clear()
            try:
                pause = await self._look()
            except PermissionDeniedError:
                pause = await self._after_denial()
            except NotConnectedError:
                pause = RETRY_INTERVAL
            except Exception:
                logger.exception("looking for stuck messages failed; trying on")
                pause = LOOK_INTERVAL
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    async def _look(self) -> float:
        """Finds, and buries what is due; returns the seconds until the next look."""
        session = await self._connection.session(timeout=60)
        if session is not self._session:
            self._begin(session)
        if not self._asks:
            await self._listen(session)
            return SELDOM
        found = await self._ask(session, f"CONSUMER.INFO.{self._stream}.{self._consumer}")
        if found is None:
            return RETRY_INTERVAL if self._watched else LOOK_INTERVAL
        state = _State.of(found)
        if state.max_deliver <= 0 or not await self._may_sweep(session):
            return SELDOM
        self._say_once(state)
        self._patience = max(self._ack_wait, state.ack_wait)
        if state.created != self._created or state.passed < self._swept_to:
            await self._forget(state.created)  # another consumer, or it fell back in a crash
        await self._listen(session)
        await self._find(session, state)
        await self._bury_due(session, state)
        if not self._watched:
            return LOOK_INTERVAL
        due = min(watched.due for watched in self._watched.values())
        return min(LOOK_INTERVAL, max(0.1, due - time.monotonic()))

    # -- what there is to know --------------------------------------------------------------------

    def _begin(self, session: Session) -> None:
        """On a new session nobody is heard any more, and much may have happened."""
        self._session = session
        self._listening, self._is_work_queue = False, None
        self._watched.clear()
        self._exhausted.clear()
        self._swept_to = 0

    async def _may_sweep(self, session: Session) -> bool:
        """Only of a work queue: elsewhere the stream keeps what is settled, too."""
        if self._is_work_queue is None:
            found = await self._ask(session, f"STREAM.INFO.{self._stream}")
            if found is None:
                return False
            self._is_work_queue = found["config"].get("retention") == "workqueue"
        return self._is_work_queue

    async def _ask(self, session: Session, operation: str, **request: Any) -> dict[str, Any] | None:
        """JetStream's answer; None where there is no such thing."""
        body = json.dumps(request).encode() if request else b""
        answer: dict[str, Any] = json.loads((await session.ask(f"$JS.API.{operation}", body)).data)
        if error := answer.get("error"):
            if error.get("code") == 404 or error.get("err_code") == NO_MESSAGE_FOUND:
                return None
            raise NotConnectedError(f"JetStream answered {error}")
        return answer

    async def _after_denial(self) -> float:
        """Where our user may not ask, that is said, and not asked again on this session."""
        if not self._told_denied:
            self._told_denied = True
            logger.warning(
                "messages that consumer %s gives up (a finite max_deliver) cannot be found: the "
                "NATS user may not ask. Allow it to publish to %s",
                self._consumer,
                f"$JS.API.CONSUMER.INFO.{self._stream}.{self._consumer}, "
                f"$JS.API.STREAM.INFO.{self._stream}, $JS.API.STREAM.MSG.GET.{self._stream}",
            )
        if self._session is not None:
            await self._session.lost.wait()
        return 0.0

    def _say_once(self, state: _State) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "consumer %s has max_deliver=%d: a message that it has delivered so often stays in "
                "the stream, unseen, until it is found here and made a dead letter. Set its "
                "max_deliver to -1; jetstream_max_deliver says how often an event is tried",
                self._consumer,
                state.max_deliver,
            )

    # -- finding: by advisory, and where the consumer has passed ----------------------------------

    async def _listen(self, session: Session) -> None:
        if not self._listening:
            self._listening = True
            advisories = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"
            await session.subscribe(f"{advisories}.{self._stream}.{self._consumer}", self._advised)

    def _advised(self, message: Msg) -> None:
        with contextlib.suppress(ValueError, KeyError):
            self._exhausted.add(int(json.loads(message.data)["stream_seq"]))
            self._asks = True
            self._wake.set()

    async def _find(self, session: Session, state: _State) -> None:
        """What was advised of; what the stream has where the consumer has passed since."""
        while self._exhausted:
            await self._watch(self._exhausted.pop())
        for subject in state.filters:
            sequence = self._swept_to + 1
            while sequence <= state.passed:
                if len(self._watched) >= MOST_WATCHED:
                    return
                found = await self._ask(
                    session,
                    f"STREAM.MSG.GET.{self._stream}",
                    seq=sequence,
                    next_by_subj=subject,
                )
                if found is None or found["message"]["seq"] > state.passed:
                    break
                await self._watch(found["message"]["seq"])
                sequence = found["message"]["seq"] + 1
        self._swept_to = state.passed

    # -- watching: whether anybody says a word about it -------------------------------------------

    async def _watch(self, sequence: int) -> None:
        session = self._session
        if session is None or sequence in self._watched or len(self._watched) >= MOST_WATCHED:
            return
        patience = self._patience * random.uniform(1.0, 1.5)  # of several, one buries
        watched = self._watched[sequence] = _Watched(time.monotonic() + patience)
        subject = f"$JS.ACK.{self._stream}.{self._consumer}.*.{sequence}.>"
        watched.words = await session.subscribe(subject, self._hear)

    def _hear(self, message: Msg) -> None:
        with contextlib.suppress(ValueError):
            sequence = Delivery.from_reply(message.subject).sequence
            watched = self._watched.get(sequence)
            if watched is None:
                return
            if message.data.startswith((b"+ACK", b"+TERM")):
                watched.is_settled = True
            else:
                watched.due = max(watched.due, time.monotonic() + self._patience)

    async def _leave(self, sequence: int) -> None:
        watched = self._watched.pop(sequence, None)
        if watched is not None and watched.words is not None and self._session is not None:
            await self._session.unsubscribe(watched.words)

    async def _forget(self, created: str) -> None:
        self._created, self._swept_to = created, 0
        for sequence in list(self._watched):
            await self._leave(sequence)

    # -- burying ----------------------------------------------------------------------------------

    async def _bury_due(self, session: Session, state: _State) -> None:
        now = time.monotonic()
        for sequence in [number for number, one in self._watched.items() if one.is_settled]:
            await self._leave(sequence)
        due = [(number, watched) for number, watched in self._watched.items() if watched.due <= now]
        for sequence, watched in due[:MOST_BURIED]:
            delivery = self._delivery(sequence, state.max_deliver)
            original = await fetch_original(session, delivery)
            if original is None:
                await self._leave(sequence)
            elif not watched.is_settled:
                watched.tries += 1
                watched.due = now + min(LONGEST_PAUSE, self._patience * 2**watched.tries)
                text = f"delivered {state.max_deliver} times, the consumer's max_deliver"
                end = DeadLetter("max_deliveries_exceeded", "", text)
                self._settler.settle(delivery, end, original)

    def _delivery(self, sequence: int, deliveries: int) -> Delivery:
        """Its last delivery, for all that is still known of it.

        The server takes a late +TERM for a message that it does not wait for any more, and removes
        it: that needs no other permission than every settlement does.
        """
        reply = f"$JS.ACK.{self._stream}.{self._consumer}.{deliveries}.{sequence}.0.0.0"
        return Delivery.from_reply(reply)


@dataclass
class _Watched:
    """A message that the consumer has given up; ``due``: when it is to be buried."""

    due: float
    tries: int = 0
    is_settled: bool = False
    words: Subscription | None = None


@dataclass(frozen=True)
class _State:
    """What the server says of a consumer; ``passed``: to this sequence it is done with all."""

    max_deliver: int
    ack_wait: float
    filters: tuple[str, ...]
    created: str
    passed: int

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> _State:
        config = info["config"]
        # What a consumer gives up is not pending any more, but its ack floor moves only when
        # another message is acknowledged: where nothing is pending, all that was delivered is done.
        passed = info["ack_floor"]["stream_seq"]
        if info["num_ack_pending"] == 0:
            passed = max(passed, info["delivered"]["stream_seq"])
        return cls(
            max_deliver=config.get("max_deliver", -1),
            ack_wait=config.get("ack_wait", 0) / 1e9,
            filters=tuple(filters(config)),
            created=info["created"],
            passed=passed,
        )
