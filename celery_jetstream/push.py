"""Push mode: the server sends a consumer's messages as they come, and to one bridge each.

Everything here runs in the connection's loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from .connection import Connection
from .exceptions import NotConnectedError, PermissionDeniedError
from .session import Session

__all__ = ("Push",)

logger = logging.getLogger(__name__)

RETRY_PAUSE = (0.25, 1.0)
#: Seconds until another try where our user may not hear.
DENIED_PAUSE = 5.0
#: Seconds that the end may take: hearing what the server had sent already.
STOP_TIMEOUT = 1.0


class Push:
    """Receives what a push consumer sends, for ever.

    All bridges are members of one queue group, and share what comes. How much comes is the server's
    business: up to the consumer's ``max_ack_pending``, whatever there is room for. Where nothing
    is heard, not even idle heartbeats (another bridge may be hearing them), the consumer is made
    sure of and subscribed to anew.

    Args:
        connection: the process's.
        subject: where the server delivers.
        group: the queue group.
        heartbeat: the consumer's ``idle_heartbeat``, in seconds.
        on_message: gets each message, in the loop thread; must not block or raise.
        on_missing: awaited when nothing is heard.
    """

    asked = 0
    worth_asking = False

    def __init__(
        self,
        connection: Connection,
        subject: str,
        group: str,
        *,
        heartbeat: float,
        on_message: Callable[[Msg], None],
        on_missing: Callable[[], Awaitable[None]],
    ) -> None:
        self._connection = connection
        self._subject = subject
        self._group = group
        self._heartbeat = heartbeat
        self._on_message = on_message
        self._on_missing = on_missing
        #: Why our user may not hear; None where it may, as far as is known.
        self.denied: PermissionDeniedError | None = None
        self._wake = asyncio.Event()
        self._session: Session | None = None
        self._subscription: Subscription | None = None
        self._heard = 0.0
        self._idle = False
        self._said = False
        self._stopping = False

    def more(self, *, soon: bool = False) -> None:
        """There is room again: that is not asked for here."""

    @property
    def idle(self) -> bool:
        """Whether the server has said since the last message that it has no other to send now."""
        return self._idle

    @property
    def trouble(self) -> str | None:
        """Why nothing comes now, whatever the stream has; None where it would. Any thread."""
        if self._subscription is None:
            return f"does not listen on {self._subject}"
        return str(self.denied) if self.denied else None

    async def run(self) -> None:
        """Receives until :meth:`stop`."""
        pause = RETRY_PAUSE[0]
        while not self._stopping:
            try:
                session = await self._connection.session(timeout=60)
                self.denied = None
                await self._receive_all(session)
                pause = RETRY_PAUSE[0]
                continue
            except NotConnectedError:
                pass  # said by the connection
            except Exception:
                logger.exception("receiving failed; trying on")
            await asyncio.sleep(pause)
            pause = min(RETRY_PAUSE[1], pause * 2)

    async def stop(self) -> None:
        """Takes the interest away first, so that nothing handed back comes to us again.

        What the server had sent before is still handed to ``on_message``; 1 s at the most.
        """
        self._stopping = True
        await self._end(self._session, STOP_TIMEOUT)
        self._wake.set()

    async def _receive_all(self, session: Session) -> None:
        """Is a member of the group, until something is wrong with that."""
        self._session, self._heard = session, time.monotonic()
        self._wake.clear()
        session.on_denial(self._subject, self._on_denial)
        self._subscription = await session.subscribe(self._subject, self._receive, self._group)
        try:
            while not (self._stopping or session.lost.is_set()):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._heartbeat / 2)
                if self.denied:
                    await asyncio.sleep(DENIED_PAUSE)
                    return
                if time.monotonic() - self._heard > 2.5 * self._heartbeat:
                    await self._on_missing()
                    return
        finally:
            await self._end(session, 0.0)

    async def _end(self, session: Session | None, timeout: float) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None and session is not None and not session.lost.is_set():
            await session.unsubscribe(subscription, timeout)

    def _on_denial(self, error: PermissionDeniedError) -> None:
        if not self._said:
            self._said = True
            logger.warning("cannot receive from %s: %s; trying on", self._subject, error)
        self.denied = error
        self._wake.set()

    def _receive(self, message: Msg) -> None:
        self._heard = time.monotonic()
        if self._said:
            self._said = False
            logger.info("receiving from %s works again", self._subject)
        if message.reply.startswith("$JS.ACK"):
            self._idle = False
            self._on_message(message)
            return
        headers = message.headers or {}
        # a request of flow control, or a heartbeat that says that it waits for the answer to one
        if stalled := message.reply or headers.get("Nats-Consumer-Stalled"):
            self._go_on(stalled)
        else:
            self._idle = True

    def _go_on(self, stalled: str) -> None:
        """What was sent is taken in: the server may send more."""
        if self._session is not None:
            with contextlib.suppress(NotConnectedError):
                self._session.post(stalled, b"", {}, None)
                self._session.flush()
