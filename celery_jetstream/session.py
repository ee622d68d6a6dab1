"""One live NATS client, and one reply inbox for everything that waits for an answer.

A session is opened once and ends once; nothing reconnects in here. Used in the connection's loop
thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from .client import Client
from .exceptions import (
    ConnectionRefusedByServer,
    EventError,
    NoResponders,
    NotConnectedError,
    PermissionDeniedError,
)
from .headers import wire_size
from .permissions import to_allow
from .servers import masked_url

__all__ = ("NoResponders", "Session")

logger = logging.getLogger(__name__)

#: Seconds between two looks at whether the client is of use.
WATCH_INTERVAL = 0.5
#: So many looks one after the other at bytes that wait, of which the peer takes none, and it hangs.
#: Looks and not seconds: a process that was itself stalled has looked once.
STUCK_LOOKS = 5
#: Unwritten bytes of posted messages, from which on none is to be posted.
FULL = 256 * 1024
#: Permissions that are said to be missing, on one session.
MOST_TOLD = 100
#: What was said of JetStream's API: a process that may not ask may not on its next session either.
_not_answered: set[str] = set()

#: What the server says of what our user may not do. It names the subject; nats-py hands that on in
#: small letters, to its error callback and to nobody else.
_DENIED = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"')

OnAnswer = Callable[[str, "Msg | NotConnectedError"], None]
"""Called with a token and its answer, or with why there is none; must not raise or block."""

OnDenial = Callable[[PermissionDeniedError], None]
"""Called when our user may not use a subject; must not raise or block."""


class Session:
    """One live client. Ends once and for all when :attr:`lost` is set; use in the loop thread."""

    def __init__(self, client: Client) -> None:
        self.client = client
        client.on_info = self._on_info
        self.lost: asyncio.Event = asyncio.Event()
        #: What nats-py told last; not each is the end.
        self.error: BaseException | None = None
        #: ``host:port`` of the server.
        self.address = ""
        self._check = asyncio.Event()
        self._cause: NotConnectedError | None = None
        self._waiting: dict[str, tuple[str, OnAnswer]] = {}
        self._denials: dict[str, tuple[str, OnDenial]] = {}
        self._told: set[str] = set()
        self._tokens = itertools.count()
        self._prefix = ""

    async def open(self, url: str, timeout: float, **options: Any) -> None:
        """Connects, or raises what went wrong and leaves nothing behind."""
        try:
            await asyncio.wait_for(
                self.client.connect(
                    servers=[url],
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_lost,
                    closed_cb=self._on_lost,
                    **options,
                ),
                timeout,
            )
            if self.lost.is_set() or not self.client.is_connected:  # an EOF is a PONG to nats-py
                closed = NotConnectedError("the NATS server closed the connection at once")
                raise self._cause or closed
            self.client.tune_socket()
            self.address = self.client.address
            await self._open_inbox(timeout)
        except BaseException as error:
            self.client.abort()
            ours = not isinstance(error, Exception) or isinstance(error, ConnectionRefusedByServer)
            if self.error is None or ours:
                raise
            # nats-py reports the cause to its callback and raises "no servers available"
            raise self.error from error

    async def _open_inbox(self, timeout: float) -> None:
        """Who may not hear answers would wait in vain for each: that is said at once."""
        self._prefix = self.client.new_inbox() + "."
        self.on_denial(self._prefix + "*", self._on_deaf)
        await self.subscribe(self._prefix + "*", self._on_answer)
        answered = await self.round_trip(timeout)
        if self._cause is not None:
            raise self._cause
        if not answered:
            raise NotConnectedError("the NATS server did not answer in time")

    def _on_deaf(self, error: PermissionDeniedError) -> None:
        self._cause = ConnectionRefusedByServer(
            f"{error}; or set inbox_prefix in jetstream_nats_options to what it may hear"
        )
        self.lost.set()
        self._check.set()

    @property
    def safe_url(self) -> str:
        """Where it is connected to, without credentials."""
        url = self.client.connected_url
        return masked_url(url.geturl()) if url else ""

    @property
    def server_version(self) -> str:
        """The server's, such as ``2.15.1``; "" where it did not say."""
        return str(self.client.info.get("version", ""))

    @property
    def server_name(self) -> str:
        """The server's; "" where it did not say."""
        return str(self.client.info.get("server_name", ""))

    @property
    def cluster_name(self) -> str:
        """The server's cluster; "" where it is in none."""
        return str(self.client.info.get("cluster", ""))

    async def watch(self) -> None:
        """Returns when the client is of no more use: closed, stale, stuck, or a task of it dead."""
        stuck = 0
        while not self.lost.is_set() and self.client.alive:
            self._check.clear()
            try:
                await asyncio.wait_for(self._check.wait(), WATCH_INTERVAL)
            except asyncio.TimeoutError:
                stuck = stuck + 1 if self.client.is_stuck() else 0
            if stuck >= STUCK_LOOKS:
                self._cause = NotConnectedError("the NATS server does not read what is sent")
                return

    @property
    def cause(self) -> BaseException | None:
        """Why it was lost, as far as that is known."""
        return self._cause or self.client.last_error or self.error

    def end(self) -> None:
        """Drops the client at once and fails whatever waits for an answer."""
        self.lost.set()
        self._check.set()
        self.client.abort()
        waiting = dict(self._waiting)
        self._waiting.clear()
        for token, (_, on_answer) in waiting.items():
            on_answer(token, NotConnectedError("the NATS connection was lost"))

    async def send(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None
    ) -> asyncio.Future[Msg]:
        """Publishes with a reply subject; the future is the answer.

        The future fails with :class:`NoResponders` (503), ``PermissionDeniedError`` or
        :class:`~celery_jetstream.exceptions.NotConnectedError`; a caller that stops waiting
        cancels it.

        Raises:
            EventError: larger than the server takes; sent, it would cost the connection.
            NotConnectedError: it cannot be sent now.
        """
        if self.lost.is_set():
            raise NotConnectedError("the NATS connection was lost")
        size, limit = wire_size(payload, headers), self.client.max_payload
        if size > limit:
            raise EventError(f"{size} bytes with headers, and the server takes {limit} at most")
        token, future = self._expect(subject)
        try:
            await self.client.publish(subject, payload, self._prefix + token, headers)
        except (NatsError, OSError) as error:
            future.cancel()
            raise NotConnectedError(f"could not send to NATS: {error!r}") from error
        except BaseException:
            future.cancel()
            raise
        return future

    def post(
        self, subject: str, payload: bytes, headers: Mapping[str, str], on_answer: OnAnswer | None
    ) -> str:
        """Lays a message ready to be sent, and returns its token; :meth:`flush` sends it.

        For many messages: no future and no task for each, and one write for all of them.
        ``on_answer`` is called once with the token, unless :meth:`forget` comes first; with None no
        answer is asked for.

        Raises:
            EventError: the server would not take it; sent, it would cost the connection.
            NotConnectedError: it cannot be sent now.
        """
        if self.lost.is_set():
            raise NotConnectedError("the NATS connection was lost")
        token = str(next(self._tokens))
        limit = self.client.max_payload
        reply = "" if on_answer is None else self._prefix + token
        self.client.put(_frame(subject, reply, payload, headers, limit))
        if on_answer is not None:
            self._waiting[token] = subject, on_answer
        return token

    @property
    def full(self) -> bool:
        """So much waits to be written that no more is to be posted before a :meth:`flush`."""
        return self.client.pending_data_size >= FULL

    @property
    def unsent(self) -> bool:
        """Something is posted and not written yet."""
        return bool(self.client.pending_data_size)

    def flush(self) -> asyncio.Future[Any]:
        """Sends what was posted; done when the socket has taken it, but for 64 KiB.

        The future fails with ``NotConnectedError``; a caller that stops waiting cancels it.

        Raises:
            NotConnectedError: it cannot be sent now.
        """
        token, written = self._expect("")
        try:
            self.client.kick(written)
        except asyncio.QueueFull:
            self._waiting.pop(token)
            raise NotConnectedError("the NATS server does not read what is sent") from None
        return written

    def forget(self, tokens: Iterable[str]) -> None:
        """Nobody waits for these answers any more."""
        for token in tokens:
            self._waiting.pop(token, None)

    async def ask(
        self,
        subject: str,
        payload: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        timeout: float = 5.0,
    ) -> Msg:
        """Sends and waits for the answer, at most ``timeout`` seconds.

        Raises:
            PermissionDeniedError: our user may not publish there; at once.
            NotConnectedError: no answer in time, no responders, or the connection was lost.
        """
        future = await self.send(subject, payload, headers)
        try:
            return await asyncio.wait_for(future, timeout)
        except asyncio.TimeoutError:
            raise NotConnectedError(f"no answer from {subject} in {timeout:g} s") from None

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        reply: str = "",
    ) -> None:
        """Publishes without an answer; raises ``NotConnectedError`` where that cannot be."""
        try:
            await self.client.publish(subject, payload, reply, headers)
        except (NatsError, OSError) as error:
            raise NotConnectedError(f"could not send to NATS: {error!r}") from error

    async def subscribe(
        self, subject: str, receive: Callable[[Msg], None], queue: str = ""
    ) -> Subscription:
        """Has ``receive`` called for each message, as it is read: it must not block.

        Args:
            subject: what to hear; wildcards go.
            receive: called in the loop thread. What it raises is logged.
            queue: a queue group, of which one member gets each message.

        Raises:
            NotConnectedError: it cannot be sent now.
        """

        async def early(message: Msg) -> None:  # before the receiver is known, if ever
            receive(message)

        try:
            subscription = await self.client.subscribe(subject, queue, cb=early)
        except (NatsError, OSError) as error:
            raise NotConnectedError(f"could not subscribe to {subject}: {error!r}") from error
        self.client.receivers[subscription._id] = receive
        return subscription

    def on_denial(self, subject: str, told: OnDenial) -> None:
        """Has ``told`` called when our user may not publish or subscribe to exactly this.

        For what is sent without asking for an answer. Whoever is told says so: it is not logged
        here.
        """
        self._denials[subject.lower()] = subject, told

    async def unsubscribe(self, subscription: Subscription, timeout: float = 0.0) -> None:
        """Takes the interest away, and hears what was on its way, ``timeout`` seconds at the most.

        Never raises for the broker's sake.
        """
        with contextlib.suppress(NatsError, OSError):
            await subscription.unsubscribe()
        if timeout:
            await self.round_trip(timeout)
        self.client.receivers.pop(subscription._id, None)

    async def round_trip(self, timeout: float) -> bool:
        """Waits until the server has taken in what was sent, and we what it had said before that.

        Returns:
            Whether it has, in ``timeout`` seconds.
        """
        # not cancelled: a PONG that comes too late for nats-py's future ends its read loop
        pongs = asyncio.ensure_future(self._ping_twice())
        await asyncio.wait({pongs}, timeout=timeout)
        return pongs.done() and pongs.result()

    async def _ping_twice(self) -> bool:
        """nats-py's PING overtakes what it has not written yet: the second comes after that."""
        try:
            for _ in range(2):
                await self.client.flush(timeout=60)
        except (NatsError, OSError, asyncio.TimeoutError):
            return False
        return True

    # -- what nats-py calls: never raises (that would kill its read loop), never blocks ----------

    def _on_answer(self, message: Msg) -> None:
        token = message.subject[len(self._prefix) :]
        if token not in self._waiting:
            return
        _, on_answer = self._waiting.pop(token)
        if message.headers and message.headers.get("Status") == "503":
            on_answer(token, NoResponders(f"no responders: {message.subject}"))
        else:
            on_answer(token, message)

    def _expect(self, subject: str) -> tuple[str, asyncio.Future[Any]]:
        """A token, and the future of its answer; forgotten when that is done."""
        token = str(next(self._tokens))
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[token] = subject, partial(_settle, future)
        future.add_done_callback(lambda _: self._waiting.pop(token, None))
        return token, future

    async def _on_error(self, error: BaseException) -> None:
        self.error = error
        self._check.set()
        if "permissions violation" in (text := str(error).lower()):
            found = _DENIED.search(text)
            self._deny(*found.groups()) if found else self._tell_denied(text, error)

    def _deny(self, verb: str, lowered: str) -> None:
        """Answers the first that waits for it: each of several is denied by itself, in order."""
        known, told = self._denials.get(lowered, ("", None))
        if verb == "publish":
            token, subject, on_answer = self._waits_for(lowered)
            error = PermissionDeniedError("publish to", to_allow(subject or known or lowered))
            if on_answer is not None:
                on_answer(token, error)
            asked = on_answer is not None and lowered.startswith("$js.api.")
        else:
            heard = {s.subject.lower(): s.subject for s in self.client._subs.values()}
            inbox = self._prefix.rsplit(".", 2)[0]
            subject = to_allow(known or heard.get(lowered, lowered), inbox)
            error = PermissionDeniedError("subscribe to", subject)
            asked = False
            if told is None and subject == f"{inbox}.>":
                told = self._on_deaf  # another inbox: who may not hear one may hear none
        if told is not None:
            told(error)
        elif asked:
            self._tell_not_answered(error)
        else:
            self._tell_denied(f"{verb} {error.subject}", error)

    def _waits_for(self, lowered: str) -> tuple[str, str, OnAnswer | None]:
        """Takes out what waits longest for an answer from this subject, if anything."""
        for token, (subject, on_answer) in self._waiting.items():
            if subject.lower() == lowered:
                del self._waiting[token]
                return token, subject, on_answer
        return "", "", None

    def _tell_denied(self, what: str, error: BaseException) -> None:
        """Logs it once, though it may be denied for each message."""
        if what not in self._told and len(self._told) < MOST_TOLD:
            self._told.add(what)
            logger.error("NATS denied an operation: %s", error)

    def _tell_not_answered(self, error: PermissionDeniedError) -> None:
        """Who asked says what follows from it, and many can do without: once for a process."""
        if error.subject not in _not_answered and len(_not_answered) < MOST_TOLD:
            _not_answered.add(error.subject)
            logger.info("NATS denied a question: %s", error)

    async def _on_lost(self) -> None:
        self.lost.set()
        self._check.set()

    def _on_info(self, info: Mapping[str, Any]) -> None:
        if info.get("ldm") and not self.lost.is_set():
            self._cause = NotConnectedError("the NATS server is shutting down (lame duck)")
            self.lost.set()
            self._check.set()


