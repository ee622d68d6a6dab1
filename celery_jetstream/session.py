"""One live NATS client, and one reply inbox for everything that waits for an answer.

A session is opened once and ends once; nothing reconnects in here. Used in the connection's loop
thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import logging
import socket
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import nats.aio.client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from .exceptions import ConnectionRefusedByServer, EventError, NotConnectedError
from .headers import wire_size

__all__ = ("Client", "NoResponders", "Session")

logger = logging.getLogger(__name__)

#: Unacknowledged bytes for this long (milliseconds) make the kernel give the socket up (Linux).
TCP_USER_TIMEOUT_MS = 5_000
WATCH_INTERVAL = 0.5

#: All clients of this process, for a forked child to close its copies of their sockets.
clients: weakref.WeakSet[Client] = weakref.WeakSet()


class NoResponders(NotConnectedError):
    """Nobody listens on the subject: no stream, no consumer, or an election (NATS 503)."""


class Session:
    """One live client. Ends once and for all when :attr:`lost` is set; use in the loop thread."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.lost: asyncio.Event = asyncio.Event()
        self.error: BaseException | None = None
        self._check = asyncio.Event()
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
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
                    **self._lame_duck(),
                    **options,
                ),
                timeout,
            )
            if not self.client.is_connected:  # nats-py takes an EOF for a PONG
                raise NotConnectedError("the NATS server closed the connection at once")
            self.client.tune_socket()
            self._prefix = self.client.new_inbox() + "."
            await self.client.subscribe(self._prefix + "*", cb=self._on_reply)
        except BaseException as error:
            self.client.abort()
            if self.error is None or not isinstance(error, Exception):
                raise
            # nats-py reports the cause to its callback and raises "no servers available"
            raise self.error from error

    async def watch(self) -> None:
        """Returns when the client is of no more use: closed, stale, or its read loop dead."""
        while not self.lost.is_set() and self.client.alive:
            self._check.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._check.wait(), WATCH_INTERVAL)

    def end(self) -> None:
        """Drops the client at once and fails whatever waits for an answer."""
        self.lost.set()
        self._check.set()
        self.client.abort()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(NotConnectedError("the NATS connection was lost"))
                future.exception()  # whoever stopped waiting is not to be warned about

    async def send(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None
    ) -> asyncio.Future[Msg]:
        """Publishes with a reply subject; the future is the answer.

        The future fails with :class:`NoResponders` (503) or
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
        token = str(next(self._tokens))
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._waiting[token] = future
        future.add_done_callback(lambda _: self._waiting.pop(token, None))
        try:
            await self.client.publish(subject, payload, self._prefix + token, headers)
        except (NatsError, OSError) as error:
            future.cancel()
            raise NotConnectedError(f"could not send to NATS: {error!r}") from error
        except BaseException:
            future.cancel()
            raise
        return future

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
        self, subject: str, receive: Callable[[Msg], Awaitable[None]]
    ) -> Subscription:
        """Has ``receive`` awaited for each message; raises ``NotConnectedError`` as above."""
        try:
            return await self.client.subscribe(subject, cb=receive)
        except (NatsError, OSError) as error:
            raise NotConnectedError(f"could not subscribe to {subject}: {error!r}") from error

    # -- what nats-py calls: never raises (that would kill its read loop), never blocks ----------

    async def _on_reply(self, message: Msg) -> None:
        future = self._waiting.get(message.subject[len(self._prefix) :])
        if future is None or future.done():
            return
        if message.headers and message.headers.get("Status") == "503":
            future.set_exception(NoResponders(f"no responders: {message.subject}"))
        else:
            future.set_result(message)

    async def _on_error(self, error: BaseException) -> None:
        self.error = error
        self._check.set()
        if "permissions violation" in str(error).lower():
            logger.error("NATS denied an operation: %s", error)

    async def _on_lost(self) -> None:
        self.lost.set()
        self._check.set()

    def _lame_duck(self) -> dict[str, Any]:
        """nats-py tells of a server that shuts down from 2.15 on; before, it just goes."""
        known = "lame_duck_mode_cb" in inspect.signature(self.client.connect).parameters
        return {"lame_duck_mode_cb": self._on_lame_duck} if known else {}

    async def _on_lame_duck(self) -> None:
        logger.warning("NATS server is shutting down (lame duck); moving to another")
        await self._on_lost()


class Client(nats.aio.client.Client):
    """nats-py's client with the three things that its public API does not give.

    What is not public of nats-py is used here only (tried on 2.10 to 2.16):
    ``_connect_command``, the tasks, ``_status`` and ``_transport._io_writer``.
    """

    def __init__(self, *, tls_wanted: bool) -> None:
        super().__init__()
        self._tls_wanted = tls_wanted
        clients.add(self)

    def _connect_command(self) -> bytes:
        """Refuses to send credentials in clear text where TLS was asked for."""
        if self._tls_wanted and not self.encrypted:
            raise ConnectionRefusedByServer(
                "TLS was asked for (a tls:// URL or jetstream_nats_options['tls']), but the "
                "server does not offer it: nothing was sent. Turn TLS on at the server, or use "
                "a nats:// URL without TLS options."
            )
        command: bytes = super()._connect_command()
        return command

    @property
    def alive(self) -> bool:
        """Connected, and something still reads what the server sends."""
        reader = self._reading_task
        return bool(self.is_connected and reader is not None and not reader.done())

    @property
    def encrypted(self) -> bool:
        """What is sent now is sent through TLS."""
        server = self._current_server
        over_wss = server is not None and server.uri.scheme == "wss"
        return over_wss or self._socket_info("ssl_object") is not None

    def tune_socket(self) -> None:
        """Lets the kernel notice a hung peer, also while data is unsent."""
        sock = self._socket_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)

    def abort(self) -> None:
        """Closes the socket now, sent or unsent, without waiting for the peer."""
        self._status = nats.aio.client.Client.CLOSED
        tasks = [self._reading_task, self._ping_interval_task, self._flusher_task]
        tasks += [subscription._wait_for_msgs_task for subscription in self._subs.values()]
        for task in tasks:
            if task is not None:
                task.cancel()
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    def fileno(self) -> int:
        """The socket's descriptor; -1 where there is none."""
        sock = self._socket_info("socket")
        return -1 if sock is None else int(sock.fileno())

    def _socket_info(self, name: str) -> Any:
        writer = getattr(self._transport, "_io_writer", None)
        return None if writer is None else writer.get_extra_info(name)
