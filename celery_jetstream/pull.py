"""Pulling: a consumer's messages for ever, as many as there is room for.

Everything here runs in the connection's loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from .connection import Connection
from .exceptions import NotConnectedError, PermissionDeniedError
from .session import Session

__all__ = ("GATHER_INTERVAL", "Pull")

logger = logging.getLogger(__name__)

EXPIRES = 30.0
#: Seconds between two signs of life of an open request; 2.5 of them without one, and it is lost.
HEARTBEAT = 2.0
RETRY_PAUSE = (0.25, 1.0)
#: Seconds until what our user may not ask is asked again, and what may be missing.
DENIED_PAUSE, OPTIONAL_PAUSE = 5.0, 60.0
#: Seconds over which what comes one by one is gathered while much is coming.
GATHER_INTERVAL = 0.05
#: Seconds that the end may take, twice: for what is coming, and for the server's answer.
STOP_TIMEOUT = 1.0
#: Seconds without a message after which none of what is asked for is on its way.
QUIET = 0.1

#: A limit of the consumer's, set by an administrator.
_LIMIT = re.compile(r"Exceeded (MaxRequestBatch|MaxRequestExpires) of (\d+)")


class Pull:
    """Pulls a consumer's messages for ever.

    Requests overlap: what is asked for is filled up when half of it has come. Their idle heartbeats
    are watched. A lost request, a new session, a deleted consumer, another leader end in a new
    pull, never in a silent stop; what the server refuses (more than its limits) is asked for again
    with less, or later.

    Args:
        connection: the process's.
        stream: the stream's name.
        consumer: the durable's name.
        room: how many more messages there is room for now; asked in the loop thread.
        on_message: gets each message, in the loop thread; must not block or raise.
        on_missing: awaited when the server has no such consumer (503, or 409 when deleted).
        batch: the most messages of one request.
        expires: seconds that a request stays open; what there is room for is asked again then.
        optional: there may be no such consumer: that is looked for once a minute, and not said.
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
        optional: bool = False,
    ) -> None:
        self._connection = connection
        self._name = f"consumer {consumer!r} of stream {stream!r}"
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._room = room
        self._on_message = on_message
        self._on_missing = on_missing
        self._batch = batch
        self._expires = expires
        self._heartbeat = min(HEARTBEAT, expires / 2)
        self._optional = optional
        #: Why our user may not ask; None where it may, as far as is known.
        self.denied: PermissionDeniedError | None = None
        self._wake = asyncio.Event()
        self._soon: asyncio.TimerHandle | None = None
        self._session: Session | None = None
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._numbers = itertools.count()
        self._requests: dict[str, tuple[int, float]] = {}
        self._asked = self._mark = 0
        self._heard = 0.0
        self._answered_empty = 0
        self._missing = False
        self._refusal = False
        self._trouble = 0
        self._said = ""
        self._ending = self._stopping = False

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

    @property
    def trouble(self) -> str | None:
        """Why nothing comes now, whatever the stream has; None where it would. Any thread."""
        if self._subscription is None:
            return f"does not pull from {self._name}"
        if denied := self.denied:
            return f"cannot pull from {self._name}: {denied}"
        troubled = self._trouble and self._said  # nothing is said of an optional one
        return f"cannot pull from {self._name}: {self._said}" if troubled else None

    @property
    def asked(self) -> int:
        """How many messages are asked for and have not come."""
        return self._asked

    @property
    def worth_asking(self) -> bool:
        """Whether half of what there is room for, or more, is not asked for yet. Any thread."""
        return self._wanted() >= max(1, self._asked)

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
        """Takes the interest away, so that nothing handed back comes to us again; 2 s at the most.

        What the server has begun to send is still handed to ``on_message``. It would be dropped
        without interest, so what is asked for may come first, as long as it does.
        """
        self._ending = True
        end = time.monotonic() + STOP_TIMEOUT
        while self._asked and time.monotonic() < min(end, self._heard + QUIET):
            await asyncio.sleep(QUIET / 10)
        self._stopping = True
        await self._end(STOP_TIMEOUT)
        self._wake.set()

    # -- asking ----------------------------------------------------------------------------------

    async def _pull(self, session: Session) -> None:
        """Pulls with one inbox, until something is wrong with it."""
        self._session, self._inbox = session, session.client.new_inbox()
        self._forget_requests()
        self._missing = False
        self._heard = time.monotonic()
        session.on_denial(self._subject, self._on_denial)
        try:
            self._subscription = await session.subscribe(f"{self._inbox}.*", self._receive)
            while not (self._stopping or session.lost.is_set() or self._silent()):
                if self._missing:
                    await self._wait_for_the_consumer()
                elif self.denied:
                    await self._wait_for_the_permission()
                elif self._refusal:
                    await self._pause()
                self._wake.clear()
                await self._ask(session)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._heartbeat / 2)
            if self._silent() and not session.lost.is_set():
                self._say("no sign of life of what was asked for")
                self._trouble += 1
                await self._on_missing()  # 2.9 is silent where there is none
        finally:
            await self._end(0.0)

    async def _end(self, timeout: float) -> None:
        subscription, self._subscription = self._subscription, None
        session = self._session
        if subscription is not None and session is not None and not session.lost.is_set():
            await session.unsubscribe(subscription, timeout)

    def _silent(self) -> bool:
        return self._asked > 0 and time.monotonic() - self._heard > 2.5 * self._heartbeat

    async def _ask(self, session: Session) -> None:
        if not self.worth_asking:
            return
        wanted, now = self._wanted(), time.monotonic()
        request = {
            "batch": wanted,
            "expires": int(self._expires * 1e9),
            "idle_heartbeat": int(self._heartbeat * 1e9),
        }
        if self._asked == 0:
            self._heard = now
        for reply in [r for r, (_, until) in self._requests.items() if until < now]:
            del self._requests[reply]  # filled: the server says nothing of that
        reply = f"{self._inbox}.{next(self._numbers)}"
        self._requests[reply] = wanted, now + self._expires + 2 * self._heartbeat
        self._asked += wanted
        self._mark = self._asked // 2
        await session.publish(self._subject, json.dumps(request).encode(), reply=reply)

    def _wanted(self) -> int:
        return 0 if self._ending else min(self._batch, self._room()) - self._asked

    def _forget_requests(self) -> None:
        self._requests.clear()
        self._asked = self._mark = 0

    # -- hearing ---------------------------------------------------------------------------------

    def _receive(self, message: Msg) -> None:
        self._heard = time.monotonic()
        if message.reply.startswith("$JS.ACK"):
            self._asked -= 1
            self._answered_empty = 0
            self._goes()
            self._optional = False  # it is there, so its absence is an election
            self._on_message(message)
        else:
            self._status(message.subject, message.headers or {})
        if self._asked <= self._mark and self.worth_asking:
            self._wake.set()

    def _status(self, reply: str, headers: dict[str, str]) -> None:
        """What became of a request (ADR-13); 100 is a heartbeat: it is open, and nothing comes."""
        status, text = headers.get("Status", ""), headers.get("Description", "")
        if status == "100":
            self._answered_empty += 1
            self._goes()
            self._optional = False
            return
        if reply not in self._requests:
            return
        wanted, _ = self._requests.pop(reply)
        left = headers.get("Nats-Pending-Messages")
        if status == "503" or "Deleted" in text:
            self._missing = True
            self._forget_requests()
        elif "Leadership" in text or "Shutdown" in text:  # each request of ours is told so
            self._forget_requests()
        else:
            self._asked -= min(self._asked, wanted if left is None else int(left))
            if status in ("404", "408"):
                self._answered_empty += 1
            else:
                self._refused(status, text)

    def _refused(self, status: str, text: str) -> None:
        """Asks for less where that is what the server wants; and not at once."""
        limit = _LIMIT.match(text)
        if limit and limit[1] == "MaxRequestBatch":
            self._batch = min(self._batch, int(limit[2]))
        elif limit:
            self._expires = max(1.0, self._expires / 2)
            self._heartbeat = min(HEARTBEAT, self._expires / 2)
        else:
            self._say(f"the server refuses to be asked ({status} {text})")
        self._refusal = True

    # -- when it does not go -----------------------------------------------------------------------

    def _on_denial(self, error: PermissionDeniedError) -> None:
        self.denied = error
        self._forget_requests()
        self._wake.set()

    async def _wait_for_the_permission(self) -> None:
        self._say(str(self.denied))
        self._trouble += 1
        await self._rest(DENIED_PAUSE)
        self.denied = None

    async def _wait_for_the_consumer(self) -> None:
        if self._optional:
            self._answered_empty += 1
            await self._rest(OPTIONAL_PAUSE)
            self._missing = False
            return
        self._say("nobody answers for it: it is missing, or a new leader is being elected")
        await self._pause()
        await self._on_missing()
        self._missing = False
        self._forget_requests()

    async def _rest(self, seconds: float) -> None:
        ends, session = time.monotonic() + seconds, self._session
        while time.monotonic() < ends and not (self._stopping or session is None):
            if session.lost.is_set():
                return
            await asyncio.sleep(RETRY_PAUSE[1])

    async def _pause(self) -> None:
        """From 0.25 to 1 s, longer each time until something comes."""
        least, most = RETRY_PAUSE
        await asyncio.sleep(min(most, least * 2 ** min(self._trouble, 8)) * random.uniform(0.5, 1))
        self._trouble += 1
        self._refusal = False

    def _goes(self) -> None:
        if self._trouble and self._said:
            logger.info("pulling from %s works again", self._name)
        self._trouble, self._said = 0, ""

    def _say(self, what: str) -> None:
        """Once, until something has come again."""
        self._said = what
        if not self._trouble:
            logger.warning("cannot pull from %s: %s; trying on", self._name, what)
