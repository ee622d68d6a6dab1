"""The consuming side of the wire: pulling messages, and settling them with confirmation.

:class:`Pull` hands messages on; :class:`Acks` sends ``+ACK``, ``-NAK`` and ``+TERM`` until the
server has confirmed them (plain acks and a ``kill -9`` of the server brought 78 % of the acked
messages back; confirmed ones none). Everything here runs in the connection's loop thread but
what says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from .connection import Connection
from .exceptions import NotConnectedError
from .session import Session

__all__ = ("CLAIM_HEADER", "PAUSE_HEADER", "Acks", "Pull", "is_claim", "keep_in_progress")

logger = logging.getLogger(__name__)

ACK = b"+ACK"
TERM = b"+TERM"
IN_PROGRESS = b"+WPI"

#: On a ``+WPI``: the name of the worker that has the message. A bare ``+WPI`` claims nothing
#: (bridges send those).
CLAIM_HEADER = "Jetstream-Claim"
#: On a ``-NAK``: the handler that no more is to be dispatched to for a while.
PAUSE_HEADER = "Jetstream-Pause"

RESEND_INTERVAL = 1.0
EXPIRES = 30.0
HEARTBEAT = 5.0
RETRY_PAUSE = (0.25, 2.0)
#: Seconds over which what comes one by one is gathered while much is coming.
GATHER_INTERVAL = 0.05


def nak(delay: float) -> bytes:
    """The body that asks for redelivery in ``delay`` seconds (ADR-15)."""
    return b'-NAK {"delay": %d}' % int(delay * 1e9) if delay > 0 else b"-NAK"


def is_claim(message: Msg) -> bool:
    """Whether this ``$JS.ACK`` traffic is a worker saying that it has the message."""
    return message.data == IN_PROGRESS and CLAIM_HEADER in (message.headers or {})


async def keep_in_progress(
    session: Session, replies: Iterable[str], claimant: str | None = None
) -> None:
    """Restarts ``ack_wait`` of each message; with ``claimant``, claims it as well."""
    headers = {CLAIM_HEADER: claimant} if claimant else None
    for number, reply in enumerate(replies, 1):
        await session.publish(reply, IN_PROGRESS, headers)
        if number % 256 == 0:
            await asyncio.sleep(0)  # let the read loop breathe


@dataclass(eq=False)
class _Unconfirmed:
    reply: str
    body: bytes
    give_up: float
    headers: dict[str, str] | None = None
    sent: float = 0.0
    future: asyncio.Future[Msg] | None = field(default=None, repr=False)


class Acks:
    """Sends each settlement until the server has confirmed it.

    The first at once, those that follow it closely together: waking a thread for each costs more
    than the settlement.

    Resends while unanswered, through lost connections and elections (503), for ``patience``
    seconds: a late ack still counts. A late -NAK would only have the message delivered once more
    beside the redelivery that ``ack_wait`` brought, so those have ``nak_patience``.
    """

    def __init__(self, connection: Connection, *, patience: float, nak_patience: float) -> None:
        self._connection = connection
        self._patience = patience
        self._nak_patience = nak_patience
        self._new: deque[_Unconfirmed] = deque()
        self._unconfirmed: set[_Unconfirmed] = set()
        self._sender: asyncio.Task[None] | None = None
        self._wake: asyncio.Event | None = None
        self._scheduled = False
        self._sent = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def ack(self, reply: str) -> None:
        """Any thread; does not wait."""
        self.put(reply, ACK)

    def nak(self, reply: str, delay: float, pause: str = "") -> None:
        """Any thread; does not wait. ``delay`` in seconds; ``pause``: a handler's name."""
        headers = {PAUSE_HEADER: pause} if pause else None
        self.put(reply, nak(delay), self._nak_patience, headers)

    def term(self, reply: str) -> None:
        """Any thread; does not wait. Plain ``+TERM``: server 2.9 knows no reason behind it."""
        self.put(reply, TERM)

    def put(
        self,
        reply: str,
        body: bytes,
        patience: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Hands over to the loop thread, with one wake-up for a burst."""
        give_up = time.monotonic() + (self._patience if patience is None else patience)
        self._new.append(_Unconfirmed(reply, body, give_up, headers))
        if not self._scheduled or self._sender is None or self._sender.done():
            self._scheduled = True
            self._connection.call_soon(self._kick)

    @property
    def unconfirmed(self) -> int:
        """How many settlements the server has not confirmed yet."""
        return len(self._new) + len(self._unconfirmed)

    async def drain(self, timeout: float) -> int:
        """Waits until all is confirmed, at most ``timeout`` seconds; returns what is not."""
        end = time.monotonic() + timeout
        while self.unconfirmed and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return self.unconfirmed

    def _kick(self) -> None:
        if self._sender is None or self._sender.done() or self._wake is None:
            self._wake, self._timer = asyncio.Event(), None
            self._sender = asyncio.get_running_loop().create_task(self._run(self._wake))
        self._wake.set()

    async def _run(self, wake: asyncio.Event) -> None:
        while True:
            wake.clear()
            await asyncio.sleep(self._sent + GATHER_INTERVAL - time.monotonic())
            try:
                await self._send_due()
            except NotConnectedError:
                await asyncio.sleep(0.1)
            except Exception:
                logger.exception("sending settlements failed; trying on")
                await asyncio.sleep(1)
            if not self._new:
                self._look_again(wake)
                await wake.wait()

    def _look_again(self, wake: asyncio.Event) -> None:
        """Wakes the sender for what may have to be sent again (``wait_for`` is dear)."""

        def look() -> None:
            self._timer = None
            wake.set()

        if self._unconfirmed and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RESEND_INTERVAL / 2, look)

    async def _send_due(self) -> None:
        session = await self._connection.session(timeout=60)
        self._scheduled = False
        if self._new:
            self._sent = time.monotonic()
        while self._new:
            entry = self._new.popleft()
            self._unconfirmed.add(entry)
            await self._send(session, entry)
        now = time.monotonic()
        for entry in [e for e in self._unconfirmed if now - e.sent > RESEND_INTERVAL]:
            if now > entry.give_up:
                self._unconfirmed.discard(entry)
                logger.warning("settlement given up unconfirmed: %s", entry.reply)
            else:
                await self._send(session, entry)

    async def _send(self, session: Session, entry: _Unconfirmed) -> None:
        if entry.future is not None:
            entry.future.cancel()
        entry.sent = time.monotonic()
        entry.future = await session.send(entry.reply, entry.body, entry.headers)
        entry.future.add_done_callback(lambda future: self._answered(entry, future))

    def _answered(self, entry: _Unconfirmed, future: asyncio.Future[Msg]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._unconfirmed.discard(entry)


class Pull:
    """Pulls a consumer's messages for ever, as many as there is room for.

    What is asked for is filled up when half of it has come; its idle heartbeats are watched. A lost
    request, a new session, a deleted consumer or an election end in a new pull, never in a
    silent stop.

    Args:
        connection: the process's.
        stream: the stream's name.
        consumer: the durable's name.
        room: how many more messages there is room for now; asked in the loop thread.
        on_message: gets each message, in the loop thread; must not block or raise.
        on_missing: awaited when the server has no such consumer (503, or 409 when deleted).
        batch: the most messages of one request.
        expires: seconds that a request stays open; what there is room for is asked again then.
    """

    def __init__(
        self,
        connection: Connection,
        stream: str,
        consumer: str,
        *,
        room: Callable[[], int],
        on_message: Callable[[Msg], None],
        on_missing: Callable[[], Awaitable[None]],
        batch: int = 256,
        expires: float = EXPIRES,
    ) -> None:
        self._connection = connection
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._room = room
        self._on_message = on_message
        self._on_missing = on_missing
        self._batch = batch
        self._expires = expires
        self._heartbeat = min(HEARTBEAT, expires / 2)
        self._wake = asyncio.Event()
        self._soon: asyncio.TimerHandle | None = None
        self._subscription: Subscription | None = None
        self._asked = self._mark = 0
        self._heard = 0.0
        self._answered_empty = 0
        self._missing = False
        self._misses = 0
        self._stopping = False

    def more(self, *, soon: bool = False) -> None:
        """There is room again: asks for more, at once or soon (with what comes until then).

        Loop thread.
        """
        if not soon:
            self._wake.set()
        elif self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(GATHER_INTERVAL, self._now)

    def _now(self) -> None:
        self._soon = None
        self._wake.set()

    @property
    def idle(self) -> bool:
        """Whether the server has said since the last message that there is no other now."""
        return self._answered_empty > 0

    async def run(self) -> None:
        """Pulls until :meth:`stop`."""
        pause = RETRY_PAUSE[0]
        while not self._stopping:
            try:
                session = await self._connection.session(timeout=60)
                await self._pull(session)
                pause = RETRY_PAUSE[0]
            except NotConnectedError:
                await asyncio.sleep(pause)
            except Exception:
                logger.exception("pulling failed; trying on")
                await asyncio.sleep(pause)
            pause = min(RETRY_PAUSE[1], pause * 2)

    async def stop(self) -> None:
        """Takes the interest away first, so that nothing handed back comes to us again."""
        self._stopping = True
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()
        self._wake.set()

    async def _pull(self, session: Session) -> None:
        """Pulls with one inbox, until something is wrong with it."""
        inbox = session.client.new_inbox()
        self._subscription = await session.subscribe(inbox, self._receive)
        self._asked = self._mark = 0
        self._missing = False
        self._heard = time.monotonic()
        try:
            while not (self._stopping or session.lost.is_set() or self._silent()):
                if self._missing:
                    await self._wait_for_the_consumer()
                await self._ask(session, inbox)
                self._wake.clear()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._heartbeat / 2)
        finally:
            subscription, self._subscription = self._subscription, None
            if subscription is not None and not session.lost.is_set():
                with contextlib.suppress(Exception):
                    await subscription.unsubscribe()

    async def _wait_for_the_consumer(self) -> None:
        if not self._misses:
            logger.error("stream or consumer is missing: %s; trying on", self._subject)
        await asyncio.sleep(min(RETRY_PAUSE[1], RETRY_PAUSE[0] * 2 ** min(self._misses, 8)))
        self._misses += 1
        await self._on_missing()
        self._missing, self._asked = False, 0

    def _silent(self) -> bool:
        return self._asked > 0 and time.monotonic() - self._heard > 2.5 * self._heartbeat

    async def _ask(self, session: Session, inbox: str) -> None:
        if not self.worth_asking:
            return
        wanted = self._wanted()
        request = {
            "batch": wanted,
            "expires": int(self._expires * 1e9),
            "idle_heartbeat": int(self._heartbeat * 1e9),
        }
        if self._asked == 0:
            self._heard = time.monotonic()
        self._asked += wanted
        self._mark = self._asked // 2
        await session.publish(self._subject, json.dumps(request).encode(), reply=inbox)

    @property
    def asked(self) -> int:
        """How many messages are asked for and have not come."""
        return self._asked

    @property
    def worth_asking(self) -> bool:
        """Whether half of what there is room for, or more, is not asked for yet. Any thread."""
        return self._wanted() >= max(1, self._asked)

    def _wanted(self) -> int:
        return min(self._batch, self._room()) - self._asked

    async def _receive(self, message: Msg) -> None:
        self._heard = time.monotonic()
        if message.reply.startswith("$JS.ACK"):
            self._asked -= 1
            self._answered_empty = self._misses = 0
            self._on_message(message)
        else:
            self._status(message.headers or {})
        if self._asked <= self._mark and self.worth_asking:
            self._wake.set()

    def _status(self, headers: dict[str, str]) -> None:
        status, text = headers.get("Status", ""), headers.get("Description", "")
        if status == "100":  # idle heartbeat: the request is open and nothing waits for us
            self._answered_empty += 1
            self._misses = 0
            return
        left = headers.get("Nats-Pending-Messages")
        self._asked = max(0, self._asked - int(left)) if left is not None else 0
        if status in ("404", "408"):
            self._answered_empty += 1
        if status == "503" or (status == "409" and "Deleted" in text):
            self._missing = True
            self._asked = 0