def _settle(future: asyncio.Future[Any], _: str, answer: Msg | NotConnectedError) -> None:
    if future.done():
        return
    if isinstance(answer, NotConnectedError):
        future.set_exception(answer)
        future.exception()  # whoever stopped waiting is not to be warned about
    else:
        future.set_result(answer)


_BREAK = re.compile(r"[\0-\x20]")


def _frame(
    subject: str, reply: str, payload: bytes, headers: Mapping[str, str], limit: int
) -> bytes:
    """The bytes of one PUB or HPUB, as nats-py writes them."""
    if not subject or _BREAK.search(subject):
        raise EventError(f"subject {subject!r} cannot be sent")
    block = _header_block(headers) if headers else b""
    size = len(block) + len(payload)
    if size > limit:
        raise EventError(f"{size} bytes with headers, and the server takes {limit} at most")
    line = f"HPUB {subject} {reply} {len(block)}" if block else f"PUB {subject} {reply}"
    return b"".join((f"{line} {size}\r\n".encode(), block, payload, b"\r\n"))


def _header_block(headers: Mapping[str, str]) -> bytes:
    lines = [f"{name.strip()}: {value.strip()}" for name, value in headers.items()]
    block = "\r\n".join(("NATS/1.0", *lines, "\r\n"))
    if block.count("\r") != len(lines) + 2 or block.count("\n") != len(lines) + 2:
        raise EventError("a header has a line break, which would end it")
    return block.encode()
